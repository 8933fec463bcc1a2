"""CHORD: reinforcement learning with demonstrations of other prompts beside it, whose weight falls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from crosstrain.methods.checks import at_least, clip
from crosstrain.methods.plans import rollouts_and_demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.denominators import uncertain
from crosstrain.objective.schedules import warmup_cosine
from crosstrain.objective.terms import by, clipped, nll, surrogate
from crosstrain.objective.words import says
from crosstrain.types import Batch, Group, Method, Per, Schedule, Scores, Source, State, Term, Updates


@method(
    paper="arXiv:2508.11408",
    family="hybrid",
    fails="Unweighted imitation beside RL made entropy jump (arXiv:2508.11408).",
    deviates="mu decays over 200 steps, as the paper's text says; its appendix says 30, the authors' example 400.",
)
def chord_mu(
    num_generations: int = 8,
    mu: float = 0.9,
    mu_valley: float = 0.05,
    mu_warmup_steps: int = 0,
    mu_decay_steps: int = 200,
    demonstration_share: float = 2 / 3,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    rollouts_from: str = "rl",
    demonstrations_from: str = "demos",
) -> Method:
    """CHORD-mu: from imitation to reinforcement learning by a coefficient that falls.

    Loss: (1 - mu) times GRPO's clipped loss over all tokens of own rollouts, plus mu times -log pi averaged over all tokens of
    demonstrations; mu falls from its start to mu_valley along half a cosine. Weight on grad log pi: (1 - mu) gate r A / N_own and
    mu / N_demo, with r = pi / pi_old and the group-normalised A of `grpo` over rollouts alone.

    mu: the coefficient that imitation starts with, 0.9 in the paper. mu_valley: the one that it falls to, 0.05 in the paper.
    mu_warmup_steps: steps over which mu first rises from 0; none in the paper. mu_decay_steps: 200 in the paper's text, 30 in its
    appendix, 400 in the authors' example. rollouts_from, demonstrations_from: the data streams, whose prompts need not be the same;
    with one name for both, each row gives both. demonstration_share: the share of demonstrations in the step's examples; 64
    demonstrations beside 32 prompts in the paper.
    """
    _check(mu=mu, mu_valley=mu_valley)
    if mu_valley > mu:
        raise ValueError(f"mu_valley: got {mu_valley} with mu={mu}; mu falls to it, so that it must not be above mu")
    at_least(0, mu_warmup_steps=mu_warmup_steps)
    at_least(1, mu_decay_steps=mu_decay_steps)
    return _chord(
        demonstration=nll("demo", on=by(Source.EXPERT), per=Per(("own_tokens",)), coef=1.0),
        mu=warmup_cosine(mu, mu_valley, mu_warmup_steps, mu_decay_steps),
        epsilon=epsilon,
        updates=Updates(num_iterations),
        plan=(num_generations, demonstration_share, rollouts_from, demonstrations_from),
    )


@method(
    paper="arXiv:2508.11408",
    family="hybrid",
    works=(
        "A weak 3B model that plain imitation of 5,000 long demonstrations made collapse kept learning with it "
        "(arXiv:2508.11408)."
    ),
)
def chord_phi(
    num_generations: int = 8,
    mu: float = 0.1,
    demonstration_share: float = 2 / 3,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    rollouts_from: str = "rl",
    demonstrations_from: str = "demos",
) -> Method:
    """CHORD-phi: as `chord_mu` with a constant mu, and demonstrations weighted by p (1 - p).

    Loss (logged): as `chord_mu`'s, but for the demonstrations' part, which is -sg(p (1 - p)) log pi over all their tokens.
    Weight on grad log pi: (1 - mu) gate r A / N_own, and mu p (1 - p) / N_demo on demonstrations, which leaves alone what the
    policy is sure of, right or wrong.

    mu: constant, 0.1 in the paper. demonstration_share, rollouts_from, demonstrations_from: as for `chord_mu`.
    """

    _check(mu=mu)

    def published(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        p = scores.logp.exp()
        return -p * (1 - p) * scores.logp

    return _chord(
        demonstration=surrogate(
            "demo",
            on=by(Source.EXPERT),
            per=Per(("own_tokens",)),
            denominator=uncertain,
            logged=published,
            describe="-sg(p (1 - p)) log pi",
        ),
        mu=lambda step: mu,
        epsilon=epsilon,
        updates=Updates(num_iterations),
        plan=(num_generations, demonstration_share, rollouts_from, demonstrations_from),
    )


def _chord(*, demonstration: Term, mu: Schedule, epsilon: float, updates: Updates, plan: tuple[int, float, str, str]) -> Method:
    clip(epsilon=epsilon)
    n, share, own, demos = plan
    rl = clipped(
        "rl",
        epsilon,
        epsilon,
        on=by(Source.POLICY),
        per=Per(("own_tokens",)),
        coef=lambda step: 1 - mu(step),
    )

    return Method(
        terms=(rl, replace(demonstration, coef=mu)),
        plan=rollouts_and_demonstrations(n, share, own, demos),
        select=only_rollouts(own, demos),
        advantage=of_rollouts_and_demonstrations,
        updates=updates,
    )


def only_rollouts(own: str, demos: str) -> Callable[[Group, State], Group | None]:
    """A select that leaves out what the rows of the rollouts' stream demonstrate, unless it is the demonstrations' stream too."""

    def select(group: Group, state: State) -> Group | None:
        return group.only(Source.POLICY) if group.stream == own != demos else group

    return select


@says("(R - mean R) / std R over the group's rollouts, 1 on demonstrations")
def of_rollouts_and_demonstrations(batch: Batch) -> Tensor:
    """[B, T]: the reward normalised over the group's rollouts on their tokens, 1 on demonstrations."""
    own = group_normalised(batch, over=(Source.POLICY,))[:, None].expand(batch.source.shape)
    return torch.where(batch.source == int(Source.EXPERT), torch.ones_like(own), own)


def _check(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}; it must be from 0 to 1")
