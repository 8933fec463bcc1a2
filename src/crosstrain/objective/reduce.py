"""The only division by counts in the objective, and the only place where masks are applied.

    loss = sum over terms of coef * sum(value on its tokens) / N

N is the term's `per`, counted over all micro-batches and ranks of an optimizer step before the first forward. So neither
micro-batch size, padding, packing, accumulation nor device count can change a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosstrain.types import Batch, Scores, Term

Counts = Mapping[str, float]
"""Each term's denominator, by term name."""


@dataclass(frozen=True)
class TermLoss:
    """One term on one micro-batch.

    loss: scalar with gradient, already divided by the whole step's count. logged: the published loss, no gradient.
    """

    loss: Tensor
    logged: float


def count(terms: Sequence[Term], batch: Batch, *, groups: int, groups_before_select: int | None = None) -> dict[str, float]:
    """The denominators of an optimizer step, by term name; a term with nothing to be on has 0.

    groups: groups of the step as kept; groups_before_select: as collected.
    """
    masks = {term.name: term.on(batch) for term in terms}
    union = torch.zeros_like(batch.trained)
    for mask in masks.values():
        union |= mask
    denominators = {}
    for term in terms:
        mask = masks[term.name]
        available = {
            "own_tokens": int(mask.sum()),
            "all_tokens": int(union.sum()),
            "sequences": int(mask.any(dim=1).sum()),
            "pairs": len(batch.pairs()[0]) if "pairs" in term.per.counts else 0,
            "groups": groups if term.per.when == "after" or groups_before_select is None else groups_before_select,
        }
        product = term.per.constant
        for name in term.per.counts:
            product *= available[name]
        denominators[term.name] = product if bool(mask.any()) else 0.0
    return denominators


def term_loss(term: Term, scores: Scores, batch: Batch, counts: Counts) -> TermLoss | None:
    """One term's part of the loss on a micro-batch; None when it has nothing to be on there."""
    mask = term.on(batch)
    denominator = counts[term.name]
    if denominator == 0 or not bool(mask.any()):
        return None
    inside = _inside(scores, mask)
    seen = _batch_inside(batch, mask)
    coef = term.coefficient(batch.step)
    loss = coef * _sum(term.value(inside, seen, mask), mask) / denominator
    with torch.no_grad():
        shown = loss if term.logged is None else coef * _sum(term.logged(inside, seen, mask), mask) / denominator
    return TermLoss(loss, float(shown.detach()))


def _inside(scores: Scores, mask: Tensor) -> Scores:
    """Scores that are 0 outside the mask, so that nothing there can reach a value or, as 0 * NaN, a gradient."""
    return Scores(_keep(scores.logp, mask), {name: _keep(c, mask) for name, c in scores.channels.items()})


def _batch_inside(batch: Batch, mask: Tensor) -> Batch:
    columns = {name: _keep(c, mask) if c.shape == mask.shape else c for name, c in batch.columns.items()}
    return replace(batch, advantage=_keep(batch.advantage, mask), columns=columns)


def _keep(tensor: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, tensor, torch.zeros_like(tensor))


def _sum(value: Tensor, mask: Tensor) -> Tensor:
    """Sum of a term's value: over its tokens for [B, T], over its rows for [B], over everything for [P]."""
    if value.shape == mask.shape:
        return _keep(value, mask).sum()
    if value.shape == mask.shape[:1]:
        return _keep(value, mask.any(dim=1)).sum()
    return value.sum()
