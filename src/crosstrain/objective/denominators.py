"""What a sample's probability is divided by, as log-probs without gradient: `(logp, batch, on) -> log_den [B, T]`.

The importance ratio of a token is exp(logp - log_den). The Unified Policy Gradient Estimator (arXiv:2509.04419) calls this
the reference policy; here `ref_logp` only ever means the frozen KL reference. on: the term's own tokens, outside of which logp and
columns are 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from crosstrain.objective.words import says
from crosstrain.types import Batch

Denominator = Callable[[Tensor, Batch, Tensor], Tensor]


@says("pi")
def current(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """The policy itself: ratio 1, weight A (SFT, REINFORCE)."""
    return logp.detach()


@says("pi_old")
def old(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """The policy at the start of the batch's inner updates: the PPO ratio.

    With one update per batch the column does not exist and old is the current policy, exactly; the sampler's own log-probs
    are never used for it.
    """
    return batch.columns.get("old_logp", logp).detach()


@says("1")
def one(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """Density 1, for data whose author is unknown: ratio and weight are pi (DFT, arXiv:2508.05629)."""
    return torch.zeros_like(logp)


def shaped(gamma: float = 0.1) -> Denominator:
    """Policy shaping: the gradient of p / (p + gamma), as a denominator (p + gamma)^2 / gamma.

    Weight gamma * p / (p + gamma)^2: largest, at 1/4, for p = gamma, and small for tokens already likely. LUFFY,
    arXiv:2504.14945, section 3.3.

    >>> import torch
    >>> logp = torch.log(torch.tensor([0.1, 0.9]))
    >>> [round(w, 4) for w in torch.exp(logp - shaped(0.1)(logp, None, None)).tolist()]
    [0.25, 0.09]
    """
    if gamma <= 0:
        raise ValueError(f"shaped: got gamma={gamma}; it must be positive")

    @says(f"(p + {gamma:g})^2 / {gamma:g}")
    def log_den(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return 2 * torch.log(torch.exp(logp.detach()) + gamma) - math.log(gamma)

    return log_den


def shaped_behaviour(gamma: float = 0.1) -> Denominator:
    """As `shaped`, of the ratio w = pi / b to the policy b that sampled: the gradient of w / (w + gamma), as a denominator
    b (w + gamma)^2 / gamma. Weight gamma w / (w + gamma)^2. Reads `behaviour_logp`. ExGRPO, arXiv:2510.02245.

    >>> import torch
    >>> from crosstrain.testing import tiny_batch
    >>> half = torch.full((1, 2), 0.5).log()
    >>> batch = tiny_batch([1.0], [0], tokens=1).with_columns(behaviour_logp=half)
    >>> round(float(torch.exp(half - shaped_behaviour(0.1)(half, batch, batch.trained))[0, 1]), 4)
    0.0826
    """
    if gamma <= 0:
        raise ValueError(f"shaped_behaviour: got gamma={gamma}; it must be positive")

    @says(f"b (w + {gamma:g})^2 / {gamma:g}, w = pi / b, b the behaviour policy")
    def log_den(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        behaviour = batch.columns["behaviour_logp"].to(logp.dtype)
        return behaviour + 2 * torch.log(torch.exp(logp.detach() - behaviour) + gamma) - math.log(gamma)

    return log_den


@says("1 / (1 - p)")
def uncertain(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """1 / (1 - p): weight p (1 - p), largest at p = 1/2 (CHORD-phi, arXiv:2508.11408).

    >>> import torch
    >>> logp = torch.log(torch.tensor([0.5, 0.9]))
    >>> [round(w, 4) for w in torch.exp(logp - uncertain(logp, None, None)).tolist()]
    [0.25, 0.09]
    """
    # 1 - p from its log-prob: the difference of rounded numbers would lose it; a p of 1 has weight 0
    return -torch.log(-torch.expm1(logp.detach()))


def floored(lowest: float = 0.1) -> Denominator:
    """max(p, lowest): weight 1 for likely tokens and p / lowest for others (TrSFT of TRAPO, arXiv:2512.17636)."""
    if not 0 < lowest <= 1:
        raise ValueError(f"floored: got lowest={lowest}; it must be in (0, 1]")

    @says(f"max(p, {lowest:g})")
    def log_den(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return logp.detach().clamp(min=math.log(lowest))

    return log_den


@says("(3 pi_old + 1) / 4")
def mixture(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """(pi_old + w) / 2 with w = (pi_old + 1) / 2: the old policy mixed with a uniform one whose density is taken as 1 (RL-PLUS,
    arXiv:2508.00222)."""
    p = old(logp, batch, on).exp()
    return torch.log((p + (p + 1) / 2) / 2)


@says("pi / s, with s = exp(mean over the sequence of log(pi / pi_old))")
def sequence(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """pi / s with s = exp(mean over the sequence of log(pi / old)): every token's ratio is s (GSPO, arXiv:2507.18071)."""
    return logp.detach() - _row_mean(logp.detach() - old(logp, batch, on), on)


def clipped_sequence(low: float, high: float) -> Denominator:
    """pi / rho with rho = exp(mean over the sequence of the clipped log(pi / old)): every token's ratio is rho.

    Clipped as PPO clips, on one side by the advantage's sign: at most `high` for A > 0, at least -`low` for A < 0. GMPO,
    arXiv:2507.20673.
    """

    @says(
        f"pi / rho, with rho = exp(mean over the sequence of log(pi / pi_old) cut at {high:g} for A > 0, at -{low:g} for A < 0)"
    )
    def log_den(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        moved = logp.detach() - old(logp, batch, on)
        moved = torch.where(batch.advantage > 0, moved.clamp(max=high), moved)
        moved = torch.where(batch.advantage < 0, moved.clamp(min=-low), moved)
        return logp.detach() - _row_mean(moved, on)

    return log_den


def capped(low: float | None, high: float) -> Denominator:
    """pi / r' with r' = pi / old brought into [low, high] (None: no lower bound): the ratio is cut but never closes a token (CISPO,
    arXiv:2506.13585)."""
    if high <= 0 or (low is not None and not 0 <= low < high):
        raise ValueError(f"capped: got low={low}, high={high}; high must be positive and low below it")

    @says("pi / r', with r' = pi / pi_old, " + (f"from {low:g} to {high:g}" if low else f"at most {high:g}"))
    def log_den(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        moved = logp.detach() - old(logp, batch, on)
        return logp.detach() - moved.clamp(min=None if not low else math.log(low), max=math.log(high))

    return log_den


def _row_mean(values: Tensor, on: Tensor) -> Tensor:
    """[B, 1]: the mean over each row's own tokens, 0 for a row without."""
    inside = torch.where(on, values, torch.zeros_like(values))
    return inside.sum(dim=1, keepdim=True) / on.sum(dim=1, keepdim=True).clamp(min=1)
