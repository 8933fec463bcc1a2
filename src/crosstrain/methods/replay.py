"""Replay of own successes beside new rollouts (ExGRPO)."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from crosstrain.methods.checks import positive, several
from crosstrain.methods.memory import as_json, name_of, replayed, solve_rate
from crosstrain.methods.plans import keyed_uniforms
from crosstrain.methods.registry import method
from crosstrain.methods.uft import next_step, nothing
from crosstrain.objective.advantages import centred
from crosstrain.objective.denominators import shaped_behaviour
from crosstrain.objective.terms import surrogate, unclipped
from crosstrain.types import Batch, ById, Group, Method, Per, Plan, Request, Scores, Source, State, Updates, Value


@method(
    paper="arXiv:2510.02245",
    family="reinforcement learning",
    checked="reconstructed",
    works="Reported to add 3.5 points on mathematics and 7.6 elsewhere to the same RL without replay on models of 1.5B to 8B, and "
    "to keep weak models from collapsing (arXiv:2510.02245).",
    deviates="Settings are those of the authors' launch script; the formulas were put together from their README, that script and "
    "descriptions by others. Of a prompt's remembered rollouts the one that was likeliest when it was sampled is replayed, where "
    "the paper computes the lowest entropy under the current policy. A prompt that is always solved leaves the memory until it is "
    "partly solved again; the authors retire it. Divided by the tokens of the step where they sum over a constant length; no "
    "entropy bonus.",
)
def replay(
    num_generations: int = 8,
    replay_ratio: float = 0.5,
    start_rate: float = 0.35,
    gamma: float = 0.1,
    target_rate: float = 0.5,
    rate_std: float = 1.0,
    per_prompt: int = 4,
    capacity: int = 1024,
    solved_above: float = 0.0,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """Experience replay (ExGRPO): a remembered success of a partly solved prompt beside new rollouts of it.

    Of a step's prompts replay_ratio come from the memory: each of these groups is one remembered rollout and num_generations - 1
    new ones. Remembered are the last per_prompt successes (reward > solved_above) of prompts that are solved sometimes, and the
    share of rollouts that was solved last; of these prompts the `capacity` seen last. Prompts are drawn from the memory by that
    share: a share by a normal density around target_rate with rate_std, then a prompt of that share.

    Loss, summed over the tokens of both kinds and divided by all of them:
        new rollouts        -A r                  r = pi / pi_old
        replayed rollouts   -A w / (w + gamma)    w = pi / b, b what the token's probability was when it was sampled
    with A = R - group mean over both kinds, no std and no clip. Weight on grad log pi: r A / N on new tokens, A gamma w / (w +
    gamma)^2 / N on replayed ones.

    replay_ratio: the share of a step's prompts that come from the memory. start_rate: replay begins after the first step in which
    this share of rollouts is solved. gamma: the constant in w / (w + gamma), 0.1 as in LUFFY. target_rate: the solve rate that is
    likeliest to be drawn. rate_std: how far from it others are drawn, as a standard deviation. per_prompt: successes that are
    remembered of a prompt at most. capacity: prompts that are remembered at most.
    """
    several(num_generations, "one of a group is replayed")
    if not 0 < replay_ratio <= 1 or not 0 <= start_rate <= 1 or not 0 <= target_rate <= 1:
        raise ValueError(
            f"got replay_ratio={replay_ratio}, start_rate={start_rate}, target_rate={target_rate}; they must be in [0, 1], and "
            "replay_ratio above 0"
        )
    if rate_std <= 0 or per_prompt < 1 or capacity < 1:
        raise ValueError(f"got rate_std={rate_std}, per_prompt={per_prompt}, capacity={capacity}; they must be positive")

    positive(gamma=gamma)

    def following(group: Group, state: State) -> Sequence[Request]:
        new = [t for t in group.by(Source.POLICY) if not t.replayed]
        return () if new else (Request(num_generations - len(group.trajectories)),)

    def recall(state: State, by_id: ById) -> Sequence[Group]:
        if not state["active"]:
            return ()
        names = draw(state, round(replay_ratio * state["batch_size"]), target_rate, rate_std)
        found = [(by_id(name), state["memory"][name]) for name in names]
        return [  # a memory of an earlier version has no streams
            Group(e, (replayed(likeliest(known["kept"]), e),), known.get("stream", e.id.rpartition(":")[0]))
            for e, known in found
        ]

    def remember(state: State, groups: Sequence[Group]) -> State:
        memory = dict(state["memory"])
        rates = [(g, rate) for g in groups if (rate := solve_rate(g, solved_above)) is not None]
        for group, rate in rates:
            name = name_of(group.example)
            kept = memory.pop(name, {"kept": []})["kept"]
            new = [as_json(t) for t in group.by(Source.POLICY) if t.reward is not None and t.reward > solved_above]
            if rate < 1 and (kept or new):
                kept = [*kept, *new][-per_prompt:]
                memory[name] = {"rate": rate, "seen": state["step"], "kept": kept, "stream": group.stream}
        latest = sorted(memory, key=lambda name: (-memory[name]["seen"], name))[:capacity]
        solved = statistics.fmean(rate for _, rate in rates) if rates else 0.0
        return {
            **state,
            "memory": {name: memory[name] for name in latest},
            "active": state["active"] or solved >= start_rate,
        }

    per = Per(("all_tokens",))
    return Method(
        terms=(
            unclipped("rl", on=new, per=per),
            surrogate(
                "replay",
                on=remembered,
                per=per,
                denominator=shaped_behaviour(gamma),
                needs=frozenset({"behaviour_logp"}),
                logged=_shaped_loss(gamma),
                describe=f"-A w / (w + {gamma:g}), w = pi / behaviour",
            ),
        ),
        plan=Plan(start=nothing, next=following, samples=True, recall=recall),
        advantage=centred,
        updates=Updates(num_iterations, minibatches),
        init=lambda: {"step": 0, "active": False, "memory": {}},
        update=next_step,
        remember=remember,
    )


def new(batch: Batch) -> Tensor:
    """[B, T] bool: tokens of this step's own rollouts."""
    return batch.written_by(Source.POLICY) & ~_rows(batch)


