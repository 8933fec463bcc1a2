"""Clip-Cov and KL-Cov: hold back the few tokens whose log-prob and advantage rise together, which is what makes entropy fall."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crosstrain.methods.checks import EQUAL, several
from crosstrain.methods.plans import drop_equal_rewards, keyed_uniforms, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.denominators import old
from crosstrain.objective.terms import by, clipped, unclipped
from crosstrain.objective.words import says
from crosstrain.types import Batch, Look, Method, Per, Scores, Source, Term, Updates

CHOSEN = "covariant"
"""The column that says which tokens were chosen: 1, else 0."""


@method(
    paper="arXiv:2505.22617",
    family="reinforcement learning",
    works=(
        "Kept entropy up and scored higher than its baseline: with `kl_cov`, 2.0 percent on average for a 7B model and 6.4 "
        "for a 32B one (arXiv:2505.22617)."
    ),
    deviates=(
        "Tokens are chosen once per batch, with the policy that sampled it; the authors' code chooses anew, and takes its means "
        "and counts, in every micro-batch."
    ),
)
def clip_cov(
    num_generations: int = 8,
    ratio: float = 2e-4,
    lowest: float = 1.0,
    highest: float = 5.0,
    epsilon: float = 1.0,
    num_iterations: int = 1,
    minibatches: int = 8,
) -> Method:
    """Clip-Cov: a random few of the tokens with a high covariance get no gradient.

    Loss: sum_t m_t max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon)) / N over all tokens of groups whose rewards differ, r = pi /
    pi_old and the group-normalised A of `grpo`; m is 0 for `ratio` of all tokens (at least one), drawn from those whose (A - mean
    A) (log pi - mean log pi) lies between `lowest` and `highest`. Weight on grad log pi: m gate A r / N.

    ratio: the share of all tokens that is held back, the authors'. lowest, highest: the bounds between which a covariance must lie,
    1 and 5 in the authors' scripts. epsilon: the bound of PPO's clip, which the authors' scripts open to 1: it acts on ratios above
    2 alone.
    """
    if not 0 < ratio < 1 or lowest >= highest:
        raise ValueError(
            f"got ratio={ratio}, lowest={lowest}, highest={highest}; ratio must be in (0, 1) and lowest below highest"
        )
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon: got {epsilon}; it must be in (0, 1]")

    def choose(covariance: Tensor, batch: Batch, on: Tensor) -> Tensor:
        candidates = on & (covariance > lowest) & (covariance < highest)
        n = max(int(ratio * int(on.sum())), 1)
        drawn = _uniform(batch).to(covariance)
        return _smallest(torch.where(candidates, drawn, torch.full_like(drawn, 2.0)), n) & candidates

    @says("0 on a few tokens of high covariance, else 1")
    def let_go(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return 1 - batch.columns[CHOSEN].to(logp.dtype)

    term = clipped(
        "rl",
        epsilon,
        epsilon,
        on=by(Source.POLICY),
        per=Per(("own_tokens",)),
        corrected=let_go,
        needs=frozenset({CHOSEN}),
        describe="max(-A r, -A clip(r)), r = pi / old, not on a few tokens of high covariance",
    )
    return _made((term,), choose, num_generations, Updates(num_iterations, minibatches))


@method(
    paper="arXiv:2505.22617",
    family="reinforcement learning",
    works=(
        "Kept entropy up and scored higher than its baseline: with `clip_cov`, 2.0 percent on average for a 7B model and "
        "6.4 for a 32B one (arXiv:2505.22617)."
    ),
    deviates=(
        "Tokens are chosen once per batch, with the policy that sampled it; the authors' code chooses anew, and takes its means "
        "and counts, in every micro-batch. verl's own defaults are "
        "other ones: a ratio of 2e-4 and a beta of 0.1."
    ),
)
def kl_cov(
    num_generations: int = 8, ratio: float = 2e-3, beta: float = 1.0, num_iterations: int = 1, minibatches: int = 8
) -> Method:
    """KL-Cov: the tokens with the highest covariance are held near the old policy.

    Loss: sum_t -A r + c_t beta |log pi - log pi_old| over all tokens of groups whose rewards differ, divided by their number N,
    with r = pi / pi_old and the group-normalised A of `grpo`; c is 1 for the `ratio` of all tokens (at least one) with the highest
    (A - mean A) (log pi - mean log pi). Weight on grad log pi: (A r - c beta sign(log pi - log pi_old)) / N. No PPO clip anywhere.

    ratio: the share of all tokens that is held; 2e-3 is the authors' for 7B models, 2e-4 for 32B. beta: how much the KL counts, 1
    in the authors' scripts (0.1 is the default of verl's code).

    With one optimizer step per batch the second part has no gradient.
    """
    if not 0 < ratio < 1 or beta <= 0:
        raise ValueError(f"got ratio={ratio}, beta={beta}; ratio must be in (0, 1) and beta positive")

    def choose(covariance: Tensor, batch: Batch, on: Tensor) -> Tensor:
        n = max(int(ratio * int(on.sum())), 1)
        return _smallest(torch.where(on, -covariance, torch.full_like(covariance, torch.inf)), n) & on

    def penalty(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return batch.columns[CHOSEN] * (scores.logp - old(scores.logp, batch, on)).abs()

    per = Per(("own_tokens",))
    rl = unclipped("rl", on=by(Source.POLICY), per=per)
    kl = Term(
        "kl",
        penalty,
        by(Source.POLICY),
        per,
        beta,
        needs=frozenset({"old_logp", CHOSEN}),
        describe="|log pi - log old| on a few tokens of high covariance",
    )
    return _made((rl, kl), choose, num_generations, Updates(num_iterations, minibatches))


Choose = Callable[[Tensor, Batch, Tensor], Tensor]
"""Which tokens, [B, T] bool, by their covariance [B, T] and the own tokens of the batch, [B, T] bool."""


def _made(terms: tuple[Term, ...], choose: Choose, n: int, updates: Updates) -> Method:
    several(n, EQUAL)

    def build(look: Look, batch: Batch) -> Tensor:
        logp = batch.columns.get("old_logp")  # the policy that sampled, where it is known already
        logp = look(batch).logp if logp is None else logp
        on = by(Source.POLICY)(batch)
        advantage = group_normalised(batch).to(logp)[:, None].expand(logp.shape)
        covariance = (advantage - advantage[on].mean()) * (logp - logp[on].mean())
        return choose(covariance, batch, on).to(logp.dtype)

    return Method(
        terms=terms,
        plan=rollouts(n),
        select=drop_equal_rewards,
        advantage=group_normalised,
        updates=updates,
        columns={CHOSEN: build},
    )


def _smallest(values: Tensor, n: int) -> Tensor:
    """[B, T] bool: the `n` smallest entries."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen.view(-1)[values.flatten().argsort(stable=True)[:n]] = True
    return chosen


def _uniform(batch: Batch) -> Tensor:
    """[B, T]: a number in [0, 1) for every token, from its example and what its row says."""
    texts = [tokens[:n] for tokens, n in zip(batch.tokens.tolist(), batch.length.tolist(), strict=True)]
    drawn = torch.ones(batch.tokens.shape, dtype=torch.float64)
    for r, (example, text) in enumerate(zip(batch.example_ids, texts, strict=True)):
        drawn[r, : len(text)] = torch.tensor(
            keyed_uniforms(len(text), batch.seed, batch.step, example, text), dtype=torch.float64
        )
    return drawn.to(batch.tokens.device)
