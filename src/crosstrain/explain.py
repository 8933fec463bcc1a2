"""What a method does to every token of a batch whose log-probs are given: no model, the method's own terms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosstrain.errors import UserError
from crosstrain.explain_checks import as_collected
from crosstrain.explain_finite import check_finite
from crosstrain.explain_given import OLD, PER_TOKEN, GivenBatch, GivenGroup, GivenTrajectory, check_signs, to_group
from crosstrain.explain_state import state_of
from crosstrain.objective.reduce import count, term_loss
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.training.collect import with_known_rewards
from crosstrain.types import Batch, Channel, Group, Method, Scores, Source, Weights


def explain(method: Method, given: GivenBatch) -> dict[str, Any]:
    """The method's loss on a batch and the weight of every token, as JSON holds it.

        method, settings    what ran
        loss                as logged
        terms               of each: name, loss, denominator, tokens
        groups              of each: selected, advantage (one number per trajectory, or a list with one per token where they
        differ), and
                            trajectories, of each: selected, weights, and of a method with a value head value_weights

    weights[t] = -d loss / d logp[t] and value_weights[t] = -d loss / d value[t], divided as in training: 0 for what is not
    selected. An absent `old_logp` or `old_value` means one inner update: the old policy is the current one.

    Raises UserError for what the method needs and the batch lacks, or has and the method never could, for numbers out of range and
    those that make a result no number, and for a method that needs the whole distribution, which log-probs of single tokens do not
    tell.

    >>> from crosstrain.methods import load_method
    >>> one = {"source": ["prompt", "policy"], "logp": [0, -1.0]}
    >>> batch = GivenBatch(groups=[{"trajectories": [{**one, "reward": 1.0}, {**one, "reward": 0.0}]}])
    >>> [t["weights"] for t in explain(load_method("rloo"), batch)["groups"][0]["trajectories"]]
    [[0.0, 0.5], [0.0, -0.5]]
    """
    if method.channels or method.comparisons:
        raise _whole(method, {**method.channels, **method.comparisons})
    state = state_of(method, given.state, groups=len(given.groups))
    method = method.at(state)
    groups = [as_collected(method, state, i, to_group(i, g)) for i, g in enumerate(given.groups)]
    for i, (g, group) in enumerate(zip(given.groups, groups, strict=True)):
        check_signs(i, g, group)
    kept = [(i, chosen) for i, g in enumerate(groups) if (chosen := _selected(method, i, g, state)) is not None]
    answer: dict[str, Any] = {
        "method": method.name,
        "settings": dict(method.settings),
        "loss": 0.0,
        "terms": [{"name": t.name, "loss": 0.0, "denominator": 0.0, "tokens": 0} for t in method.terms],
        "groups": [_nothing(g, values="value" in method.needs) for g in given.groups],
    }
    if not kept:
        return answer
    batch = _batch_of([g for _, g in kept], step=given.step, seed=int(state["seed"]))
    at = [(i, t.policy_version) for i, g in kept for t in g.trajectories]  # where each row comes from
    rows = [given.groups[i].trajectories[k] for i, k in at]
    batch = _with_columns(method, batch, at, rows)
    logp = _rectangle(batch, [t.logp for t in rows])
    batch = with_advantage(batch, method.advantage(batch))
    return {**answer, **_worked_out(method, batch, logp, at, rows, answer)}


def _worked_out(
    method: Method,
    batch: Batch,
    logp: Tensor,
    at: Sequence[tuple[int, int]],
    rows: Sequence[GivenTrajectory],
    answer: dict[str, Any],
) -> dict[str, Any]:
    leaf = torch.where(batch.trained, logp, torch.zeros_like(logp)).requires_grad_()
    channels = {name: batch.columns[name].nan_to_num() for name in ("entropy", "value") if name in batch.columns}
    values = channels["value"].requires_grad_() if "value" in method.needs else None
    counts = count(method.terms, batch, groups=len(torch.unique(batch.group)))
    total, terms = torch.zeros((), dtype=torch.float64), []
    for term in method.terms:
        part = term_loss(term, Scores(leaf, channels), batch, counts)
        loss = 0.0 if part is None else part.logged
        terms.append({"name": term.name, "loss": loss, "denominator": counts[term.name], "tokens": int(term.on(batch).sum())})
        if part is not None:
            total = total + part.loss
    leaves = [leaf] if values is None else [leaf, values]
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if total.requires_grad:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    weights = [torch.zeros_like(x) if g is None else -g for x, g in zip(leaves, found, strict=True)]
    check_finite(method.name, batch, {t["name"]: t["loss"] for t in terms}, weights, at, rows)
    groups, credited = answer["groups"], _credited(method, batch)
    for r, ((i, k), t) in enumerate(zip(at, rows, strict=True)):
        groups[i]["selected"] = groups[i]["trajectories"][k]["selected"] = True
        groups[i]["advantage"][k] = credit(batch.advantage[r], credited[r], len(t.source))
        for name, weight in zip(("weights", "value_weights"), weights, strict=False):
            groups[i]["trajectories"][k][name] = (weight[r, : len(t.source)] + 0.0).tolist()
    return {"loss": sum(t["loss"] for t in terms), "terms": terms, "groups": groups}


def credit(advantage: Tensor, trained: Tensor, length: int) -> Any:
    """A row's advantage: one number where all trained tokens have the same, else one per token; None where it is unknown."""
    own = advantage[trained]
    if not len(own) or bool(torch.isnan(own).all()):
        return None
    if bool((own == own[0]).all()):
        return float(own[0])
    return [
        float(a) if bool(t) and not math.isnan(float(a)) else None
        for a, t in zip(advantage[:length], trained[:length], strict=True)
    ]


