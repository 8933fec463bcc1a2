"""How much of a token's gradient gets through: `(ratio, logp, batch, on) -> [B, T]`.

ratio: exp(logp - log_den) of the term's denominator, [B, T]. It and logp come without gradient, so that a gate has none. on: the
term's own tokens, outside of which logp and columns are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from crosstrain.objective.denominators import old
from crosstrain.objective.words import says
from crosstrain.types import Batch

Gate = Callable[[Tensor, Tensor, Batch, Tensor], Tensor]


@says("1")
def always(ratio: Tensor, logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """1 everywhere."""
    return torch.ones_like(ratio)


def ppo_clip(low: float = 0.2, high: float = 0.2, dual: float | None = None) -> Gate:
    """1 where PPO's clipped objective would let the gradient through, else 0.

    Closed when the step went far enough already: A > 0 and ratio > 1 + high, or A < 0 and ratio < 1 - low. At the bound
    itself it is open. Schulman et al. 2017 (arXiv:1707.06347) eq. 7, as a gate on the gradient rather than a min on the loss;
    separate bounds from DAPO (arXiv:2503.14476). dual: also closed for A < 0 and ratio > dual, which bounds the loss by -dual A
    (dual clip, arXiv:1912.09729).

    >>> import torch
    >>> from crosstrain.testing import tiny_batch
    >>> from crosstrain.training.batching import with_advantage
    >>> batch = with_advantage(tiny_batch([1.0, 0.0, 0.0], [0, 0, 0], tokens=1), torch.tensor([1.0, -1.0, -1.0]))
    >>> ratio = torch.tensor([[1.0, 1.3], [1.0, 1.3], [1.0, 0.7]])
    >>> ppo_clip()(ratio, ratio.log(), batch, batch.trained)[:, 1].tolist()
    [0.0, 1.0, 0.0]
    """
    if not 0 < low <= 1 or high <= 0:
        raise ValueError(
            f"ppo_clip (epsilon, epsilon_high): got low={low}, high={high}; low must be in (0, 1] and high positive"
        )
    if dual is not None and dual <= 1 + high:
        raise ValueError(f"ppo_clip: got dual={dual}; it must be above 1 + high = {1 + high:g}, or None for no dual clip")

    further = "" if dual is None else f", or A < 0 and r > {dual:g}"

    @says(f"0 where A > 0 and r > {1 + high:g}, or A < 0 and r < {1 - low:g}{further}; else 1")
    def gate(ratio: Tensor, logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        too_high = (batch.advantage > 0) & (ratio > 1 + high)
        too_low = (batch.advantage < 0) & (ratio < 1 - low)
        closed = too_high | too_low
        if dual is not None:
            closed |= (batch.advantage < 0) & (ratio > dual)
        return (~closed).to(ratio.dtype)

    return gate


def token_clip(low: float, high: float) -> Gate:
    """As `ppo_clip`, of the token's own ratio pi / old whatever the term's denominator is, with bounds on its logarithm: closed for
    A > 0 and log r > high, or A < 0 and log r < -low (GMPO, arXiv:2507.20673)."""
    if low <= 0 or high <= 0:
        raise ValueError(f"token_clip: got low={low}, high={high}; both must be positive")

    @says(f"0 where A > 0 and log(pi / pi_old) > {high:g}, or A < 0 and log(pi / pi_old) < -{low:g}; else 1")
    def gate(ratio: Tensor, logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        moved = logp - old(logp, batch, on)
        closed = ((batch.advantage > 0) & (moved > high)) | ((batch.advantage < 0) & (moved < -low))
        return (~closed).to(ratio.dtype)

    return gate


def unlikely(power: float = 0.5) -> Gate:
    """(1 - p)^power: the less likely a token is, the more it counts (RL-PLUS, arXiv:2508.00222)."""
    if power <= 0:
        raise ValueError(f"unlikely: got power={power}; it must be positive")

    @says(f"(1 - p)^{power:g}")
    def gate(ratio: Tensor, logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return (-torch.expm1(logp)) ** power

    return gate


Correction = Literal["none", "truncate", "mask", "sequence_mask"]


def correction(kind: Correction, cap: float, lowest: float = 0.0) -> Callable[[Tensor, Batch, Tensor], Tensor]:
    """What a policy loss is multiplied with where the sampler's probabilities are not the trainer's: `(logp, batch, on) -> [B,
    T]`, from w = old / sampler, old being the current policy with one update per batch.

    none: 1. truncate: min(w, cap), truncated importance sampling (TIS; verl's cap is 2). mask: w within [lowest, cap], else 0
    (IcePop; 0.5 and 5). sequence_mask: the product of a sequence's w, 0 where it is above cap (TRL's default for vLLM; 3).
    """
    if kind not in ("none", "truncate", "mask", "sequence_mask"):
        raise ValueError(f"off_policy_correction: got {kind!r}; allowed: none, truncate, mask, sequence_mask")
    if not 0 <= lowest < cap:
        raise ValueError(f"correction: got cap={cap}, lowest={lowest}; cap must be positive and lowest below it")

    what = {
        "none": "1",
        "truncate": f"min(w, {cap:g})",
        "mask": f"w within [{lowest:g}, {cap:g}], else 0",
        "sequence_mask": f"the sequence's product of w, 0 above {cap:g}",
    }[kind]

    @says(f"{what}, with w = pi_old / sampler")
    def weight(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        if kind == "none":
            return torch.ones_like(logp)
        apart = old(logp, batch, on) - batch.columns["behaviour_logp"].to(logp.dtype)
        apart = torch.where(on, apart, torch.zeros_like(logp))
        if kind == "sequence_mask":
            apart = apart.sum(dim=1, keepdim=True).expand(logp.shape)
        w = apart.exp()
        if kind == "truncate":
            return w.clamp(max=cap)
        return torch.where((w <= cap) & (w >= (lowest if kind == "mask" else 0.0)), w, torch.zeros_like(w))

    return weight


def soft(positive: float = 1.0, negative: float = 1.05) -> Gate:
    """4 s (1 - s), s = sigmoid(tau (ratio - 1)): 1 at ratio 1 and falling on both sides, in place of a clip.

    tau is `positive` where the advantage is positive, else `negative`. The derivative of (4 / tau) sigmoid(tau (ratio - 1)) by the
    ratio. SAPO, arXiv:2511.20347.
    """
    if positive <= 0 or negative <= 0:
        raise ValueError(f"soft: got positive={positive}, negative={negative}; both must be positive")

    @says(f"4 s (1 - s), with s = sigmoid(tau (r - 1)), tau = {positive:g} for A > 0, else {negative:g}")
    def gate(ratio: Tensor, logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        tau = (batch.advantage > 0).to(ratio.dtype) * (positive - negative) + negative
        s = torch.sigmoid(tau * (ratio - 1))
        return 4 * s * (1 - s)

    return gate
