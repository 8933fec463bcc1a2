"""NFT: negative-aware fine-tuning, supervised learning on own answers, right and wrong."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosstrain.methods.checks import EQUAL, several
from crosstrain.methods.plans import drop_equal_rewards, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import mean_over, ones
from crosstrain.objective.denominators import old
from crosstrain.types import Batch, Look, Method, On, Per, Scores, Source, Term, Updates, Value

LOWEST = 0.02
"""Share of right answers in a group, and of wrong ones, at least: the authors' code."""

LARGEST_LOG_RATIO = 10.0


@method(
    paper="arXiv:2505.18116",
    family="supervised",
    direction="(SFT ->) RL",
    fails=(
        "At one optimizer step per batch it has the gradient of Dr. GRPO or GRPO, whichever its weight is of "
        "(arXiv:2505.18116)."
    ),
)
def nft(
    num_generations: int = 16,
    weight: Literal["centred", "normalised", "none"] = "centred",
    negative: float = 1.0,
    floor: float = 1.0,
    constant: float = 1000.0,
    num_iterations: int = 1,
    minibatches: int = 16,
) -> Method:
    """NFT: raise right answers, and lower wrong ones through the policy that would have given only them.

    Loss: with q the share of right answers (reward above 0) in a group, within [0.02, 0.98], R = pi / pi_old per token and w a
    weight of the group, summed over tokens and divided by `constant`,
        right answers    -w log R
        wrong answers    -negative w log max((1 - q R) / (1 - q), floor)
    where log R is cut at 10, as in the authors' code.
    Weight on grad log pi: w on right answers' tokens, -negative w q R / ((1 - q) max((1 - q R) / (1 - q), floor)) on wrong ones',
    since the floor lets the gradient through; 0 where log R is cut. Groups whose rewards are all equal are dropped.

    weight: of a group: w = 1 - q ("centred": at R = 1 Dr. GRPO's direction), sqrt((1 - q) / q) ("normalised": GRPO's) or 1.
    negative: how much wrong answers count; 0 is rejection sampling. constant: what the authors' code divides by, whatever the
    batch. floor: a lower bound; 1 in the authors' code, so that a wrong token's gradient does not shrink as R grows.
    """
    if weight not in ("centred", "normalised", "none"):
        raise ValueError(f"weight: got {weight!r}; allowed: centred, normalised, none")
    if negative < 0 or floor <= 0 or constant <= 0:
        raise ValueError(
            f"got negative={negative}, floor={floor}, constant={constant}; negative must be 0 or more, the others positive"
        )
    several(num_generations, EQUAL)
    per = Per((), constant=constant)
    needs = frozenset({"old_logp", "solved"})
    terms = [
        Term("right", _right(weight), own(right=True), per, needs=needs, describe="-w log(pi / old)"),
        Term(
            "wrong",
            _wrong(weight, floor),
            own(right=False),
            per,
            negative,
            needs=needs,
            describe="-w log max((1 - q R) / (1 - q), floor), R = pi / old",
        ),
    ]
    return Method(
        terms=tuple(terms if negative > 0 else terms[:1]),
        plan=rollouts(num_generations),
        select=drop_equal_rewards,
        advantage=ones,
        columns={"solved": solved},
        updates=Updates(num_iterations, minibatches),
    )


def solved(look: Look, batch: Batch) -> Tensor:
    """[B]: the share of right answers in each row's group, within [0.02, 0.98]."""
    share = mean_over(batch, (batch.reward > 0).to(batch.reward), torch.ones_like(batch.reward, dtype=torch.bool))
    return share.clamp(LOWEST, 1 - LOWEST).to(batch.reward)


def own(right: bool) -> On:
    """Own tokens of right answers (reward above 0), or of wrong ones."""
    return lambda batch: batch.written_by(Source.POLICY) & ((batch.reward > 0) == right)[:, None]


def _weight(kind: str, share: Tensor) -> Tensor:
    return {"centred": 1 - share, "normalised": ((1 - share) / share).sqrt(), "none": torch.ones_like(share)}[kind]


def _log_ratio(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
    return (scores.logp - old(scores.logp, batch, on)).clamp(max=LARGEST_LOG_RATIO)


def _right(kind: str) -> Value:
    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return -_weight(kind, batch.columns["solved"])[:, None].to(scores.logp) * _log_ratio(scores, batch, on)

    return value


def _wrong(kind: str, floor: float) -> Value:
    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        q = batch.columns["solved"][:, None].to(scores.logp)
        rest = (1 - q * _log_ratio(scores, batch, on).exp()) / (1 - q)
        floored = rest + (rest.clamp(min=floor) - rest).detach()
        return -_weight(kind, q) * floored.log()

    return value