def _nothing(group: GivenGroup, *, values: bool) -> dict[str, Any]:
    """What a group that the method drops is shown as."""
    names = ("weights", "value_weights") if values else ("weights",)
    trajectories = [{"selected": False, **{name: [0.0] * len(t.source) for name in names}} for t in group.trajectories]
    return {"advantage": [None] * len(group.trajectories), "selected": False, "trajectories": trajectories}


def _selected(method: Method, index: int, group: Group, state: Mapping[str, Any]) -> Group | None:
    known = with_known_rewards(group) if method.plan.scored and method.plan.samples else group
    chosen = None if known is None else method.select(known, state)
    if chosen is not None and not chosen.trajectories:
        if method.plan.needs_expert == "demonstration" and not group.by(Source.EXPERT):
            raise UserError(
                f"method {method.name} needs a demonstration in groups.{index}, which has none: give a trajectory whose answer is "
                "tagged `expert`"
            )
        raise UserError(
            f"method {method.name} finds nothing in groups.{index} to train on, where a run always has something: its `source` and "
            "`reward` are not those of a group that the method collects"
        )
    paired = bool(method.terms) and all("pairs" in term.per.counts for term in method.terms)
    if chosen is not None and paired and (len(chosen.trajectories) != 2 or len({t.reward for t in chosen.trajectories}) != 2):
        got = ", ".join("none" if t.reward is None else f"{t.reward:g}" for t in chosen.trajectories)
        raise UserError(
            f"method {method.name} compares two answers of unequal reward in every group; groups.{index} comes to {got}"
            f"{' (its own answers have 0)' if method.plan.reward is not None else ''}"
        )
    return chosen


def _batch_of(groups: Sequence[Group], *, step: int, seed: int) -> Batch:
    """The rectangle in fp64: rewards, and the ranks that follow from them, are the given numbers."""
    unknown = [replace(g, trajectories=tuple(replace(t, reward=None) for t in g.trajectories)) for g in groups]
    batch = to_batch(unknown, step=step, seed=seed)
    given = [math.nan if t.reward is None else t.reward for g in groups for t in g.trajectories]
    reward = torch.tensor(given, dtype=torch.float64)
    known = reward.nan_to_num(nan=-math.inf)
    better = (batch.group[:, None] == batch.group[None, :]) & (known[None, :] > known[:, None])
    return replace(batch, reward=reward, rank=better.sum(dim=1), advantage=batch.advantage.double())


def _credited(method: Method, batch: Batch) -> Tensor:
    """[B, T] bool: the tokens of terms that read the method's advantage; -log pi has one of its own, which is 1."""
    read = torch.zeros_like(batch.trained)
    for term in method.terms:
        read |= term.on(batch) & ((batch.advantage == 1) | ("advantage" not in term.slots))
    return read


def _whole(method: Method, names: Iterable[str]) -> UserError:
    return UserError(
        f"method {method.name} looks at the whole next-token distribution ({', '.join(sorted(names))}): log-probs of single tokens "
        f"cannot show what it does; {_with_a_model(method)}"
    )


def _with_a_model(method: Method) -> str:
    return f"`crosstrain explain {method.name} --model MODEL --data FILE` (or --task NAME) takes the step with a model instead"


def _with_columns(method: Method, batch: Batch, at: Sequence[tuple[int, int]], rows: Sequence[GivenTrajectory]) -> Batch:
    """The batch with what the trajectories bring and what the method makes of it."""
    built = set(method.columns)
    for name in PER_TOKEN:
        lists = [getattr(t, name) for t in rows]
        absent = [f"groups.{i}.trajectories.{k}" for (i, k), values in zip(at, lists, strict=True) if values is None]
        if name in method.needs and name not in OLD and absent:
            raise UserError(f"method {method.name} needs `{name}`, which is absent from {', '.join(absent[:5])}")
        if absent and len(absent) < len(rows):
            raise UserError(
                f"`{name}` is in some trajectories and absent from {', '.join(absent[:5])}; give it everywhere or nowhere"
            )
        if not absent:
            batch = batch.with_columns(**{name: _rectangle(batch, [x or [] for x in lists])})
    if "old_value" in method.needs and "old_value" not in batch.columns:
        batch = batch.with_columns(old_value=batch.columns["value"])
    missing = method.needs - built - set(batch.columns) - {"old_logp"}
    if missing:
        raise UserError(f"method {method.name} needs {', '.join(sorted(missing))}, which cannot be given here")
    logp = _rectangle(batch, [t.logp for t in rows]).nan_to_num()

    def look(other: Batch, *, of: Weights = "current", channels: Mapping[str, Channel] | None = None) -> Scores:
        if channels:
            raise _whole(method, channels)
        if other is not batch:
            raise UserError(
                f"method {method.name} scores sequences that are not in the batch; log-probs of these are not given: "
                f"{_with_a_model(method)}"
            )
        if of != "current":
            return Scores(batch.columns["ref_logp" if of == "reference" else "teacher_logp"].nan_to_num())
        return Scores(logp, {name: batch.columns[name].nan_to_num() for name in ("entropy", "value") if name in batch.columns})

    for name, build in method.columns.items():
        try:
            batch = batch.with_columns(**{name: build(look, batch)})
        except KeyError as error:  # a channel that the trajectories did not bring
            raise UserError(f"method {method.name} needs `{error.args[0]}`, which is absent from the trajectories") from error
    return batch


def _rectangle(batch: Batch, lists: Sequence[Sequence[float]]) -> Tensor:
    """[B, T] in fp64, NaN wherever nothing is trained."""
    whole = torch.full(batch.tokens.shape, math.nan, dtype=torch.float64)
    for r, values in enumerate(lists):
        whole[r, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return torch.where(batch.trained, whole, torch.full_like(whole, math.nan))
