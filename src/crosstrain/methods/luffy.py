"""LUFFY: learn from own rollouts and one expert answer in the same group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import centred
from crosstrain.objective.denominators import shaped
from crosstrain.objective.terms import by, surrogate, unclipped
from crosstrain.types import Batch, Method, Per, Scores, Source, Updates, Value

Baseline = Literal["group", "rollouts"]
"""Whose mean reward is taken off: that of a group's rollouts and demonstration, or of its rollouts alone."""


@method(
    paper="arXiv:2504.14945",
    family="hybrid",
    direction="(SFT ->) RL",
    works=(
        "With Qwen2.5-Math-7B and 46 thousand demonstrations 55.5 on five mathematics sets, where GRPO had 49.3, "
        "imitation 54.3 and imitation followed by RL 54.5 (table of arXiv:2506.19767)."
    ),
    fails=(
        "With 889 thousand demonstrations imitation followed by RL was better, and how well it did hung on the model it "
        "started from (arXiv:2512.11470)."
    ),
    deviates=(
        "Divided by the tokens of the whole step; the authors' code divides by a constant length per micro-batch and adds "
        "an entropy bonus of 0.001. Its scripts take two optimizer steps per batch (minibatches 2). Read in copies of the "
        "authors' repository."
    ),
)
def luffy(
    num_generations: int = 7,
    gamma: float = 0.1,
    baseline: Baseline = "group",
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """LUFFY: mixed-policy GRPO with policy shaping.

    A group is num_generations own rollouts and the row's demonstration, scored by the same verifier.

    Loss, summed over the
    tokens of both and divided by all of them:
        own tokens      -A r                 r = pi / pi_old
        expert tokens   -A p / (p + gamma)   p = pi, the expert's own density taken as 1
    with A = R - group mean, no std and no clip. Weight: r A on own tokens, A gamma p / (p + gamma)^2 on expert tokens.

    num_generations: 7 rollouts beside the demonstration, as in the authors' code. gamma: the probability at which shaping is
    strongest, 0.1 in the authors' code. baseline: "group" takes the mean over rollouts and demonstration together, as in the paper
    and in the authors' scripts; "rollouts" over rollouts only, which their code offers too (with all rollouts wrong, the
    demonstration then has A = 1 and the rollouts 0).
    """
    per = Per(("all_tokens",))
    return Method(
        terms=(
            unclipped("rl", on=by(Source.POLICY), per=per),
            surrogate(
                "demo",
                on=by(Source.EXPERT),
                per=per,
                denominator=shaped(gamma),
                logged=_shaped_loss(gamma),
                describe=f"-A p / (p + {gamma:g})",
            ),
        ),
        plan=rollouts(num_generations, with_demonstration=True),
        advantage=centred_by(baseline),
        updates=Updates(num_iterations, minibatches),
    )


def centred_by(baseline: Baseline) -> Callable[[Batch], Tensor]:
    """R less its mean over the group, or over the group's rollouts."""
    if baseline not in ("group", "rollouts"):
        raise ValueError(f"baseline: got {baseline!r}; allowed: group, rollouts")
    over = (Source.POLICY, Source.EXPERT) if baseline == "group" else (Source.POLICY,)
    return functools.partial(centred, over=over)


def _shaped_loss(gamma: float) -> Value:
    """-A p / (p + gamma) per token, the published loss."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        p = scores.logp.exp()
        return -batch.advantage * p / (p + gamma)

    return value
