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
from crosstrain.objective.returns import kl_penalty, returns_to_go, token_rewards
from crosstrain.objective.terms import by, reinforce_loss, surrogate, token_sum
from crosstrain.objective.words import says
from crosstrain.types import Batch, Group, Method, Per, Plan, Request, Source, State

PENALTY = "kl_penalty"
"""The column of what a KL takes off each token's credit."""


@method(
    paper="arXiv:2310.10505",
    family="reinforcement learning",
    deviates="The authors' code also clips R - R_greedy to [-5, 5] and samples with top-p 0.9; both are left to the recipe.",
)
def remax(
    num_generations: int = 1,
    average: Literal["sequences", "tokens"] = "sequences",
    kl_coef: float = 0.0,
    gamma: float = 1.0,
) -> Method:
    """ReMax: each completion against the one that takes the most likely token everywhere.

    Loss (logged): -sum_t A log pi(y_t) / N over sampled completions, A = R - R(greedy completion of the same prompt). Weight on
    grad log pi: A / N on sampled tokens. The greedy completion costs tokens and is not trained on; a prompt whose greedy
    completion got no reward is dropped.

    average: what N counts: sequences, the paper's estimator, or all sampled tokens, as the authors' code divides. kl_coef, gamma:
    as in that code, A of the k-th of n tokens is gamma^(n - k + 1) (R - R_greedy) - kl_coef (log pi_old - log ref), pi_old the
    policy that sampled, each token paying its own KL only; its scripts have 0.05 and 0.99, the paper's estimator neither.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations: got {num_generations}; it must be at least 1")
    if average not in ("sequences", "tokens"):
        raise ValueError(f"average: got {average!r}; allowed: sequences, tokens")
    if kl_coef < 0 or not 0 < gamma <= 1:
        raise ValueError(f"got kl_coef={kl_coef}, gamma={gamma}; kl_coef must be 0 (no KL) or positive and gamma in (0, 1]")

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if group.trajectories else (Request(num_generations), Request(1, greedy=True))

    term = surrogate(
        "rl",
        on=by(Source.POLICY),
        per=Per(("sequences",)) if average == "sequences" else Per(("own_tokens",)),
        logged=reinforce_loss(token_sum),
        needs=frozenset({"ref_logp", PENALTY}) if kl_coef > 0 else frozenset(),
        describe="-A log pi",
    )

    def discounted(batch: Batch) -> Tensor:
        credit = gamma * returns_to_go(batch, token_rewards(batch, over_the_greedy_answer(batch)), gamma)
        return credit if kl_coef == 0 else credit - batch.columns[PENALTY].to(credit)

    return Method(
        terms=(term,),
        plan=Plan(start=nothing, next=following, samples=True),
        select=with_baseline,
        advantage=over_the_greedy_answer if kl_coef == 0 and gamma == 1 else discounted,
        columns={PENALTY: lambda look, batch: kl_penalty(look, batch, kl_coef)} if kl_coef > 0 else {},
        reference="stage_start",
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
