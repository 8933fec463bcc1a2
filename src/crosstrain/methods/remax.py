"""ReMax: REINFORCE with the reward of the greedy answer as baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from crosstrain.methods.registry import method
from crosstrain.methods.uft import nothing
from crosstrain.objective.advantages import centred_on
from crosstrain.objective.terms import by, reinforce_loss, surrogate, token_sum
from crosstrain.objective.words import says
from crosstrain.types import Batch, Group, Method, Per, Plan, Request, Source, State


@method(
    paper="arXiv:2310.10505",
    family="reinforcement learning",
    deviates="The authors' code also discounts by 0.99 and takes a KL of 0.05 per token off the reward; neither is done here.",
)
def remax(num_generations: int = 1, average: Literal["sequences", "tokens"] = "sequences") -> Method:
    """ReMax: each completion against the one that takes the most likely token everywhere.

    Loss (logged): -sum_t A log pi(y_t) / N over sampled completions, A = R - R(greedy completion of the same prompt). Weight on
    grad log pi: A / N on sampled tokens. The greedy completion costs tokens and is not trained on; a prompt whose greedy
    completion got no reward is dropped.

    average: N counts sequences, the paper's estimator, or all sampled tokens, as the authors' code divides; that code also
    discounts (0.99) and takes a KL of 0.05 per token off the reward, which is not done here.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations: got {num_generations}; it must be at least 1")
    if average not in ("sequences", "tokens"):
        raise ValueError(f"average: got {average!r}; allowed: sequences, tokens")

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if group.trajectories else (Request(num_generations), Request(1, greedy=True))

    term = surrogate(
        "rl",
        on=by(Source.POLICY),
        per=Per(("sequences",)) if average == "sequences" else Per(("own_tokens",)),
        logged=reinforce_loss(token_sum),
        describe="-A log pi",
    )
    return Method(
        terms=(term,),
        plan=Plan(start=nothing, next=following, samples=True),
        select=with_baseline,
        advantage=over_the_greedy_answer,
    )


def with_baseline(group: Group, state: State) -> Group | None:
    """The completions with a reward; None where the greedy one has none, or no other has."""
    known = tuple(t for t in group.trajectories if t.reward is not None)
    greedy = sum(t.greedy for t in known)
    return replace(group, trajectories=known) if greedy == 1 and len(known) > 1 else None


@says("R - R of the greedy completion")
def over_the_greedy_answer(batch: Batch) -> Tensor:
    """reward minus that of the group's greedy completion, [B]."""
    greedy = batch.columns.get("greedy")
    return centred_on(batch, torch.zeros_like(batch.reward, dtype=torch.bool) if greedy is None else greedy > 0)