def remembered(batch: Batch) -> Tensor:
    """[B, T] bool: own tokens of replayed rollouts."""
    return batch.written_by(Source.POLICY) & _rows(batch)


def _rows(batch: Batch) -> Tensor:
    return batch.columns.get("replayed", torch.zeros_like(batch.reward))[:, None] > 0


def draw(state: State, n: int, target: float, std: float) -> list[str]:
    """`n` prompts of the memory that are partly solved, all of them where there are fewer; none twice.

    Each time a solve rate is drawn, by a normal density over those that prompts are left of, and then one of its prompts.
    """
    left: dict[float, list[str]] = {}
    for name, known in sorted(state["memory"].items()):
        if known["rate"] > 0:
            left.setdefault(known["rate"], []).append(name)
    drawn: list[str] = []
    while left and len(drawn) < n:
        u, v = keyed_uniforms(2, "replay", state["seed"], state["step"], len(drawn))
        rates = sorted(left)
        up_to = list(accumulate(math.exp(-(((rate - target) / std) ** 2) / 2) for rate in rates))
        rate = rates[min(bisect_right(up_to, u * up_to[-1]), len(rates) - 1)]
        drawn.append(left[rate].pop(int(v * len(left[rate]))))
        if not left[rate]:
            del left[rate]
    return drawn


def likeliest(kept: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The rollout of the highest mean log-prob per own token when it was sampled; the first of those that are equal."""
    return max(kept, key=lambda one: statistics.fmean(x for x in one["behaviour_logp"] if x is not None))


def _shaped_loss(gamma: float) -> Value:
    """-A w / (w + gamma) per token, the published loss."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        w = torch.exp(scores.logp - batch.columns["behaviour_logp"].to(scores.logp.dtype))
        return -batch.advantage * w / (w + gamma)

    return value
