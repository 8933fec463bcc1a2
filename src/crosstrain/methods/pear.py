"""PEAR: demonstrations weighted by how likely the policy would go on as they do, so that RL starts where it can go on."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from crosstrain.methods.plans import demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.terms import by, surrogate
from crosstrain.objective.words import says
from crosstrain.types import Batch, Method, Per, Scores, Source


@method(
    paper="arXiv:2602.01058",
    family="supervised",
    direction="(SFT ->) RL",
    checked="reconstructed",
    works="As a start for GRPO: up to +14.6 points of pass@8 on AIME-2025 over plain SFT, and better than it on logic games "
    "(arXiv:2602.01058).",
    fails="Its authors find weights by single steps worse than plain SFT for some models, and a better SFT score no sign of a "
    "better one after RL (arXiv:2602.01058).",
    deviates="Written from descriptions and somebody else's code, as no code of the authors was found. Negative demonstrations, "
    "which the paper subtracts, are left out.",
)
def pear(
    level: Literal["suffix", "sequence"] = "suffix",
    block_size: int = 1,
    discount: float = 0.999,
    behaviour: Literal["data", "reference"] = "data",
    log_ratio_low: float = -0.08,
    log_ratio_high: float = 0.3,
    log_weight_low: float = -10.0,
    log_weight_high: float = 5.0,
) -> Method:
    """PEAR (policy-evaluation-inspired loss reweighting): supervised fine-tuning that prepares for reinforcement learning.

    With d_t = log pi(y_t) - log behaviour(y_t), clipped to [log_ratio_low, log_ratio_high], and T tokens in the demonstration, the
    weight G_t of a token is, by `level`,
        suffix      log G_t = (T - t) log discount + sum of d_j over j > t: how much likelier the rest is under the policy
        sequence    log G_t = sum of all d_j
    then clipped to [log_weight_low, log_weight_high], without gradient.

    Loss (logged): -sum_t sg(G_t) log pi(y_t) / N over all N supervised tokens. Weight on grad log pi: G_t / N.

    level: "suffix", the paper's token form, or "sequence", one weight for all tokens. block_size: tokens that share a weight, that
    of their last one, for less variance (`suffix` only; 1 in the paper's token form, 4 in some of its runs). discount: the paper's,
    for "suffix" only. behaviour: who wrote the demonstrations; "data": log-probs come with the rows, in a column `behaviour_logp`
    with one number per token of the completion, its end token among them, as the model that wrote it gives them; "reference": the
    model that the run started from wrote them. log_ratio_low, log_ratio_high: the bounds of d_t, the paper's. log_weight_low,
    log_weight_high: the bounds of log G_t, the paper's.
    """
    if level not in ("suffix", "sequence"):
        raise ValueError(f"level: got {level!r}; allowed: suffix, sequence")
    if behaviour not in ("data", "reference"):
        raise ValueError(f"behaviour: got {behaviour!r}; allowed: data, reference")
    if block_size < 1 or not 0 < discount <= 1:
        raise ValueError(f"got block_size={block_size}, discount={discount}; at least 1, and in (0, 1]")
    if level == "sequence" and (block_size != 1 or discount != 0.999):
        raise ValueError("block_size and discount have no effect with level='sequence'; leave them out")
    if log_ratio_low >= log_ratio_high or log_weight_low >= log_weight_high:
        raise ValueError(
            f"got log_ratio_low={log_ratio_low}, log_ratio_high={log_ratio_high}, log_weight_low={log_weight_low}, "
            f"log_weight_high={log_weight_high}; low must be below high"
        )
    column = "behaviour_logp" if behaviour == "data" else "ref_logp"

    def log_weight(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        d = (logp - batch.columns[column].to(logp)).clamp(log_ratio_low, log_ratio_high)
        d = torch.where(on, d, torch.zeros_like(d))
        whole = d.sum(dim=1, keepdim=True).expand(d.shape)
        total = whole if level == "sequence" else suffix(d, on, block_size, math.log(discount))
        return total.clamp(log_weight_low, log_weight_high)

    def published(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return -log_weight(scores.logp, batch, on).exp() * scores.logp

    @says("pi / G")
    def denominator(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return logp - log_weight(logp, batch, on)

    term = surrogate(
        "demo",
        on=by(Source.EXPERT),
        per=Per(("own_tokens",)),
        denominator=denominator,
        unit="sequence",
        logged=published,
        needs=frozenset({column}),
        describe=f"-sg(G) log pi, log G = sum of log pi - log behaviour over {'later' if level == 'suffix' else 'all'} tokens",
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones)


def suffix(d: Tensor, on: Tensor, block_size: int, log_discount: float) -> Tensor:
    """[B, T]: the sum of `d`, 0 outside `on`, over the tokens of later blocks, plus log_discount for each of these; blocks are cut
    among the tokens of `on`.

    >>> d, on = torch.tensor([[0.0, 1.0, 2.0, 4.0, 8.0]]), torch.tensor([[False, True, True, True, True]])
    >>> suffix(d, on, 1, 0.0)[0, 1:].tolist(), suffix(d, on, 2, -100.0)[0, 1:].tolist()
    ([14.0, 12.0, 8.0, 0.0], [-188.0, -188.0, 0.0, 0.0])
    """
    block = ((on.cumsum(dim=1) - 1).clamp(min=0)) // block_size
    sums, counts = (
        torch.zeros_like(d).scatter_add(1, block, values) for values in (d, on.to(d.dtype))
    )  # at most as many blocks as tokens
    later = (sums + log_discount * counts).flip(1).cumsum(1).flip(1)
    return torch.nn.functional.pad(later, (0, 1))[:, 1:].gather(1, block)
