"""Credit from rewards: golden numbers, published identities, properties over random groups."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.objective import advantages
from crosstrain.testing import tiny_batch
from crosstrain.training.batching import to_batch
from crosstrain.types import Batch, Example, Group, Source, Trajectory

GROUPED = st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), min_size=1, max_size=4)


def batch_of(rewards: list[list[float]]) -> Batch:
    flat = [r for group in rewards for r in group]
    return tiny_batch(flat, [g for g, group in enumerate(rewards) for _ in group])


def mixed_group(demonstration: float, own: list[float]) -> Batch:
    prompt = Source.PROMPT
    expert = Trajectory((1, 2), (prompt, Source.EXPERT), reward=demonstration)
    return to_batch(
        [Group(Example("a", "", (1,)), (expert, *(Trajectory((1, 2), (prompt, Source.POLICY), reward=r) for r in own)))]
    )


def test_group_normalised_by_hand() -> None:
    """Rewards 1, 0, 0: mean 1/3, variance (4/9 + 1/9 + 1/9)/2 = 1/3. A = (2/3, -1/3, -1/3) / sqrt(1/3)."""
    found = advantages.group_normalised(tiny_batch([1.0, 0.0, 0.0], [0, 0, 0]))
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3]) / (math.sqrt(1 / 3) + 1e-6)
    torch.testing.assert_close(found, expected)


def test_the_std_has_n_minus_1() -> None:
    rewards = [0.0, 1.0, 2.0, 5.0]
    found = advantages.group_normalised(tiny_batch(rewards, [0] * 4), std_eps=0.0)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    assert found.tolist() == pytest.approx([(r - mean) / std for r in rewards])


def test_whose_mean_is_the_baseline() -> None:
    """A demonstration with reward 1 and two failed rollouts: mean 1/3 over all, 0 over rollouts, 1 over demonstrations."""
    batch = mixed_group(1.0, [0.0, 0.0])
    both = advantages.centred(batch)
    assert both.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert advantages.centred(batch, over=(Source.POLICY,)).tolist() == [1, 0, 0]
    assert advantages.centred(batch, over=(Source.EXPERT,)).tolist() == [0, -1, -1]
    assert advantages.centred(batch, over=(Source.TOOL,)).tolist() == [1, 0, 0]


@given(GROUPED)
def test_centred_advantages_sum_to_zero_in_every_group(rewards: list[list[float]]) -> None:
    batch = batch_of(rewards)
    for advantage in (advantages.centred(batch), advantages.group_normalised(batch), advantages.leave_one_out(batch)):
        for g, group in enumerate(rewards):
            scale = 1 + float(advantage[batch.group == g].abs().max())
            if len(group) > 1:
                assert abs(float(advantage[batch.group == g].sum())) < 1e-5 * scale


@given(GROUPED)
def test_leave_one_out_is_centred_times_n_over_n_minus_1(rewards: list[list[float]]) -> None:
    batch = batch_of(rewards)
    n = torch.tensor([float(len(group)) for group in rewards for _ in group])
    alone = n == 1
    expected = torch.where(alone, batch.reward, advantages.centred(batch) * n / (n - 1).clamp(min=1))
    torch.testing.assert_close(advantages.leave_one_out(batch), expected, rtol=1e-5, atol=1e-5)


@given(GROUPED, st.floats(-5, 5, width=16))
def test_a_constant_added_to_every_reward_of_a_group_changes_nothing(rewards: list[list[float]], shift: float) -> None:
    several = [group for group in rewards if len(group) > 1]
    one, other = batch_of(several), batch_of([[r + shift for r in group] for group in several])
    if several:
        for function in (advantages.centred, advantages.leave_one_out):
            torch.testing.assert_close(function(one), function(other), rtol=1e-4, atol=1e-5)


@given(st.floats(-10, 10, width=32), st.integers(2, 16))
def test_equal_rewards_have_no_advantage_at_all(reward: float, n: int) -> None:
    batch = tiny_batch([reward] * n, [0] * n)
    for function in (advantages.centred, advantages.group_normalised, advantages.leave_one_out):
        assert function(batch).tolist() == [0.0] * n


@given(GROUPED, st.randoms())
def test_rows_may_come_in_any_order_and_groups_under_any_number(rewards: list[list[float]], random) -> None:
    batch = batch_of(rewards)
    order = list(range(len(batch)))
    random.shuffle(order)
    shuffled = replace(batch.rows(torch.tensor(order)), group=batch.group[order] * 7 + 3)
    for function in (advantages.centred, advantages.group_normalised, advantages.leave_one_out):
        torch.testing.assert_close(function(shuffled), function(batch)[order])


@pytest.mark.parametrize("function", [advantages.centred, advantages.group_normalised, advantages.leave_one_out])
def test_an_unknown_reward_stays_unknown(function) -> None:
    """It makes its whole group unknown, and no other."""
    found = function(tiny_batch([math.nan, 1.0, 1.0, 0.0], [0, 0, 1, 1]))
    assert torch.isnan(found[:2]).all() and torch.isfinite(found[2:]).all()


def test_the_simple_ones() -> None:
    batch = tiny_batch([-1.0, 0.5, 2.0], [0, 0, 1])
    assert advantages.raw_reward(batch).tolist() == [-1, 0.5, 2]
    assert advantages.positive_reward(batch).tolist() == [0, 0.5, 2]
    assert advantages.ones(batch).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "function",
    [functools.partial(advantages.centred, over=(Source.POLICY,)), advantages.group_normalised, advantages.leave_one_out],
)
def test_advantages_come_in_the_rewards_dtype(function) -> None:
    batch = tiny_batch([1.0, 0.0], [0, 0])
    assert function(batch).dtype == torch.float32
    assert function(replace(batch, reward=batch.reward.double())).dtype == torch.float64
