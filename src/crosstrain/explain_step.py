"""What a method does to every token of one real step: a model, its rows, its samples, and the training loop's own gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from crosstrain.explain import credit
from crosstrain.training.collect import Collected
from crosstrain.training.columns import no_grad_scores
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine
from crosstrain.training.gradient import PROBE, accumulate, denominators, measure_probes
from crosstrain.training.loop import Progress, draw, make_batch, minibatches, step_seed
from crosstrain.training.optimizer import Optimizer
from crosstrain.types import Batch, Group, Method, Scores, Source, Trajectory, Updates

ROW = "explain_row"
"""The column that says which row of the collected batch a row of a micro-batch is."""

Decode = Callable[[Sequence[int]], str]
"""Tokens to text, special tokens included."""


@dataclass
class Seen:
    """What the loop did to the rows of a batch, added up while it ran.

    weights: of each term, minus its gradient on logp, [B, T]. logp: as the terms saw it, [B, T]. through: of each term, the sum of
    |gradient| on each channel of the scores. losses, counts: of each term, over all updates. steps: updates with anything to do.
    norms: of each term, the norm of its gradient on the parameters, where some term acts through another channel than logp.
    """

    weights: dict[str, Tensor]
    logp: Tensor
    through: dict[str, dict[str, float]]
    losses: dict[str, float] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    norms: dict[str, float] = field(default_factory=dict)

    def note(self, term: str, batch: Batch, scores: Scores, weights: Mapping[str, Tensor]) -> None:
        """Take down what a term does to a micro-batch (a `loop.See`)."""
        rows = batch.columns[ROW].long().cpu()
        self.logp[rows] = scores.logp.detach().to(self.logp)
        for channel, values in weights.items():
            size = float(values.abs().sum())
            if size:
                self.through[term][channel] = self.through[term].get(channel, 0.0) + size
        if "logp" in weights:
            self.weights[term][rows] = weights["logp"].to(self.logp)

    @property
    def unseen(self) -> list[str]:
        """Terms that act through a channel other than logp, whose weights do not show all of what they do."""
        return [term for term, channels in self.through.items() if channels.keys() - {"logp"}]


def explain_step(
    engine: Engine, method: Method, optimizer: Optimizer, decode: Decode, batch_size: int, *, old: Engine | None = None
) -> dict[str, Any]:
    """The first step of a stage as training would take it, nothing updated, and the weight of every token, as JSON holds it.

        method, settings    what ran
        updates             optimizer steps that training would take on these groups; each is divided by its own counts, and here
                            the model does not move between them
        loss                as logged, the mean over updates
        terms               of each: name, loss, denominator (of the first update), tokens, share of all |weight|, reads (what it
                            needs beside logp), and through: the channels of the scores that it acts on (logp, or a functional
                            of the whole next-token distribution)
        sources             share of all |weight| by who wrote the tokens
        unseen              None, or what weights do not show: the terms that act through other channels, and their share of the
                            norms of all terms' gradients
        groups              of each: id, where, stream, prompt, selected, and trajectories, of each: kind, selected, reward,
                            advantage, finished, tokens (text), source, logp, weights, and by_term

    weights[t] = -d loss / d logp[t], divided as in training. old: what sampled the step and gives the old log-probs, where that is
    not the model itself, as in a later update on the same groups.
    """
    progress = Progress(state=method.init())
    torch.manual_seed(step_seed(engine.seed, progress.step))
    collected = draw(old or engine, method, batch_size, progress)
    if not collected.groups:
        return _answer(method, None, None, collected, decode)
    batch, _ = make_batch(old or engine, method, collected, 0, Cost())
    if old is not None and "old_logp" not in batch.columns:
        batch = batch.with_columns(old_logp=no_grad_scores(old, method, batch).logp)
    batch = batch.with_columns(**{ROW: torch.arange(len(batch), device=batch.tokens.device)})
    return _answer(method, batch, measure(engine, method, optimizer, batch, collected), collected, decode)


def measure(engine: Engine, method: Method, optimizer: Optimizer, batch: Batch, collected: Collected) -> Seen:
    """What the updates on a batch with the column ROW do to its tokens: those of one pass over it, with the model as it is."""
    zeros = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    seen = Seen({t.name: zeros.clone() for t in method.terms}, zeros.clone(), {t.name: {} for t in method.terms})
    now = method.at(method.init())
    once = replace(now, updates=Updates(1, method.updates.minibatches))
    first: tuple[Batch, Mapping[str, float]] | None = None
    for minibatch in minibatches(batch, once, engine.seed, 0):
        minibatch = replace(minibatch, step=seen.steps)
        counts = denominators(method, minibatch, collected)
        if not any(counts.values()):
            continue
        engine.model.train()
        meter = accumulate(engine, now, minibatch, counts, optimizer, seen.note)
        seen.steps += 1
        for term in method.terms:
            seen.losses[term.name] = seen.losses.get(term.name, 0.0) + meter.losses.get(term.name, 0.0)
            seen.counts.setdefault(term.name, []).append(counts[term.name])
        first = first or (minibatch, counts)
    if seen.unseen and first is not None:
        probing = replace(now, probes=tuple(PROBE + term.name for term in method.terms))
        found = measure_probes(engine, probing, *first, optimizer)
        seen.norms = {term.name: found[PROBE + term.name] for term in method.terms}
    optimizer.zero_grad()
    engine.model.eval()
    return seen


def _answer(method: Method, batch: Batch | None, seen: Seen | None, collected: Collected, decode: Decode) -> dict[str, Any]:
    terms, sources = _terms(method, batch, seen), _sources(batch, seen)
    return {
        "method": method.name,
        "settings": dict(method.settings),
        "updates": 0 if seen is None else seen.steps,
        "loss": sum(t["loss"] for t in terms),
        "terms": terms,
        "sources": sources,
        "unseen": None if seen is None else _unseen(seen),
        "groups": _groups(method, batch, seen, collected, decode),
    }


def _terms(method: Method, batch: Batch | None, seen: Seen | None) -> list[dict[str, Any]]:
    if batch is None or seen is None or not seen.steps:
        nothing = {"loss": 0.0, "denominator": 0.0, "tokens": 0, "share": 0.0, "through": []}
        return [{"name": t.name, **nothing, "reads": sorted(t.needs)} for t in method.terms]
    sizes = {name: float(w.abs().sum()) for name, w in seen.weights.items()}
    total = sum(sizes.values())
    return [
        {
            "name": t.name,
            "loss": seen.losses[t.name] / seen.steps,
            "denominator": seen.counts[t.name][0],
            "tokens": int(t.on(batch).sum()),
            "share": sizes[t.name] / total if total else 0.0,
            "reads": sorted(t.needs),
            "through": sorted(seen.through[t.name]),
        }
        for t in method.terms
    ]


def _sources(batch: Batch | None, seen: Seen | None) -> dict[str, float]:
    if batch is None or seen is None:
        return {}
    size = torch.stack([w.abs() for w in seen.weights.values()]).sum(dim=0)
    total, source = float(size.sum()), batch.source.cpu()
    shares = {s.name.lower(): float(size[source == int(s)].sum()) for s in (Source.EXPERT, Source.POLICY, Source.TOOL)}
    return {name: share / total for name, share in shares.items() if share} if total else {}


def _unseen(seen: Seen) -> dict[str, Any] | None:
    if not seen.unseen:
        return None
    total = sum(seen.norms.values())
    other = sum(seen.norms[term] for term in seen.unseen)
    mixed = [term for term in seen.unseen if "logp" in seen.through[term]]
    return {"terms": seen.unseen, "mixed": mixed, "share_of_norms": other / total if total else 0.0}


def _groups(
    method: Method, batch: Batch | None, seen: Seen | None, collected: Collected, decode: Decode
) -> list[dict[str, Any]]:
    """Every group that was drawn, with its trajectories in order, those first that the method was given."""
    rows = iter(range(0 if batch is None else len(batch)))
    kept = {(g.stream, g.example.id): [(t, next(rows)) for t in g.trajectories] for g in collected.groups}
    found = []
    for group in collected.rewarded:
        held = list(kept.get((group.stream, group.example.id), []))
        listed: list[dict[str, Any]] = []
        for given in group.trajectories:
            at = next((i for i, (t, _) in enumerate(held) if (t.tokens, t.source) == (given.tokens, given.source)), None)
            t, row = (given, None) if at is None else held.pop(at)
            listed.append(_trajectory(group, t, row, batch, seen, decode))
        listed += [_trajectory(group, t, row, batch, seen, decode) for t, row in held]
        first = group.trajectories[0] if group.trajectories else None
        prompt = group.example.prompt_tokens or (first.tokens[: first.response_start] if first else ())
        found.append(
            {
                "id": group.example.id.partition("@")[0],
                "where": group.example.where,
                "stream": group.stream,
                "prompt": decode(prompt),
                "selected": (group.stream, group.example.id) in kept,
                "trajectories": listed,
            }
        )
    return found


def _trajectory(
    group: Group, t: Trajectory, row: int | None, batch: Batch | None, seen: Seen | None, decode: Decode
) -> dict[str, Any]:
    start = t.response_start
    tokens = {"tokens": pieces(t.tokens[start:], decode), "source": [s.name.lower() for s in t.source[start:]]}
    known = {"kind": kind_of(group, t), "reward": t.reward, "finished": t.finished}
    if row is None or batch is None or seen is None:
        zeros = [0.0] * len(t.response)
        return {
            **known,
            "selected": False,
            "advantage": None,
            **tokens,
            "logp": [None] * len(zeros),
            "weights": zeros,
            "by_term": {},
        }
    end = len(t.tokens)
    trained = batch.trained[row].cpu()
    per_term = {name: (w[row, start:end] + 0.0).tolist() for name, w in seen.weights.items()}
    advantage = credit(batch.advantage[row].cpu(), trained, end)
    scored = zip(seen.logp[row, start:end].tolist(), trained[start:end].tolist(), strict=True)
    return {
        **known,
        "selected": True,
        "advantage": advantage[start:] if isinstance(advantage, list) else advantage,
        **tokens,
        "logp": [x if on else None for x, on in scored],
        "weights": [sum(w) for w in zip(*per_term.values(), strict=True)],
        "by_term": per_term if len(per_term) > 1 else {},
    }


def kind_of(group: Group, t: Trajectory) -> str:
    """What a trajectory is in its group: demonstration, chosen, rejected, or the model's own completion, greedy or after a hint."""
    if t.wrote(Source.POLICY):
        return "greedy completion" if t.greedy else "completion after a hint" if t.wrote(Source.EXPERT) else "completion"
    others = [o.reward for o in group.trajectories if not o.wrote(Source.POLICY) and o.reward is not None]
    if len(others) == 2 and others[0] != others[1]:
        return "chosen" if t.reward == max(others) else "rejected"
    return "demonstration"


def pieces(tokens: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds; empty where a character is not complete until a later one.

    >>> pieces([1, 2], lambda tokens: "ab"[: len(tokens)])
    ['a', 'b']
    """
    found, before = [], ""
    for i in range(len(tokens)):
        text = decode(tokens[: i + 1])
        whole = text.startswith(before) and not (text.endswith("\ufffd") and i + 1 < len(tokens))
        found.append(text[len(before) :] if whole else "")
        before = text if whole else before
    return found
