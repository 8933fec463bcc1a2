"""Objectives without a model that read values too: [B, T - 1] log-probs and values are all there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from worked import rectangle

from crosstrain.objective.reduce import count, term_loss
from crosstrain.types import Batch, Method, Scores


@dataclass(frozen=True)
class Outcome:
    """Loss, the losses logged by term, and minus the gradient on log-probs and on values, [B, T - 1] each."""

    loss: float
    logged: dict[str, float]
    weights: Tensor
    value_weights: Tensor


def outcome(method: Method, batch: Batch, logp: Tensor, values: Tensor, entropy: Tensor | None = None) -> Outcome:
    """The objective on log-probs and values [B, T - 1] of a batch that has its advantage."""
    leaf, value = (rectangle(x, batch, 99.0).requires_grad_() for x in (logp, values))
    channels = {"value": value} | ({} if entropy is None else {"entropy": rectangle(entropy, batch, 99.0)})
    counts = count(method.terms, batch, groups=len(torch.unique(batch.group)))
    parts = {t.name: term_loss(t, Scores(leaf, channels), batch, counts) for t in method.terms}
    total: Tensor = sum(p.loss for p in parts.values() if p is not None)  # type: ignore[assignment]
    gradients = torch.autograd.grad(total, [leaf, value], allow_unused=True)
    weights, value_weights = (-torch.zeros_like(logp) if g is None else -g[:, 1:] for g in gradients)
    return Outcome(float(total.detach()), {n: p.logged for n, p in parts.items() if p is not None}, weights, value_weights)
