"""What a sample's probability is divided by, as log-probs without gradient: `(logp, batch) -> log_den [B, T]`.

The importance ratio of a token is exp(logp - log_den). The Unified Policy Gradient Estimator (arXiv:2509.04419) calls this
the reference policy; here `ref_logp` only ever means the frozen KL reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from crosstrain.types import Batch

Denominator = Callable[[Tensor, Batch], Tensor]


def current(logp: Tensor, batch: Batch) -> Tensor:
    """The policy itself: ratio 1, weight A (SFT, REINFORCE)."""
    return logp.detach()


def old(logp: Tensor, batch: Batch) -> Tensor:
    """The policy at the start of the batch's inner updates: the PPO ratio.

    With one update per batch the column does not exist and old is the current policy, exactly; the sampler's own log-probs
    are never used for it.
    """
    return batch.columns.get("old_logp", logp).detach()


def one(logp: Tensor, batch: Batch) -> Tensor:
    """Density 1, for data whose author is unknown: ratio and weight are pi (DFT, arXiv:2508.05629)."""
    return torch.zeros_like(logp)


def shaped(gamma: float = 0.1) -> Denominator:
    """Policy shaping: the gradient of p / (p + gamma), as a denominator (p + gamma)^2 / gamma.

    Weight gamma * p / (p + gamma)^2: largest, at 1/4, for p = gamma, and small for tokens already likely. LUFFY,
    arXiv:2504.14945, section 3.3.

    >>> import torch
    >>> logp = torch.log(torch.tensor([0.1, 0.9]))
    >>> [round(w, 4) for w in torch.exp(logp - shaped(0.1)(logp, None)).tolist()]
    [0.25, 0.09]
    """
    if gamma <= 0:
        raise ValueError(f"shaped: got gamma={gamma}; it must be positive")

    def log_den(logp: Tensor, batch: Batch) -> Tensor:
        return 2 * torch.log(torch.exp(logp.detach()) + gamma) - math.log(gamma)

    return log_den
