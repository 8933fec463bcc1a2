"""Picking the next token: one uniform number per row, no noise over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Tokens summed together before the running sum: a running sum over a whole vocabulary is slower and less exact."""

NUCLEUS = 512
"""Tokens looked at first for top-p; where they do not reach it, all are sorted."""


def choose(
    logits: Tensor, place: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int, greedy: Tensor
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-prob, [R] and [R]. The logits are overwritten: to get new memory for as many numbers
    would take longer than to fill it.

    logits: [P, V] in at least fp32. place: [R], which of them is each row's: rows may share one, and what is computed of a whole
    vocabulary is computed once for them. uniform: [R] in [0, 1). greedy: [R] bool, rows that take the most likely token. The
    log-prob is under softmax(logits / temperature) over the whole vocabulary, whatever top_p and top_k remove; at temperature 0
    under softmax(logits). It is NaN where logits are NaN.

    >>> logits, one = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0, 0])
    >>> choose(logits, one, torch.tensor([0.05, 0.99]), 1.0, 1.0, 0, torch.tensor([False, False]))[0]
    tensor([0, 2])
    """
    scale = temperature if temperature > 0 else 1.0
    highest, best = logits.max(dim=1)
    weight = logits.sub_(highest[:, None])
    if scale != 1:
        weight.div_(scale)
    weight.exp_()
    token = best[place]
    if temperature > 0 and not bool(greedy.all()):
        token = torch.where(greedy, token, _draw(weight, place, uniform, top_p, top_k))
    # a drawn token's weight is positive; the log of exp loses only fp32's last digits, and more below 1e-38, where fp32 has fewer
    return token, weight[place, token].log() - weight.sum(dim=1).log()[place]


def _draw(weight: Tensor, place: Tensor, uniform: Tensor, top_p: float, top_k: int) -> Tensor:
    size = weight.shape[1]
    if top_p == 1 and (top_k == 0 or top_k >= size):
        return inverse_cdf(weight, place, uniform)
    likely, index = keep_likely(weight, top_p, top_k)
    return index[place, inverse_cdf(likely, place, uniform)]


def inverse_cdf(weight: Tensor, place: Tensor, uniform: Tensor) -> Tensor:
    """[R]: the first index at which the running sum of row `place` of `weight` [P, V] passes uniform * its total.

    In two levels, blocks of 256 and then single tokens. A token of weight 0 is never chosen, whatever the rounding, as long as
    one is positive. Weights need not sum to 1.

    >>> inverse_cdf(torch.tensor([[0.0, 2.0, 6.0, 0.0]]), torch.tensor([0, 0, 0]), torch.tensor([0.0, 0.24, 1.0]))
    tensor([1, 1, 2])
    """
    rows, size = weight.shape
    if size % BLOCK:
        weight = F.pad(weight, (0, -size % BLOCK))
    blocks = weight.view(rows, -1, BLOCK)
    sums = blocks.sum(dim=2)
    block, rest = _first_past(sums[place], uniform.to(sums.dtype) * sums.sum(dim=1)[place])
    inside, _ = _first_past(blocks[place, block], rest)
    return block * BLOCK + inside


def _first_past(weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of positive weight [R, n] whose running sum passes `target` [R], and the target less the sum before it.

    A target at or past the end, which rounding can make, falls on an index of positive weight all the same.
    """
    running = weight.cumsum(dim=1)
    # on parallel devices a running sum may fall a little where a weight is 0; on a processor it never does
    reached = torch.where(weight > 0, running, 0)
    end = reached.amax(dim=1)
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))  # always below the end
    index = (reached > target[:, None]).to(torch.uint8).argmax(dim=1)
    before = F.pad(running, (1, 0)).gather(1, index[:, None])[:, 0]
    return index, (target - before).clamp_(min=0)


def keep_likely(weight: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [R, k] of the tokens that top-k and then top-p keep, in falling order, 0 where dropped, and their ids [R, k].

    top-p keeps the smallest set whose share of what top-k left reaches `top_p`; one token always stays. Exactly k tokens pass
    top-k, ties broken by the sort.

    >>> weights, ids = keep_likely(torch.tensor([[1.0, 5.0, 3.0, 1.0]]), 0.75, 0)
    >>> ids[weights > 0]
    tensor([1, 2])
    """
    size = weight.shape[1]
    kept = min(top_k or NUCLEUS, size)
    likely, index = weight.topk(kept, dim=1)
    total = likely.sum(dim=1) if top_k else weight.sum(dim=1)
    if not top_k and kept < size and bool((likely.sum(dim=1) < top_p * total).any()):
        likely, index = weight.sort(dim=1, descending=True)
    if top_p < 1:
        before = F.pad(likely.cumsum(dim=1), (1, -1))
        dropped = before >= (top_p * total)[:, None]
        dropped[:, 0] = False
        likely = likely.masked_fill(dropped, 0)
    return likely, index
