"""At the very bound: what a clip, a correction or a check does with a number that is exactly its limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crosstrain.objective.denominators import capped, clipped_sequence, floored, shaped, shaped_behaviour
from crosstrain.objective.gates import correction, ppo_clip, soft, token_clip, unlikely
from crosstrain.objective.schedules import constant, cosine, learning_rate_factor, linear, warmup_cosine
from crosstrain.testing import tiny_batch
from crosstrain.types import Batch


def rows(**columns: list[float]) -> Batch:
    """One row per number, of one prompt token and one own token; `advantage` and columns by row."""
    n = len(next(iter(columns.values())))
    batch = tiny_batch([0.0] * n, [0] * n, tokens=1)
    wide = {
        name: torch.tensor(values, dtype=torch.float64)[:, None].expand(batch.tokens.shape) for name, values in columns.items()
    }
    if "advantage" in wide:
        batch = replace(batch, advantage=wide.pop("advantage"))
    return batch.with_columns(**wide)


def last(found: Tensor) -> list[float]:
    return found[:, -1].tolist()


def test_a_token_exactly_at_gmpos_bound_is_open() -> None:
    batch = rows(advantage=[1.0, -1.0], old_logp=[-0.5, 0.5])
    zeros = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    assert last(token_clip(0.5, 0.5)(zeros, zeros, batch, batch.trained)) == [1.0, 1.0]


def test_a_token_exactly_at_the_dual_bound_is_open() -> None:
    batch = rows(advantage=[-1.0, 0.0])
    three = torch.full(batch.tokens.shape, 3.0, dtype=torch.float64)
    assert last(ppo_clip(0.2, 0.2, dual=3.0)(three, three.log(), batch, batch.trained)) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "apart", "kept"),
    [
        ("none", [math.log(4.0), 0.0], [1.0, 1.0]),
        ("truncate", [math.log(4.0), math.log(0.125), math.log(2.0)], [2.0, 0.125, 2.0]),
        ("mask", [0.0, math.log(4.0), math.log(0.25)], [1.0, 0.0, 0.0]),
        ("sequence_mask", [0.0, math.log(4.0), math.log(0.25)], [1.0, 0.0, 0.25]),
    ],
)
def test_a_correction_by_how_far_sampler_and_trainer_are_apart(kind: Any, apart: list[float], kept: list[float]) -> None:
    batch = rows(behaviour_logp=[-x for x in apart])
    zeros = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    assert last(correction(kind, 2.0, 0.5)(zeros, batch, batch.trained)) == pytest.approx(kept)


def test_a_correction_keeps_what_is_exactly_at_its_bounds() -> None:
    """The exponential of 0 is exactly 1, which is here the cap, and there the lowest."""
    batch = rows(behaviour_logp=[0.0])
    zeros = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    assert last(correction("mask", 1.0, 0.5)(zeros, batch, batch.trained)) == [1.0]
    assert last(correction("mask", 2.0, 1.0)(zeros, batch, batch.trained)) == [1.0]


def test_a_sequences_correction_is_of_its_own_tokens_alone() -> None:
    """Two own tokens a factor 2 apart each make 4; what the column says of the prompt is not read."""
    batch = tiny_batch([0.0], [0], tokens=2).with_columns(behaviour_logp=torch.tensor([[50.0, -math.log(2.0), -math.log(2.0)]]))
    zeros = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    assert last(correction("sequence_mask", 5.0)(zeros, batch, batch.trained)) == pytest.approx([4.0])
    assert last(correction("sequence_mask", 3.0)(zeros, batch, batch.trained)) == [0.0]


def test_gmpos_mean_is_of_a_sequences_own_tokens_and_cut_on_one_side() -> None:
    """log(pi / old) = 1 and -2 with a bound of 0.5: cut above for A > 0, below for A < 0, nowhere for A = 0."""
    batch = tiny_batch([0.0] * 3, [0] * 3, tokens=2)
    old = torch.tensor([[9.0, -1.0, 2.0]] * 3, dtype=torch.float64)
    batch = replace(batch.with_columns(old_logp=old), advantage=torch.tensor([[1.0], [-1.0], [0.0]]).expand(3, 3))
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    rho = -clipped_sequence(0.5, 0.5)(zeros, batch, batch.trained)
    assert rho[:, -1].tolist() == pytest.approx([(0.5 - 2) / 2, (1 - 0.5) / 2, (1 - 2) / 2])


REFUSED: list[Callable[[], Any]] = [
    lambda: ppo_clip(0.2, 0.2, dual=1.2),
    lambda: token_clip(0.4, 0.0),
    lambda: token_clip(0.0, 0.4),
    lambda: unlikely(0.0),
    lambda: correction("truncate", 0.0),
    lambda: correction("mask", 0.5, 0.5),
    lambda: correction("mask", 2.0, -0.5),
    lambda: soft(positive=0.0),
    lambda: soft(negative=0.0),
    lambda: shaped(0.0),
    lambda: shaped_behaviour(0.0),
    lambda: floored(0.0),
    lambda: floored(1.5),
    lambda: capped(None, 0.0),
    lambda: capped(2.0, 2.0),
    lambda: capped(-0.5, 2.0),
    lambda: linear(1.0, 0.0, 0),
    lambda: cosine(1.0, 0.0, 0),
    lambda: warmup_cosine(1.0, 0.0, -1, 1),
    lambda: warmup_cosine(1.0, 0.0, 0, 0),
]


@pytest.mark.parametrize("make", REFUSED, ids=range(len(REFUSED)))
def test_a_setting_at_a_limit_that_is_not_allowed_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        make()


def test_settings_at_a_limit_that_is_allowed_are_taken() -> None:
    assert floored(1.0) and capped(0.0, 2.0) and correction("mask", 2.0, 0.0) and ppo_clip(0.2, 0.2, dual=1.25)
    assert linear(1.0, 0.0, 1)(1) == 0.0 and cosine(1.0, 0.0, 1)(1) == 0.0 and warmup_cosine(1.0, 0.5, 0, 1)(0) == 1.0
    assert constant(0.5)(7) == 0.5


@pytest.mark.parametrize(
    ("progress", "step", "factor"), [(-1.0, 0, 1.0), (0.0, 0, 1.0), (0.25, 9, 0.75), (1.0, 9, 0.0), (2.0, 9, 0.0)]
)
def test_a_stages_progress_outside_0_and_1_counts_as_its_ends(progress: float, step: int, factor: float) -> None:
    assert learning_rate_factor("linear", progress, step, 0) == factor


def test_warmup_rises_by_equal_parts_and_then_stays() -> None:
    assert [learning_rate_factor("constant", 0.5, step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
