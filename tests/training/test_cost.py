"""Costs by hand: 6 N flops per token forward and backward, 2 N forward only, shared prompts once per pass."""

from __future__ import annotations

import pytest

from crosstrain.training.cost import COST_UNITS, Cost


def test_a_step_by_hand() -> None:
    """N = 10. Two prompts of 3 tokens sampled into 8 tokens; a reference pass and an update over the same 14."""
    cost = Cost().sampled(prefill=6, generated=8, parameters=10).forward(14, 10).forward_backward(14, 10)
    assert cost.processed_tokens == 14 + 14 + 14
    assert cost.generated_tokens == 8
    assert cost.flops == 2 * 10 * 14 + 2 * 10 * 14 + 6 * 10 * 14
    assert cost.used_demonstrations(2).used_demonstrations(1).demonstrations == 3
    assert cost.took(1.5).took(0.5).seconds == 2.0


def test_costs_only_grow_and_never_touch_each_other() -> None:
    cost = Cost(1, 2, 3.0, 4, 5.0)
    assert cost.used_demonstrations(1) == Cost(1, 2, 3.0, 5, 5.0)
    assert cost.forward(2, 1) == Cost(3, 2, 7.0, 4, 5.0)


def test_every_budget_unit_is_a_logged_cost() -> None:
    logged = Cost(1, 2, 3.0, 4, 5.0).as_metrics()
    assert logged == {f"cost/{n}": pytest.approx(i) for n, i in zip((*COST_UNITS, "seconds"), (1, 2, 3, 4, 5), strict=True)}
