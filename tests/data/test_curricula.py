"""Curricula: which rows can come when, and draws from any position."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.data.curricula import Curriculum, Pacing, ranking
from crosstrain.types import Example


def curriculum(n: int, pacing: Pacing = "linear", start: float = 0.2, until: float = 1.0, seed: int = 0) -> Curriculum:
    """Rows whose number is their rank from the end, so that a mistaken index shows."""
    examples = tuple(Example(f"train:{i}", "", (1,)) for i in range(n))
    return Curriculum("train", examples, tuple(reversed(range(n))), pacing, start, until, seed)


def ranks(c: Curriculum, position: int, n: int) -> list[int]:
    where = {c.examples[i].id: rank for rank, i in enumerate(c.ranking)}
    return [where[e.id] for e in c.draw(position, n)[0]]


def test_the_ranking_by_hand() -> None:
    assert ranking([3.0, 1.0, 2.0, 1.0], "easy_first") == (1, 3, 2, 0)
    assert ranking([3.0, 1.0, 2.0, 1.0], "hard_first") == (0, 2, 1, 3)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_the_ranking_has_every_row_once_and_in_order(difficulty: list[float]) -> None:
    directions: tuple[Literal["easy_first", "hard_first"], ...] = ("easy_first", "hard_first")
    for direction, sign in zip(directions, (1, -1), strict=True):
        found = ranking(difficulty, direction)
        assert sorted(found) == list(range(len(difficulty)))
        values = [sign * difficulty[i] for i in found]
        assert values == sorted(values)


def test_pools_by_hand() -> None:
    linear = curriculum(10, "linear", start=0.1, until=2.0)  # from 1 row to 10 over 20 draws: c = 0.1 + 0.045 t
    assert [linear.pool(t) for t in (0, 1, 2, 3, 10, 19, 20, 99)] == [1, 2, 2, 3, 6, 10, 10, 10]
    root = curriculum(10, "sqrt", start=0.1, until=2.0)  # c = sqrt(0.01 + 0.0495 t)
    assert [root.pool(t) for t in (0, 1, 5, 10, 19, 20)] == [1, 3, 6, 8, 10, 10]
    assert root.pool(5) == math.ceil(10 * math.sqrt(0.01 + 0.99 * 5 / 20))
    assert curriculum(10, "sorted").paced == 0


@given(
    st.integers(1, 20),
    st.sampled_from(["linear", "sqrt", "sorted"]),
    st.sampled_from([0.01, 0.1, 1 / 3, 0.5, 0.9]),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.lists(st.integers(1, 13), min_size=1, max_size=6),
    st.integers(0, 60),
)
def test_any_way_of_drawing_gives_the_same_order(
    n: int, pacing: Pacing, start: float, until: float, draws: list[int], at: int
) -> None:
    whole, end = curriculum(n, pacing, start, until).draw(at, sum(draws))
    position, parts = at, []
    for size in draws:  # a new stream each time, as after a resume
        drawn, position = curriculum(n, pacing, start, until).draw(position, size)
        parts += drawn
    assert ([e.id for e in parts], position) == ([e.id for e in whole], end)


@given(st.integers(1, 20), st.sampled_from(["linear", "sqrt"]), st.sampled_from([0.01, 0.3, 0.9]), st.integers(0, 3))
def test_a_row_comes_only_once_it_is_in_the_pool(n: int, pacing: Pacing, start: float, seed: int) -> None:
    c = curriculum(n, pacing, start, until=1.5, seed=seed)
    pools = [c.pool(t) for t in range(c.paced + 3)]
    assert pools == sorted(pools) and pools[0] == max(math.ceil(start * n - 1e-9), 1) and pools[c.paced] == n
    assert all(rank < pool for rank, pool in zip(ranks(c, 0, len(pools)), pools, strict=True))


@given(st.integers(1, 20), st.sampled_from(["linear", "sqrt", "sorted"]), st.integers(0, 3))
def test_every_row_comes_once_an_epoch_when_all_are_in(n: int, pacing: Pacing, seed: int) -> None:
    c = curriculum(n, pacing, until=0.7, seed=seed)
    for epoch in range(3):
        found = ranks(c, c.paced + epoch * n, n)
        assert sorted(found) == list(range(n))
        assert pacing != "sorted" or found == list(range(n))


def test_a_pool_is_drawn_from_evenly_and_by_seed() -> None:
    """2,000 draws while half of 10 rows are in the pool: 400 of each row, with a standard deviation of 18."""
    c = curriculum(10, start=0.45, until=10**6)
    counts = Counter(ranks(c, 0, 2000))
    assert set(counts) == set(range(5))
    assert all(abs(counts[rank] - 400) < 5 * 18 for rank in range(5))
    assert ranks(c, 0, 20) != ranks(curriculum(10, start=0.45, until=10**6, seed=1), 0, 20)
    orders = {tuple(ranks(curriculum(20, seed=s), 20 + 20 * epoch, 20)) for s in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize("pacing", ["linear", "sqrt", "sorted"])
def test_easy_rows_come_sooner(pacing: Pacing) -> None:
    c = curriculum(100, pacing, start=0.05)
    found = ranks(c, 0, 100)
    assert sum(found[:30]) / 30 < sum(found[70:]) / 30 - 20
