"""Supervised fine-tuning with a trust region or importance weights: PSFT and iw-SFT."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from crosstrain.methods.checks import clip, inert
from crosstrain.methods.plans import demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.denominators import Denominator
from crosstrain.objective.terms import by, clipped, surrogate
from crosstrain.objective.words import says
from crosstrain.types import Batch, Method, Per, Scores, Source, Updates


@method(
    paper="arXiv:2508.17784",
    family="supervised",
    fails="With one optimizer step per batch it is plain imitation: the clip needs several (arXiv:2508.17784).",
)
def psft(epsilon: float = 0.2, epsilon_high: float = 0.28, num_iterations: int = 1, minibatches: int = 8) -> Method:
    """PSFT (proximal SFT): PPO with an advantage of 1 on the demonstrations' tokens.

    Loss (logged): -sum_t min(r, clip(r, 1 - epsilon, 1 + epsilon_high)) / N over all supervised tokens, r = pi / pi_old, pi_old the
    policy at the start of the batch. Weight on grad log pi: r / N where r <= 1 + epsilon_high, else 0; the lower bound never acts.

    epsilon: the lower bound of the clip, which never acts, as A is 1. epsilon_high: the upper bound of the clip, 0.28 in the
    authors' code. minibatches: the paper's 64 examples in eight optimizer steps. With one, r = 1 and this is `sft`.
    """
    clip(epsilon=epsilon, high=epsilon_high)
    term = clipped(
        "demo",
        epsilon,
        epsilon_high,
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        describe="-min(r, clip(r)), r = pi / old",
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones, updates=Updates(num_iterations, minibatches))


@method(
    paper="arXiv:2507.12856",
    family="supervised",
    deviates=(
        "The default weight is the paper's ratio of trajectories; the authors' code takes the exponential of the mean "
        'log-ratio, which is the setting "mean". The bound of 16 is theirs. Their variant by token has no temperature, here '
        "one may be set."
    ),
)
def iw_sft(
    weight: Literal["sequence", "mean", "token"] = "sequence", temperature: float = 1.0, highest: float = 16.0
) -> Method:
    """iw-SFT: demonstrations that the policy has come to like better than its start count more.

    Loss (logged): -sum_t sg(w) log pi(y_t) / N over all supervised tokens, with d = log pi - log ref and, for each demonstration,
        sequence    w = exp(temperature sum_t d), the paper's ratio of trajectories
        mean        w = exp(temperature mean_t d), what the authors' code computes
        token       w = exp(temperature d) of each token, within [0.2, 1.8] (a variant in the authors' code)
    the first two at most `highest`. Weight on grad log pi: w / N.

    weight: which of these w; "sequence" is the paper's. temperature: the factor in the exponent; 1 as the authors launch it; 2 is
    their code's default. highest: the largest w; 16 in the authors' code.

    The reference is the model that the
    stage started from, so that the first step is `sft`.
    """
    if weight not in ("sequence", "mean", "token"):
        raise ValueError(f"weight: got {weight!r}; allowed: sequence, mean, token")
    if temperature <= 0 or highest <= 0:
        raise ValueError(f"got temperature={temperature}, highest={highest}; both must be positive")
    if weight == "token":
        inert("weight is 'token', whose bounds are 0.2 and 1.8", highest=(highest, 16.0))
    den = _reweighted(weight, temperature, highest)

    def published(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        logp = scores.logp
        return -(logp - den(logp, batch, on)).exp() * logp

    term = surrogate(
        "demo",
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        denominator=den,
        unit="sequence",
        logged=published,
        needs=frozenset({"ref_logp"}),
        describe=f"-sg(w) log pi, w = exp({weight} of log pi - log ref)",
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones, reference="stage_start")


def _reweighted(weight: str, temperature: float, highest: float) -> Denominator:
    """pi / w: every token's ratio is w."""

    of = {"sequence": "the sequence's sum of d", "mean": "the sequence's mean of d", "token": "d"}[weight]
    bounds = "from 0.2 to 1.8" if weight == "token" else f"at most {highest:g}"

    @says(f"pi / w, with w = exp({temperature:g} times {of}) {bounds}, d = log pi - log ref")
    def log_den(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        d = logp - batch.columns["ref_logp"]
        if weight == "token":
            log_w = (temperature * d).clamp(math.log(0.2), math.log(1.8))
        else:
            total = d.sum(dim=1, keepdim=True)
            mean = total / on.sum(dim=1, keepdim=True)
            log_w = (temperature * (total if weight == "sequence" else mean)).clamp(max=math.log(highest))
        return logp - log_w

    return log_den
