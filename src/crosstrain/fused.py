"""Parts of a Llama-like layer with a backward of their own: fewer and larger matrix products, and less kept for backward.

Autograd keeps what every single operation read. Here the input of a norm, the queries, keys and values, and the two halves of a
gate are kept; what lies between is computed again, since it takes no matrix product. Results are those of transformers' modules up
to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Gate = Literal["silu", "gelu_tanh"]

ROWS = 256
"""Tokens that elementwise work is done for at once on a processor: what one step writes is still in its cache for the next."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least fp32, in x's dtype.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    tensor([[0.8485, 2.2627]])
    """
    if x.device.type != "cpu" or x.dim() != 2 or len(x) <= ROWS or torch.is_grad_enabled():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    result = torch.empty_like(x)
    for rows in _rows(x):  # torch goes over x several times
        result[rows] = F.rms_norm(x[rows], (x.shape[-1],), weight, eps)
    return result


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head by its position's angles: rotary embeddings, the two halves of a head being the two coordinates.

    heads: [N, L, H, D]. cos, sin: [N or 1, L, D / 2]. Turning by `-sin` undoes it. Without gradient; see `turned`.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    one, other = heads.chunk(2, dim=-1)
    turned = torch.empty_like(heads)
    half = heads.shape[-1] // 2
    torch.mul(one, cos, out=turned[..., :half]).addcmul_(other, sin, value=-1)
    torch.mul(other, cos, out=turned[..., half:]).addcmul_(one, sin)
    return turned


def gated(gate_up: Tensor, gate: Gate) -> Tensor:
    """act(g) * u of the two halves [T, I] of `gate_up` [T, 2 I]."""
    g, u = gate_up.chunk(2, dim=-1)
    act = F.silu(g) if gate == "silu" else F.gelu(g, approximate="tanh")
    return act.mul_(u)


def norm_linear(
    x: Tensor, norm: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor], fused: Tensor
) -> Tensor:
    """rms_norm(x) times every weight, side by side: [T, sum of outputs], with gradient to x, norm, weights and biases.

    x: [T, D]. norm: [D]. weights: [O_i, D] each. biases: [O_i] each, or none. fused: the weights one under another, [sum O_i, D].
    """
    return _NormLinear.apply(x, norm, eps, fused, len(weights), *weights, *biases)  # type: ignore[no-any-return, no-untyped-call]


def turned(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int) -> Tensor:
    """`rotate` of the first `heads` heads of [N, L, heads * size + rest], in place, with gradient."""
    return _Turned.apply(qkv, cos, sin, heads, size)  # type: ignore[no-any-return, no-untyped-call]


def gated_mlp(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor, fused: Tensor, kind: Gate) -> Tensor:
    """x + (act(n gate') * (n up')) down' with n = rms_norm(x), [T, D], with gradient to all; fused: gate over up, [2 I, D]."""
    return _GatedMlp.apply(x, norm, eps, gate, up, down, fused, kind)  # type: ignore[no-any-return, no-untyped-call]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, fused: Tensor, n: int, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, norm, fused)
        ctx.eps, ctx.sizes, ctx.biased = eps, [len(w) for w in parts[:n]], len(parts) > n
        bias = torch.cat(parts[n:]) if ctx.biased else None
        return F.linear(rms_norm(x, norm, eps), fused, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, fused = ctx.saved_tensors
        n = len(ctx.sizes)
        of_x, of_norm, normed = _norm_backward(grad @ fused, x, norm, ctx.eps)
        of_weights: Sequence[Tensor | None] = [None] * n
        if any(ctx.needs_input_grad[5 : 5 + n]):
            of_weights = (grad.T @ normed).split(ctx.sizes)
        of_biases = grad.sum(dim=0).split(ctx.sizes) if ctx.biased else ()
        return (of_x, of_norm, None, None, None, *of_weights, *of_biases)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.size = heads, size
        ctx.mark_dirty(qkv)
        return _turn(qkv, cos, sin, heads, size)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad.clone(), cos, -sin, ctx.heads, ctx.size), None, None, None, None


def _turn(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int) -> Tensor:
    first = qkv[..., : heads * size].unflatten(-1, (heads, size))
    first.copy_(rotate(first, cos, sin))
    return qkv


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor, fused: Tensor, kind: Gate
    ) -> Tensor:
        gate_up = F.linear(rms_norm(x, norm, eps), fused)
        ctx.save_for_backward(x, norm, down, fused, gate_up)
        ctx.eps, ctx.kind = eps, kind
        return torch.addmm(x, _by_rows(gate_up, kind), down.T)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, down, fused, gate_up = ctx.saved_tensors
        of_gate_up, hidden = _gated_backward(grad @ down, gate_up, ctx.kind)
        of_down = grad.T @ hidden if ctx.needs_input_grad[5] else None
        of_x, of_norm, normed = _norm_backward(of_gate_up @ fused, x, norm, ctx.eps)
        of_gate, of_up = None, None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            of_gate, of_up = (of_gate_up.T @ normed).chunk(2)
        return of_x.add_(grad), of_norm, None, of_gate, of_up, of_down, None, None


def _rows(x: Tensor) -> list[slice]:
    """Blocks of rows to work through; on a card all at once, where every operation costs a launch."""
    step = ROWS if x.device.type == "cpu" else max(len(x), 1)
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _by_rows(gate_up: Tensor, kind: Gate) -> Tensor:
    hidden = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    for rows in _rows(gate_up):
        hidden[rows] = gated(gate_up[rows], kind)
    return hidden


def _gated_backward(grad: Tensor, gate_up: Tensor, kind: Gate) -> tuple[Tensor, Tensor]:
    """The gradient of [T, 2 I] `gate_up` from that of act(g) * u, and act(g) * u itself, which overwrites `grad`."""
    result = torch.empty_like(gate_up)
    size = grad.shape[1]
    for rows in _rows(grad):
        g, u = gate_up[rows].chunk(2, dim=-1)
        act = F.silu(g) if kind == "silu" else F.gelu(g, approximate="tanh")
        torch.mul(grad[rows], act, out=result[rows, size:])
        of_act = grad[rows] * u
        if kind == "silu":
            result[rows, :size] = torch.ops.aten.silu_backward(of_act, g)
        else:
            result[rows, :size] = torch.ops.aten.gelu_backward(of_act, g, approximate="tanh")
        grad[rows] = act.mul_(u)
    return result, grad


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, D], which overwrites `grad`, and of the weight [D], in at least fp32 until the end; and rms_norm(x).

    With r = 1 / sqrt(mean(x^2) + eps), n = x r and s = grad weight: of x, r (s - n mean(s n)); of the weight, the sum of grad n.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    of_weight = torch.zeros(x.shape[1], dtype=wide, device=x.device)
    scale = weight.to(wide)
    normed = torch.empty_like(x)
    for rows in _rows(x):
        n = x[rows].to(wide, copy=True)
        r = n.square().mean(dim=1, keepdim=True).add_(eps).rsqrt_()
        n.mul_(r)
        normed[rows] = n * scale
        s = grad[rows].to(wide, copy=True)
        of_weight += (s * n).sum(dim=0)
        s.mul_(scale)
        s.addcmul_(n, (s * n).mean(dim=1, keepdim=True), value=-1).mul_(r)
        grad[rows] = s
    return grad, of_weight.to(weight.dtype), normed
