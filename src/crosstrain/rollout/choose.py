"""Picking the next token: one uniform number per row, no noise over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def choose(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-prob, [R] and [R].

    logits: [R, V] in fp32. uniform: [R] in [0, 1). greedy: [R] bool, rows that take the most likely token instead. The log-prob
    is under softmax(logits / temperature), before top-p and top-k; at temperature 0 under softmax(logits).
    """
    scaled = logits / temperature if temperature > 0 else logits
    logp = scaled - torch.logsumexp(scaled, dim=1, keepdim=True)
    likeliest = logits.argmax(dim=1)
    if temperature == 0 or bool(greedy.all()):
        token = likeliest
    else:
        probability = keep_likely(logp, top_p, top_k).exp() if top_k or top_p < 1 else logp.exp()
        token = torch.where(greedy, likeliest, inverse_cdf(probability, uniform))
    return token, logp.gather(1, token[:, None])[:, 0]


def inverse_cdf(probability: Tensor, uniform: Tensor) -> Tensor:
    """[R]: the first index at which the running sum of `probability` [R, V] passes uniform * its total.

    In two levels, blocks of 256 and then tokens, so that no running sum over the whole vocabulary is made. A token of
    probability 0 is never chosen, whatever the rounding. Rows need not sum to 1.
    """
    rows, size = probability.shape
    padded = torch.nn.functional.pad(probability, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    running = padded.sum(dim=2).cumsum(dim=1)
    target = _below(uniform.to(running.dtype) * running[:, -1], running[:, -1])
    block = (running <= target[:, None]).sum(dim=1)
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], torch.zeros_like(target))
    inside = padded[torch.arange(rows, device=probability.device), block].cumsum(dim=1)
    rest = _below((target - before).clamp(min=0), inside[:, -1])
    return block * BLOCK + (inside <= rest[:, None]).sum(dim=1)


def keep_likely(logp: Tensor, top_p: float, top_k: int) -> Tensor:
    """Log-probs [R, V] with all but the top-k, then all but the top-p tokens of what remains, set to -inf.

    top-p keeps the smallest set whose probability, renormalised after top-k, reaches `top_p`; at least one token always stays.
    """
    if top_k and top_k < logp.shape[1]:
        smallest = logp.topk(top_k, dim=1).values[:, -1:]
        logp = logp.masked_fill(logp < smallest, -torch.inf)
    if top_p < 1:
        ordered, index = logp.sort(dim=1, descending=True)
        probability = ordered.softmax(dim=1)
        reached_before = probability.cumsum(dim=1) - probability >= top_p
        reached_before[:, 0] = False
        logp = logp.masked_fill(torch.zeros_like(reached_before).scatter(1, index, reached_before), -torch.inf)
    return logp


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """`value`, but strictly under `limit`."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))
