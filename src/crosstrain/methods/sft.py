"""Supervised fine-tuning and its probability-weighted form: imitate demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from crosstrain.methods.plans import demonstrations, keyed_uniforms
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.denominators import one
from crosstrain.objective.terms import by, nll, of_channel, seq_mean, surrogate, token_sum
from crosstrain.types import Batch, Method, Per, Scores, Source


@method(
    paper="arXiv:2109.01652",
    family="supervised",
    checked="port",
    works=(
        "A cheap and stable first stage where there are demonstrations and the model cannot yet sample a right answer "
        "(arXiv:2603.13985). With varied prompts and written-out reasoning it matched or beat RL out of distribution on "
        "two games (arXiv:2510.00237)."
    ),
    fails=(
        "With one fixed prompt it lost out of distribution where RL gained (arXiv:2501.17161). It moves a model further "
        "from its start than RL does, and forgets more (arXiv:2509.04259)."
    ),
    deviates="NEFTune's noise is scaled by a row's own length; the authors' code takes the padded batch's.",
)
def sft(
    average: Literal["tokens", "sequences"] = "tokens", label_smoothing: float = 0.0, neftune_noise_alpha: float = 0.0
) -> Method:
    """Supervised fine-tuning: the demonstrations' mean negative log-likelihood.

    Loss: -sum_t log pi(y_t) / N. Weight on grad log pi: 1 / N, or 1 / (T_i N).

    average: "tokens" divides by all supervised tokens of the step, so long answers weigh more; "sequences" gives every
    demonstration the same weight. label_smoothing: e of every token's target spread over the whole vocabulary: (1 - e) -log
    pi(y_t) + e mean_v -log pi(v), as in the HF Trainer and torch. neftune_noise_alpha: noise on the input embeddings in
    training, uniform in +- alpha / sqrt(L D), L a sequence's tokens and D their width (NEFTune, arXiv:2310.05914, which uses 5,
    10 and 15); the authors' L counts the batch's padding too, so that the noise depends on neighbours.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}; it must be in [0, 1)")
    if neftune_noise_alpha < 0:
        raise ValueError(f"neftune_noise_alpha: got {neftune_noise_alpha}; it must be 0 (no noise) or positive")
    if average not in ("tokens", "sequences"):
        raise ValueError(f"average: got {average!r}; allowed: tokens, sequences")
    by_token = average == "tokens"
    per = Per(("own_tokens",)) if by_token else Per(("sequences",))
    normalise = token_sum if by_token else seq_mean
    terms = [nll("demo", on=by(Source.EXPERT), per=per, normalise=normalise, coef=1 - label_smoothing)]
    if label_smoothing > 0:
        terms.append(
            of_channel(
                "smooth",
                "uniform_nll",
                on=by(Source.EXPERT),
                per=per,
                normalise=normalise,
                coef=label_smoothing,
                describe="mean over the vocabulary of -log pi(v)",
            )
        )
    return Method(
        terms=tuple(terms),
        plan=demonstrations(),
        advantage=ones,
        channels={"uniform_nll": uniform_nll} if label_smoothing > 0 else {},
        embed=neftune(neftune_noise_alpha) if neftune_noise_alpha > 0 else None,
    )


def uniform_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the vocabulary of -log pi(v), [M]."""
    return -torch.log_softmax(logits, dim=-1).mean(dim=-1)


def neftune(alpha: float) -> Callable[[Tensor, Batch], Tensor]:
    """Uniform noise in +- alpha / sqrt(L D) on the embeddings [B, T, D] of each row's L tokens, keyed by step and example."""

    def noisy(embeddings: Tensor, batch: Batch) -> Tensor:
        noise = torch.zeros(embeddings.shape, dtype=torch.float64)
        for r, (example, tokens) in enumerate(zip(batch.example_ids, batch.tokens.tolist(), strict=True)):
            n, width = int(batch.length[r]), embeddings.shape[2]
            [u] = keyed_uniforms(1, "neftune", batch.seed, batch.step, example, tokens[:n])
            drawn = torch.rand(n, width, generator=torch.Generator().manual_seed(int(u * 2**48)), dtype=torch.float64)
            noise[r, :n] = (2 * drawn - 1) * alpha / math.sqrt(n * width)
        return embeddings + noise.to(embeddings)

    return noisy


@method(
    paper="arXiv:2508.05629",
    family="supervised",
    works="Where the demonstration is one of many right answers (its authors' README; arXiv:2508.05629).",
    fails=(
        "For teaching new facts (the same README). As the imitation half of a mix with RL, its weight made entropy "
        "collapse (arXiv:2508.11408)."
    ),
    deviates="The authors' code leaves the weight out when sequences are split over devices; here it is always there.",
)
def dft() -> Method:
    """Dynamic fine-tuning: supervised fine-tuning weighted by the token's own probability.

    Loss (logged): -sum_t sg(p_t) log p_t / N over all supervised tokens. Its gradient is that of -sum_t p_t / N: the primitive
    with denominator 1. Weight on grad log pi: p_t / N.

    Good where the demonstration is one of many right answers, bad for teaching new facts (the authors' README).
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
