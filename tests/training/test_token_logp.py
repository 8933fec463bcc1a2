"""token_logp against log_softmax and autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosstrain.testing import tiny_model
from crosstrain.training import token_logp as module
from crosstrain.training.token_logp import token_logp

V, D = 37, 8


def inputs(m: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (m,), generator=g), torch.randn(m, generator=g, dtype=torch.float64)


def by_autograd(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logp = torch.log_softmax(hidden @ weight.T / temperature, dim=1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(dim=1), logp.argmax(dim=1) == targets


@given(m=st.integers(0, 9), seed=st.integers(0, 99), temperature=st.sampled_from([1.0, 0.6, 1.7]), kept=st.booleans())
def test_values_and_gradients_are_those_of_log_softmax(m: int, seed: int, temperature: float, kept: bool) -> None:
    hidden, weight, targets, g = inputs(m, seed=seed)
    expected = by_autograd(hidden, weight, targets, temperature)
    wanted = torch.autograd.grad(expected[0], (hidden, weight), g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 4)
        patch.setattr(module, "BLOCK", 3)
        patch.setattr(module, "CAST_ROWS", 5)
        patch.setattr(module, "KEPT_BYTES", 2**20 if kept else -1)
        found = token_logp(hidden, weight, targets, temperature)
        got = torch.autograd.grad(found.logp, (hidden, weight), g)
    for one, other in zip((found.logp, found.entropy, *got), (*expected[:2], *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert torch.equal(found.correct, expected[2])


def test_a_confident_token_keeps_its_gradient_in_bf16() -> None:
    """1 - p = 6e-4 is less than half of the distance between 1 and the bf16 number below it."""
    hidden = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.078125, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    found = token_logp(hidden, weight, torch.tensor([0]))
    [of_weight] = torch.autograd.grad(found.logp.sum(), weight)
    rest = 1 / (1 + math.exp(8 * (1 - 0.078125)))
    assert of_weight[0, 0].item() == pytest.approx(8 * rest, rel=0.01)
    assert of_weight[1, 0].item() == pytest.approx(-8 * rest, rel=0.01)


@pytest.mark.parametrize("kept", [True, False])
def test_bf16_gives_fp32_log_probs_and_gradients_near_those_of_fp32(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    monkeypatch.setattr(module, "CAST_ROWS", 5)  # the weight is cast in eight parts
    monkeypatch.setattr(module, "KEPT_BYTES", 2**20 if kept else -1)
    hidden, weight, targets, g = inputs(64, torch.bfloat16)
    exact_hidden, exact_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    expected = by_autograd(exact_hidden, exact_weight, targets, 1.0)
    found = token_logp(hidden, weight, targets)
    assert found.logp.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logp, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy, expected[1], rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(expected[0], (exact_hidden, exact_weight), g.float())
    for one, other in zip(torch.autograd.grad(found.logp, (hidden, weight), g.float()), wanted, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.01


def test_backward_twice_is_an_error_and_not_a_wrong_gradient() -> None:
    hidden, weight, targets, _ = inputs(3)
    total = token_logp(hidden, weight, targets).logp.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("asked", [True, False])
def test_probabilities_are_kept_only_where_a_gradient_may_be_asked_for(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    hidden, weight, targets, _ = inputs(9)
    monkeypatch.setattr(module, "CHUNK", 4)
    sizes: list[tuple[Any, ...]] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: sizes.append(size) or empty(*size, **more))
    with torch.set_grad_enabled(asked):
        token_logp(hidden, weight, targets)
    assert ((9, V) in sizes) == asked and (4, V) in sizes


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, targets, g = inputs(5)
    wanted = torch.autograd.grad(by_autograd(hidden, weight, targets, 1.0)[0], (hidden, weight), g)
    fixed, free = (hidden, weight) if frozen == "hidden" else (weight, hidden)
    fixed.requires_grad_(False)
    token_logp(hidden, weight, targets).logp.backward(g)
    assert fixed.grad is None
    torch.testing.assert_close(free.grad, wanted[1 if frozen == "hidden" else 0], rtol=0, atol=1e-12)


def test_only_heads_that_are_one_matrix_are_plain() -> None:
    from crosstrain.head import plain_head

    model = tiny_model(vocab_size=V)
    assert plain_head(model) is model.lm_head.weight
    model.config.final_logit_softcapping = 30.0
    assert plain_head(model) is None
    hooked = tiny_model(vocab_size=V)
    hooked.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    assert plain_head(hooked) is None
    biased = tiny_model(vocab_size=V)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    assert plain_head(biased) is None
