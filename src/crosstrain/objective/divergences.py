"""How far one next-token distribution is from another, over the whole vocabulary: `(logits, others, targets) -> [M]` in nats.

The policy's distribution is pi = softmax(logits [M, V]), the other q = softmax(others [M, V]). Only pi has a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosstrain.types import Divergence


def forward_kl(logits: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    """KL(q || pi), [M]: large where pi misses what q finds likely. Its gradient on the logits is pi - q.

    >>> z, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0986123, 0.0]])  # 1/2, 1/2 and 3/4, 1/4
    >>> [round(float(f(z, other, torch.tensor([0]))), 4) for f in (forward_kl, reverse_kl)]
    [0.1308, 0.1438]
    """
    return _kl(torch.log_softmax(others.detach(), dim=-1), torch.log_softmax(logits, dim=-1))


def reverse_kl(logits: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    """KL(pi || q), [M]: large where pi finds likely what q does not. Its gradient on the logits is pi (log pi - log q - KL)."""
    return _kl(torch.log_softmax(logits, dim=-1), torch.log_softmax(others.detach(), dim=-1))


def generalised_jsd(beta: float) -> Divergence:
    """The generalised Jensen-Shannon divergence of arXiv:2306.13649, eq. 1: beta KL(q || m) + (1 - beta) KL(pi || m) with the
    mixture m = beta q + (1 - beta) pi.

    At 0 and at 1, where that is 0 for any pi, it is the limit of it over beta (1 - beta): `forward_kl` and `reverse_kl`.
    Raises ValueError for a beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: got {beta}; it must be from 0 (forward KL) to 1 (reverse KL)")
    if beta in (0, 1):
        return reverse_kl if beta else forward_kl

    def jsd(logits: Tensor, others: Tensor, targets: Tensor) -> Tensor:
        return _jsd(torch.log_softmax(logits, dim=-1), torch.log_softmax(others.detach(), dim=-1), beta)

    return jsd


def on_top_k(beta: float, k: int, tail: bool) -> Divergence:
    """`generalised_jsd(beta)` on the policy's k most likely tokens, [M]: of both distributions over these, with `tail` beside all
    the others as one more token, else scaled so that they add up to 1."""
    if k < 1:
        raise ValueError(f"the number of most likely tokens must be at least 1; got {k}")
    generalised_jsd(beta)

    def over_some(logits: Tensor, others: Tensor, targets: Tensor) -> Tensor:
        at = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
        own, theirs = (torch.log_softmax(z, dim=-1).gather(-1, at) for z in (logits, others.detach()))
        own, theirs = (_with_rest(x) if tail else torch.log_softmax(x, dim=-1) for x in (own, theirs))
        if beta in (0, 1):
            return _kl(own, theirs) if beta else _kl(theirs, own)
        return _jsd(own, theirs, beta)

    return over_some


def at_the_target(logits: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    """sg(log pi(y) - log q(y)) log pi(y) at the target y, [M]: on own samples, an estimate of the gradient of `reverse_kl`."""
    at = targets[:, None]
    logp = torch.log_softmax(logits, dim=-1).gather(1, at)[:, 0]
    other = torch.log_softmax(others.detach(), dim=-1).gather(1, at)[:, 0]
    return (logp - other).detach() * logp


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """KL of log-probs [M, K] to others, [M]."""
    return (one.exp() * (one - other)).sum(dim=-1)


def _jsd(own: Tensor, theirs: Tensor, beta: float) -> Tensor:
    mixed = torch.logaddexp(own + math.log1p(-beta), theirs + math.log(beta))
    return beta * _kl(theirs, mixed) + (1 - beta) * _kl(own, mixed)


def _with_rest(logp: Tensor) -> Tensor:
    """Log-probs [M, k] with that of none of them, [M, k + 1]; what is left is at least 1e-7, so that its logarithm exists."""
    inside = torch.logsumexp(logp, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logp, torch.log(-torch.expm1(inside))], dim=-1)
