"""Which tokens let the gradient through: `(ratio, advantage) -> [B, T]` numbers in [0, 1], without gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gate = Callable[[Tensor, Tensor], Tensor]


def always(ratio: Tensor, advantage: Tensor) -> Tensor:
    """1 everywhere."""
    return torch.ones_like(ratio)


def ppo_clip(low: float = 0.2, high: float = 0.2) -> Gate:
    """1 where PPO's clipped objective would let the gradient through, else 0.

    Closed when the step went far enough already: A > 0 and ratio > 1 + high, or A < 0 and ratio < 1 - low. At the bound
    itself it is open. Schulman et al. 2017 (arXiv:1707.06347) eq. 7, as a gate on the gradient rather than a min on the loss;
    separate bounds from DAPO (arXiv:2503.14476).

    >>> import torch
    >>> ppo_clip()(torch.tensor([1.3, 1.3, 0.7]), torch.tensor([1.0, -1.0, -1.0])).tolist()
    [0.0, 1.0, 0.0]
    """
    if not 0 < low < 1 or high <= 0:
        raise ValueError(f"ppo_clip: got low={low}, high={high}; low must be in (0, 1) and high positive")

    def gate(ratio: Tensor, advantage: Tensor) -> Tensor:
        too_high = (advantage > 0) & (ratio > 1 + high)
        too_low = (advantage < 0) & (ratio < 1 - low)
        return (~(too_high | too_low)).to(ratio.dtype)

    return gate
