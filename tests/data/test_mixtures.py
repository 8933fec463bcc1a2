"""Mixtures: shares to a whole example, the sources' own order, and draws from any position."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.data.mixtures import Mixture
from crosstrain.data.streams import Stream
from crosstrain.types import Example


def source(k: int, size: int) -> Stream:
    return Stream(f"{k}", tuple(Example(f"{k}:{i}", "", (1,)) for i in range(size)), seed=k)


def mixture(weights: tuple[float, ...], sizes: tuple[int, ...]) -> Mixture:
    labels = tuple(str(k) for k in range(len(weights)))
    return Mixture("train", labels, tuple(source(k, n) for k, n in enumerate(sizes)), weights)


def who(mixed: Mixture, position: int, n: int) -> str:
    return "".join(e.id[0] for e in mixed.draw(position, n)[0])


def test_by_hand() -> None:
    """Weights 2, 1, 1. Due are (had + 1) / weight: 1/2, 1, 1 -> 0; then 0 has its share of 2 examples (1 of 1), so 1; at the third
    0 may have 1.5 and has 1, and is due at 1, as 2 is: the first of them; then 2."""
    assert who(mixture((2.0, 1.0, 1.0), (3, 3, 3)), 0, 8) == "01020102"
    assert who(mixture((1.0, 1.0), (3, 3)), 0, 6) == "010101"
    assert who(mixture((0.1, 0.3), (3, 3)), 0, 8) == who(mixture((1.0, 3.0), (3, 3)), 0, 8) == "11011101"


weights = st.lists(st.sampled_from([0.1, 0.25, 0.3, 1.0, 2.0, 3.0, 7.0, 12.5]), min_size=2, max_size=5).map(tuple)


@given(weights, st.integers(0, 150), st.integers(1, 60))
def test_shares_are_exact_up_to_rounding(given_weights: tuple[float, ...], start: int, n: int) -> None:
    mixed = mixture(given_weights, tuple(range(2, 2 + len(given_weights))))
    shares = [Fraction(str(w)) for w in given_weights]
    total = sum(shares)
    for end in range(1, 40):
        counts = mixed.counts(0, end)
        assert all(abs(counts[str(k)] - s / total * end) < 1 for k, s in enumerate(shares))
    counts = mixed.counts(start, n)
    assert sum(counts.values()) == n
    assert all(abs(counts[str(k)] - s / total * n) < 2 for k, s in enumerate(shares))


@given(weights, st.lists(st.integers(1, 13), min_size=1, max_size=6), st.integers(0, 200))
def test_any_way_of_drawing_gives_the_same_order(given_weights: tuple[float, ...], draws: list[int], start: int) -> None:
    sizes = tuple(range(2, 2 + len(given_weights)))
    whole, end = mixture(given_weights, sizes).draw(start, sum(draws))
    position, parts = start, []
    for size in draws:  # a new stream each time, as after a resume
        drawn, position = mixture(given_weights, sizes).draw(position, size)
        parts += drawn
    assert ([e.id for e in parts], position) == ([e.id for e in whole], end)


@given(weights)
def test_each_source_comes_as_it_would_alone(given_weights: tuple[float, ...]) -> None:
    sizes = tuple(range(2, 2 + len(given_weights)))
    drawn = [e.id for e in mixture(given_weights, sizes).draw(0, 200)[0]]
    for k, size in enumerate(sizes):
        mine = [i for i in drawn if i.startswith(f"{k}:")]
        assert mine == [e.id for e in source(k, size).draw(0, len(mine))[0]]
        for epoch in range(len(mine) // size):  # so no row is lost or repeated within an epoch
            assert len(set(mine[epoch * size : (epoch + 1) * size])) == size


def test_epochs_are_counted_per_source() -> None:
    mixed = mixture((3.0, 1.0), (2, 4))
    assert mixed.epochs(0) == {"0": 0.0, "1": 0.0}
    assert mixed.epochs(8) == {"0": 3.0, "1": 0.5}
    assert mixed.epochs(9) == {"0": 3.5, "1": 0.5}


def test_examples_are_those_of_all_sources() -> None:
    mixed = mixture((1.0, 9.0), (2, 3))
    assert [e.id for e in mixed.examples] == ["0:0", "0:1", "1:0", "1:1", "1:2"]


@pytest.mark.parametrize("given_weights", [(1 / 3, 2 / 3), (3.14159, 2.71828), (1e-3, 1.0)])
def test_weights_of_many_digits_have_their_share_far_out(given_weights: tuple[float, ...]) -> None:
    mixed = mixture(given_weights, (5, 5))
    n, total = 3001, sum(given_weights)
    counts = mixed.counts(0, n)
    assert all(abs(counts[str(k)] - w / total * n) < 1 for k, w in enumerate(given_weights))
