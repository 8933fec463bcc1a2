"""AdamW under three precision policies, and putting it back exactly."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from crosstrain.testing import tiny_model
from crosstrain.training.optimizer import Optimizer


class Weights(nn.Module):
    """A matrix, which decays, and a vector, which does not."""

    def __init__(self, start: float = 1.0, n: int = 4) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((1, n), start))
        self.bias = nn.Parameter(torch.full((n,), start))


def steps(optimizer: Optimizer, gradients: list[float], rate: float = 1e-2) -> None:
    for g in gradients:
        optimizer.zero_grad()
        sum((g * p).sum() for p in optimizer.trainable.values()).backward()
        optimizer.step(rate)


def test_fp32_is_torchs_adamw_with_decay_on_matrices_only() -> None:
    ours, theirs = Weights(), Weights()
    optimizer = Optimizer(ours, "fp32")
    optimizer.begin(weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    groups = [{"params": [theirs.matrix], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    for g in (0.3, -1.0, 2.0):
        steps(optimizer, [g])
        (g * theirs.matrix.sum() + g * theirs.bias.sum()).backward()
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(ours.matrix, theirs.matrix)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_clipping_returns_the_norm_before_it() -> None:
    model = Weights()
    optimizer = Optimizer(model, "fp32")
    (3.0 * model.matrix.sum() + 4.0 * model.bias.sum()).backward()
    assert optimizer.clip(0) == pytest.approx(10.0) and optimizer.clip(100.0) == pytest.approx(10.0)
    assert optimizer.clip(1.0) == pytest.approx(10.0)
    assert optimizer.clip(0) == pytest.approx(1.0, rel=1e-5)


def test_mixed_keeps_fp32_masters_that_small_updates_reach() -> None:
    """Steps of 1e-4 on a weight of 1 vanish in bf16 (its neighbours are 0.0039 away), and add up in the masters."""
    mixed, plain = Weights(), Weights()
    by_masters, by_bf16 = Optimizer(mixed, "mixed"), Optimizer(plain, "bf16")
    for optimizer in (by_masters, by_bf16):
        steps(optimizer, [1.0] * 50, rate=1e-4)
    assert mixed.matrix.dtype == plain.matrix.dtype == torch.bfloat16
    assert by_masters.weights()["matrix"].dtype == torch.float32
    torch.testing.assert_close(by_masters.weights()["matrix"], torch.full((1, 4), 1 - 50e-4), rtol=0, atol=1e-5)
    assert torch.equal(mixed.matrix, by_masters.weights()["matrix"].bfloat16()) and float(mixed.matrix[0, 0].detach()) < 1
    assert torch.equal(plain.matrix, torch.ones(1, 4, dtype=torch.bfloat16)), "bf16 weights were expected to stand still"


def test_mixed_adds_up_micro_batches_in_fp32() -> None:
    """256 + 1 + 1 + 1 + 1 is 260; in bf16 each 1 would be lost."""
    model = Weights()
    optimizer = Optimizer(model, "mixed")
    for g in (256.0, 1.0, 1.0, 1.0, 1.0):
        (g * model.matrix).sum().backward()
        assert model.matrix.grad is None
    assert float(optimizer.masters["matrix"].grad[0, 0]) == 260.0


def test_mixed_and_fp32_agree_loosely_on_a_language_model() -> None:
    tokens = torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "mixed", "bf16"):
        model = tiny_model(dtype=torch.float32)
        optimizer = Optimizer(model, precision)  # type: ignore[arg-type]
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.clip(1.0)
            optimizer.step(3e-3)
            losses.setdefault(precision, []).append(float(loss.detach()))
    assert losses["fp32"][-1] < 0.5 * losses["fp32"][0]
    assert losses["mixed"][-1] == pytest.approx(losses["fp32"][-1], rel=0.05)
    assert losses["bf16"][-1] < 0.8 * losses["bf16"][0]


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_loading_and_going_on_is_bit_identical(precision: str) -> None:
    """Weights and moments put into a fresh model and optimizer: the next steps are the same to the bit."""

    def fresh(start: float) -> Optimizer:
        optimizer = Optimizer(Weights(start), precision)  # type: ignore[arg-type]
        optimizer.begin(weight_decay=0.1)
        return optimizer

    first = fresh(1.0)
    steps(first, [0.3, -1.0, 2.0])
    weights = {k: v.clone() for k, v in first.weights().items()}
    moments = {k: v.clone() for k, v in first.moments().items()}
    assert {k.partition("/")[2] for k in moments} == {"exp_avg", "exp_avg_sq", "step"}
    second = fresh(5.0)
    second.load(weights, moments)
    for optimizer in (first, second):
        steps(optimizer, [0.7, -0.1])
    for name, value in first.weights().items():
        assert torch.equal(value, second.weights()[name])
        assert torch.equal(first.trainable[name], second.trainable[name])


def test_a_new_stage_may_keep_or_forget_the_moments() -> None:
    optimizer = Optimizer(Weights(), "fp32")
    steps(optimizer, [1.0, 1.0])
    optimizer.begin(restart=False)
    assert float(optimizer.moments()["matrix/step"]) == 2
    optimizer.begin()
    assert optimizer.moments() == {}


def test_setting_weights_reaches_the_computing_copy_and_leaves_moments() -> None:
    model = Weights()
    optimizer = Optimizer(model, "mixed")
    steps(optimizer, [1.0])
    optimizer.set_weights({"matrix": torch.full((1, 4), 3.0), "bias": torch.zeros(4)})
    assert float(model.matrix[0, 0].detach()) == 3.0 and float(optimizer.moments()["matrix/step"]) == 1


def test_frozen_parameters_stand_still() -> None:
    model = Weights()
    optimizer = Optimizer(model, "fp32")
    steps(optimizer, [1.0])
    before = model.matrix.detach().clone()
    (model.matrix.sum() + model.bias.sum()).backward()
    optimizer.freeze(lambda name: name == "matrix")
    moved = model.bias.detach().clone()
    optimizer.step(1e-2)
    assert torch.equal(model.matrix, before) and not torch.equal(model.bias, moved)


def test_only_trainable_parameters_are_held_and_all_are_cast() -> None:
    model = Weights()
    model.bias.requires_grad_(False)
    optimizer = Optimizer(model, "mixed")
    assert list(optimizer.weights()) == ["matrix"]
    assert model.bias.dtype == torch.bfloat16


def test_buffers_keep_their_precision() -> None:
    """Rotary frequencies in bf16 would move every position."""
    model = tiny_model(dtype=torch.float32)
    before = {name: b.clone() for name, b in model.named_buffers()}
    Optimizer(model, "mixed")
    found: dict[str, Tensor] = dict(model.named_buffers())
    assert before and all(torch.equal(before[n], found[n]) and found[n].dtype == torch.float32 for n in before)


def test_an_optimizer_that_is_let_go_frees_its_model() -> None:
    model = nn.Linear(4, 4)
    optimizer = Optimizer(model, "mixed")
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(0.1)
    left = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert left() is None
