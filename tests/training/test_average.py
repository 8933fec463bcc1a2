"""An average of past weights: the numbers, and a model that computes with them."""

from __future__ import annotations

import torch

from crosstrain.testing import made_up_value_head, tiny_model
from crosstrain.training.average import Average
from crosstrain.training.optimizer import Optimizer


def test_it_goes_a_share_of_the_way_and_its_model_computes_with_it() -> None:
    model = tiny_model(dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(tokens).logits
    average = Average(model, dict(model.named_parameters()))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: p + 1.0 for name, p in start.items()}
    average.follow(moved, 0.25)
    average.follow(moved, 0.25)
    for name, w in average.weights.items():
        torch.testing.assert_close(w, start[name] + 1 - 0.75**2)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)
        for name, p in model.named_parameters():
            p.copy_(average.weights[name])
        with average.opened() as averaged:
            torch.testing.assert_close(averaged(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert not any(p.requires_grad for p in averaged.parameters())


def test_what_follows_a_model_in_bf16_keeps_full_precision() -> None:
    """Steps too small for bf16 add up."""
    model = tiny_model(dtype=torch.float32)
    optimizer = Optimizer(model, "mixed")
    average = Average(model, optimizer.weights())
    start = {name: w.clone() for name, w in average.weights.items()}
    moved = {name: w + 1.0 for name, w in optimizer.weights().items()}
    for _ in range(100):
        average.follow(moved, 1e-4)
    for name, w in average.weights.items():
        assert w.dtype == torch.float32 and average.model.get_parameter(name).dtype == torch.bfloat16
        torch.testing.assert_close(w, start[name] + 1 - (1 - 1e-4) ** 100, rtol=1e-4, atol=1e-5)
        assert torch.equal(average.model.get_parameter(name), w.bfloat16())


def test_a_small_rate_moves_it_under_plain_bf16_and_a_value_head_is_no_part_of_it() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    head = made_up_value_head(model)
    optimizer = Optimizer(model, "bf16", head)
    start = {name: w.float().clone() for name, w in optimizer.weights().items()}
    average = Average(model, optimizer.weights())
    assert average.weights.keys() == dict(model.named_parameters()).keys()
    moved = {name: w * 1.02 for name, w in optimizer.weights().items()}
    for _ in range(20):
        average.follow(moved, 0.01)
    for name, w in average.weights.items():
        torch.testing.assert_close(w, start[name] + (moved[name].float() - start[name]) * (1 - 0.99**20))
