"""Each fused part against the same computed by autograd, operation by operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from crosstrain import fused
from crosstrain.fused import Gate, gated_mlp, norm_linear, rotate, turned


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    g = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    gradients = (torch.autograd.grad(out, inputs, g, retain_graph=True) for out in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@given(
    tokens=st.integers(1, 7),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    biased=st.booleans(),
    rows=st.integers(1, 8),
)
def test_a_norm_and_several_linears(tokens: int, parts: list[int], biased: bool, rows: int) -> None:
    x, norm, *rest = numbers(tokens, (tokens, 6), (6,), *((p, 6) for p in parts), *((p,) for p in parts))
    weights, biases = rest[: len(parts)], rest[len(parts) :] if biased else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "ROWS", rows)  # blocks of any size give the same
        found = norm_linear(x, norm, 1e-3, weights, biases, torch.cat([w.detach() for w in weights]))
        n = plain_norm(x, norm, 1e-3)
        expected = torch.cat([F.linear(n, w, b) for w, b in zip(weights, biases or [None] * len(parts), strict=True)], dim=1)
        assert_same(found, expected, [x, norm, *weights, *biases])


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [2, 256])
def test_a_gated_mlp(kind: Gate, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ROWS", rows)
    x, norm, gate, up, down = numbers(1, (5, 6), (6,), (4, 6), (4, 6), (6, 4))
    found = gated_mlp(x, norm, 1e-3, gate, up, down, torch.cat([gate, up]).detach(), kind)
    n = plain_norm(x, norm, 1e-3)
    act = F.silu(n @ gate.T) if kind == "silu" else F.gelu(n @ gate.T, approximate="tanh")
    assert_same(found, x + (act * (n @ up.T)) @ down.T, [x, norm, gate, up, down])


def test_heads_are_turned_by_their_positions_and_what_follows_them_stays() -> None:
    (qkv,) = numbers(2, (2, 3, 14))  # two heads of four, and six numbers that are no part of them
    angles = torch.arange(6, dtype=torch.float64).view(1, 3, 2)
    found = turned(qkv.clone(), angles.cos(), angles.sin(), 2, 4)
    heads = qkv[..., :8].view(2, 3, 2, 2, 2)  # [N, L, H, half, D / 2]
    expected = torch.view_as_complex(torch.stack([heads[..., 0, :], heads[..., 1, :]], dim=-1))
    expected = expected * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    whole = torch.cat([torch.cat([expected.real, expected.imag], dim=-1).flatten(2), qkv[..., 8:]], dim=2)
    assert_same(found, whole, [qkv])
    qkv = qkv.detach()
    back = rotate(rotate(qkv[..., :8].view(2, 3, 2, 4), angles.cos(), angles.sin()), angles.cos(), -angles.sin())
    torch.testing.assert_close(back.flatten(2), qkv[..., :8])


def test_frozen_weights_get_no_gradient_and_cost_none() -> None:
    x, norm, gate, up, down = numbers(3, (5, 6), (6,), (4, 6), (4, 6), (6, 4))
    frozen: list[Any] = [w.detach() for w in (norm, gate, up, down)]
    out = gated_mlp(x, frozen[0], 1e-3, *frozen[1:], torch.cat(frozen[1:3]), "silu")
    (found,) = torch.autograd.grad(out.sum(), x)
    whole = gated_mlp(x, norm, 1e-3, gate, up, down, torch.cat([gate, up]).detach(), "silu")
    (expected,) = torch.autograd.grad(whole.sum(), x)
    assert torch.equal(found, expected)
