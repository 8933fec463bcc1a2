"""Credit token by token: rewards with a KL in them, returns, and the generalised advantage estimate. Pure functions, no gradient.

Only own tokens count: a tool's words or a prompt in the middle of a response are skipped, as if the own tokens around them were
neighbours, and hold NaN in every result. Nothing is bootstrapped: the state after a response is worth 0, also where it was cut.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from crosstrain.objective.advantages import raw_reward
from crosstrain.types import Batch, Look, Source

Estimator = Literal["k1", "k2", "k3"]


def own_tokens(batch: Batch) -> Tensor:
    """[B, T] bool: the trained tokens that the policy wrote."""
    return batch.written_by(Source.POLICY)


def token_rewards(batch: Batch, credit: Tensor | None = None, penalty: Tensor | None = None) -> Tensor:
    """What each own token earns, [B, T] in fp64 on the CPU: minus its `penalty` [B, T], and on the last one `credit` [B] as well.

    credit: the reward, unless given. penalty: 0, unless given.

    >>> from crosstrain.testing import tiny_batch
    >>> token_rewards(tiny_batch(rewards=[1.0], groups=[0]), penalty=torch.tensor([[9.0, 0.25, 0.5]])).tolist()
    [[nan, -0.25, 0.5]]
    """
    own = own_tokens(batch).cpu()
    given = raw_reward(batch) if credit is None else credit
    taken = torch.zeros(own.shape, dtype=torch.float64) if penalty is None else _exact(penalty)
    last = own.flip(1).cumsum(1).flip(1) == 1  # also what others wrote just before it
    earned = torch.where(last, _exact(given)[:, None] - taken, -taken)
    return torch.where(own, earned, torch.full_like(earned, math.nan))


def returns_to_go(batch: Batch, rewards: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over own tokens, [B, T] in fp64 on the CPU. rewards: [B, T].

    >>> from crosstrain.testing import tiny_batch
    >>> returns_to_go(tiny_batch(rewards=[0.0], groups=[0]), torch.tensor([[9.0, -0.25, 1.0]]), gamma=0.5).tolist()
    [[nan, 0.25, 1.0]]
    """
    return gae(batch, rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0)


def gae(batch: Batch, rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """A_t = sum over k of (gamma lam)^k d_{t+k}, d_t = r_t + gamma V_{t+1} - V_t, over own tokens, [B, T] in fp64 on the CPU.

    rewards, values: [B, T], values of the state before each token. Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    With gamma = lam = 0.5, rewards 0 and 1 and values 0.5 and 1: d is 0 + 0.5 - 0.5 = 0 and 1 + 0 - 1 = 0.

    >>> from crosstrain.testing import tiny_batch
    >>> batch = tiny_batch(rewards=[1.0], groups=[0])
    >>> gae(batch, torch.tensor([[9.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.5, 1.0]]), gamma=0.5, lam=0.5).tolist()
    [[nan, 0.0, 0.0]]
    >>> gae(batch, torch.tensor([[9.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.0, 0.0]]), gamma=0.5, lam=0.5).tolist()
    [[nan, 0.25, 1.0]]
    """
    own, reward, value = own_tokens(batch).cpu(), _exact(rewards), _exact(values)
    result = torch.full(own.shape, math.nan, dtype=torch.float64)
    after = torch.zeros(len(own), dtype=torch.float64)
    ahead = torch.zeros(len(own), dtype=torch.float64)
    for t in reversed(range(own.shape[1])):
        here = own[:, t]
        estimate = reward[:, t] + gamma * ahead - value[:, t] + gamma * lam * after
        after, ahead = torch.where(here, estimate, after), torch.where(here, value[:, t], ahead)
        result[here, t] = estimate[here]
    return result


def whitened_tokens(batch: Batch, values: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(values - mean) / (std + eps) over all own tokens of the step, [B, T], std with n - 1; with fewer than two tokens, 0.

    shift_mean: False adds the mean again, so that only the spread changes (rewards, in TRL).

    >>> from crosstrain.testing import tiny_batch
    >>> whitened_tokens(tiny_batch(rewards=[0.0], groups=[0]), torch.tensor([[9.0, 1.0, 3.0]]), eps=0.0).tolist()
    [[nan, -0.7071067811865475, 0.7071067811865475]]
    """
    own, value = own_tokens(batch).cpu(), _exact(values)
    known = value[own]
    if len(known) < 2:
        return torch.where(own, torch.zeros_like(value), torch.full_like(value, math.nan))
    mean = known.mean()
    scaled = (value - mean) / (known.std() + eps) + (0.0 if shift_mean else mean)
    return torch.where(own, scaled, torch.full_like(value, math.nan))


def kl_penalty(look: Look, batch: Batch, coef: float, estimator: Estimator = "k1") -> Tensor:
    """What a KL in the reward takes off, [B, T]: coef times an estimate of KL(pi_old || ref) per token, pi_old the policy that
    sampled the batch."""
    logp = batch.columns.get("old_logp")  # not made where a batch is used once
    logp = look(batch).logp if logp is None else logp
    return coef * divergence(logp - batch.columns["ref_logp"], estimator)


def shaped_by_entropy(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """A + min(alpha H, |A| / kappa): uncertain tokens get more credit; with kappa > 1 no sign turns (arXiv:2506.14758).

    >>> shaped_by_entropy(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 5.0, 5.0]), alpha=0.5, kappa=2.0).tolist()
    [1.25, -0.5, 0.0]
    """
    return advantage + torch.minimum(alpha * entropy, advantage.abs() / kappa)


def divergence(difference: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(pi || ref) per token from d = log pi - log ref: k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d."""
    if estimator == "k1":
        return difference
    return difference**2 / 2 if estimator == "k2" else torch.exp(-difference) - 1 + difference


def _exact(values: Tensor) -> Tensor:
    """In fp64 on the CPU: some accelerators have none."""
    return values.detach().to(device="cpu", dtype=torch.float64)
