"""Supervised fine-tuning and its probability-weighted form: imitate demonstrations."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from crosstrain.methods.plans import demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.denominators import one
from crosstrain.objective.terms import by, nll, seq_mean, surrogate, token_sum
from crosstrain.types import Batch, Method, Per, Scores, Source


@method(paper="arXiv:2109.01652", family="supervised")
def sft(average: Literal["tokens", "sequences"] = "tokens") -> Method:
    """Supervised fine-tuning: the demonstrations' mean negative log-likelihood.

    Loss: -sum_t log pi(y_t) / N. average: "tokens" divides by all supervised tokens of the step, so long answers weigh more;
    "sequences" gives every demonstration the same weight. Weight on grad log pi: 1 / N, or 1 / (T_i N).
    """
    if average not in ("tokens", "sequences"):
        raise ValueError(f"average: got {average!r}; allowed: tokens, sequences")
    by_token = average == "tokens"
    term = nll(
        "demo",
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)) if by_token else Per(("sequences",)),
        normalise=token_sum if by_token else seq_mean,
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones)


@method(paper="arXiv:2508.05629", family="supervised")
def dft() -> Method:
    """Dynamic fine-tuning: supervised fine-tuning weighted by the token's own probability.

    Loss (logged): -sum_t sg(p_t) log p_t / N over all supervised tokens. Its gradient is that of -sum_t p_t / N: the primitive
    with denominator 1. Weight on grad log pi: p_t / N. Good where the demonstration is one of many right answers, bad for
    teaching new facts (the authors' README).
    """

    def published(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return -scores.logp.exp() * scores.logp

    term = surrogate(
        "demo",
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        denominator=one,
        logged=published,
        describe="-sg(p) log p",
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones)
