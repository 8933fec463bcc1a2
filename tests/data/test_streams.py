"""Streams: every example once an epoch, in an order that (seed, position) alone decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.data.streams import Stream
from crosstrain.errors import UserError
from crosstrain.types import Example


def stream(n: int, seed: int = 0) -> Stream:
    return Stream("train", tuple(Example(f"train:{i}", "", (1,)) for i in range(n)), seed)


def ids(examples: list[Example]) -> list[str]:
    return [e.id for e in examples]


@given(st.integers(1, 20), st.integers(0, 5), st.lists(st.integers(1, 13), min_size=1, max_size=6))
def test_any_way_of_drawing_gives_the_same_order(n: int, seed: int, draws: list[int]) -> None:
    whole, _ = stream(n, seed).draw(0, sum(draws))
    position, parts = 0, []
    for size in draws:  # a new stream each time, as after a resume
        drawn, position = stream(n, seed).draw(position, size)
        parts += drawn
    assert (ids(parts), position) == (ids(whole), sum(draws))


@given(st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_has_every_example_once(n: int, seed: int) -> None:
    s = stream(n, seed)
    for epoch in range(3):
        drawn, end = s.draw(epoch * n, n)
        assert sorted(ids(drawn)) == sorted(ids(list(s.examples)))
        assert (s.epoch(end - 1), s.epoch(end)) == (epoch, epoch + 1)


def test_epochs_and_seeds_shuffle_anew() -> None:
    orders = [ids(stream(30, seed).draw(30 * epoch, 30)[0]) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(UserError, match="data stream 'train' has no examples"):
        stream(0)
