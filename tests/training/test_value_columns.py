"""Columns of methods with a critic: one look at the batch gives all of them, whatever the micro-batches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.testing import made_up_batch, made_up_value_head, tiny_model
from crosstrain.training import columns
from crosstrain.training.batching import distinct_tokens
from crosstrain.training.columns import add_columns
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine
from crosstrain.training.optimizer import Optimizer


def engine_of(model: Any, head: nn.Linear | None, **more: Any) -> Engine:
    return Engine(
        model=model,
        parameters=1,
        layout="shared",
        device=torch.device("cpu"),
        streams={},
        reference=lambda: nullcontext(model),
        value_head=head,
        **more,
    )


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_batch_is_scored_once_by_the_policy_and_once_by_the_reference(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    method = load_method("ppo", num_generations=2, num_ppo_epochs=epochs)
    plain = replace(made_up_batch(method, model), columns={})
    calls: list[bool] = []
    scores = columns.no_grad_scores

    def counted(*args: Any, watch: bool = False, **more: Any) -> Any:
        calls.append(watch)
        return scores(*args, watch=watch, **more)

    monkeypatch.setattr(columns, "no_grad_scores", counted)
    batch, cost = add_columns(engine_of(model, made_up_value_head(model)), method, plain, Cost())
    assert sorted(calls) == [False, True]
    assert cost.processed_tokens == 2 * distinct_tokens(plain)
    assert ("old_logp" in batch.columns) == (epochs == 2)
    assert {"old_value", "ref_logp", "returns"} <= set(batch.columns)


def test_old_values_are_the_heads_whatever_the_micro_batches() -> None:
    model = tiny_model()
    head = made_up_value_head(model)
    method = load_method("ppo", num_generations=2, kl_coef=0.0)
    plain = replace(made_up_batch(method, model), columns={})
    found = [
        add_columns(engine_of(model, head, micro_batch_tokens=n), method, plain, Cost())[0].columns["old_value"]
        for n in (1, 60, 10**6)
    ]
    for r in range(len(plain)):
        n = int(plain.length[r])
        hidden = model.model(plain.tokens[r : r + 1, :n]).last_hidden_state[0]
        before = head(hidden)[:-1, 0].detach()
        own = plain.trained[r, 1:n]
        for one in found:
            torch.testing.assert_close(one[r, 1:n][own], before[own], rtol=0, atol=1e-10)


def test_a_method_with_values_and_no_head_is_an_error() -> None:
    method = load_method("ppo", num_generations=2, kl_coef=0.0)
    model = tiny_model()
    with pytest.raises(UserError, match="method ppo reads values, and the model was given no value head"):
        add_columns(engine_of(model, None), method, made_up_batch(method, model), Cost())


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_the_head_is_trained_in_fp32_at_its_own_rate(precision: Any) -> None:
    """AdamW's first step is the learning rate in size: 0.1 for a weight of the model, 10 times that for the head."""
    model = tiny_model(dtype=torch.float32)
    head = made_up_value_head(model)
    optimizer = Optimizer(model, precision, head)
    optimizer.begin(value_factor=10.0)
    before = {n: w.clone() for n, w in optimizer.weights().items()}
    assert head.weight.dtype == torch.float32 and "value_head.weight" in before
    hidden = model.model(torch.tensor([[1, 2, 3]])).last_hidden_state
    head(hidden.float()).sum().backward()
    optimizer.step(0.1)
    after = optimizer.weights()
    moved = (after["value_head.weight"] - before["value_head.weight"]).abs()
    assert moved.max() == pytest.approx(1.0, rel=1e-3)
    body = float((after["model.norm.weight"] - before["model.norm.weight"]).abs().max())
    assert body == pytest.approx(0.1, rel=2**-6 if precision == "bf16" else 1e-3)  # 1 - 0.1 rounded to bf16's 8 bits
    assert "value_head.weight/exp_avg" in optimizer.moments()
    assert head.weight.data_ptr() == optimizer.masters["value_head.weight"].data_ptr()
