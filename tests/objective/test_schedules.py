"""Schedules at their ends, between, and beyond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.objective.schedules import constant, cosine, learning_rate_factor, linear, warmup_cosine


def test_schedules_start_end_and_stay() -> None:
    assert [constant(0.3)(s) for s in (0, 1000)] == [0.3, 0.3]
    for schedule in (linear(0.9, 0.1, 10), cosine(0.9, 0.1, 10)):
        assert [schedule(s) for s in (0, 5, 10, 99)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    for make in (linear, cosine):
        with pytest.raises(ValueError, match="steps"):
            make(1.0, 0.0, 0)


def test_a_warmup_rises_to_the_peak_before_the_cosine() -> None:
    """A quarter of 0.8 a step, then half a cosine over 10 steps: half way at 4 + 5."""
    schedule = warmup_cosine(0.8, 0.2, 4, 10)
    assert [schedule(s) for s in (0, 1, 3, 4, 9, 14, 99)] == pytest.approx([0.0, 0.2, 0.6, 0.8, 0.5, 0.2, 0.2])


def test_the_learning_rate_warms_up_and_then_follows_the_progress() -> None:
    warm = [learning_rate_factor("constant", 0.0, step, 4) for step in range(6)]
    assert warm == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [learning_rate_factor("linear", p, 9, 0) for p in (0, 0.25, 1, 1.5)] == [1, 0.75, 0, 0]
    assert [learning_rate_factor("cosine", p, 9, 0) for p in (0, 0.5, 1)] == [1, 0.5, 0]
    assert learning_rate_factor("linear", 0.5, 0, 2) == 0.25


@given(st.sampled_from(["constant", "linear", "cosine"]), st.floats(-1, 2), st.integers(0, 50), st.integers(0, 50))
def test_the_factor_is_between_0_and_1(kind: str, progress: float, step: int, warmup: int) -> None:
    assert 0 <= learning_rate_factor(kind, progress, step, warmup) <= 1


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        learning_rate_factor("exponential", 0.0, 0, 0)
