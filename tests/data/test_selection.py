"""Choosing informative rows: by hand, and the same choice as a greedy search that works out every determinant."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosstrain.data.selection import any_rows, extreme, most_informative


def naive(embeddings: list[Tensor], size: int, ridge: float) -> tuple[list[int], list[float]]:
    """Straight from the paper: in each round the log det of the design matrix with every row that is left, token by token."""
    design = ridge * torch.eye(embeddings[0].shape[1], dtype=torch.float64)
    chosen: list[int] = []
    gains: list[float] = []
    for _ in range(size):
        best, value = -1, -math.inf
        for i, tokens in enumerate(embeddings):
            if i in chosen:
                continue
            trial = design.clone()
            for x in tokens.double():
                trial += torch.outer(x, x)
            found = float(torch.logdet(trial))
            if found > value:
                best, value = i, found
        gains.append(value - float(torch.logdet(design)))
        for x in embeddings[best].double():
            design += torch.outer(x, x)
        chosen.append(best)
    return chosen, gains


def test_by_hand() -> None:
    """Rows (3, 0), (0, 2), (2, 2) / sqrt 2 twice, (2.5, 0), from V = I. Gains: log 10, log 5, log 5 + log 5 ... worked out below.

    Row 0 adds log(1 + 9); row 1 log(1 + 4); row 2, two tokens of (1, 1), log(1 + 4); row 3 log(1 + 6.25). So 0 is first, and
    V = diag(10, 1). Then row 1 adds log(1 + 4) still, row 2 log(1 + 2 (1/10 + 1)) = log 3.2, row 3 log(1 + 6.25 / 10). So 1 is
    second, V = diag(10, 5); row 2 adds log(1 + 2 (1/10 + 1/5)) = log 1.6, row 3 log 1.625, and is third.
    """
    rows = [[[3.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]], [[2.5, 0.0]]]
    found = most_informative([torch.tensor(r) for r in rows], 3)
    assert found.rows == (0, 1, 3)
    assert found.gains == pytest.approx([math.log(10), math.log(5), math.log(1.625)], abs=1e-12)


def test_the_ridge_matters() -> None:
    """(3, 0) twice against (0, 1): from a small ridge the new direction is worth more than a second look at the old one."""
    rows = [torch.tensor([[3.0, 0.0]]), torch.tensor([[2.9, 0.0]]), torch.tensor([[0.0, 1.0]])]
    assert most_informative(rows, 2, ridge=0.01).rows == (0, 2)  # log(1 + 8.41 / 9.01) against log(101)
    assert most_informative(rows, 2, ridge=100.0).rows == (0, 1)  # log(1 + 8.41 / 109) against log(1.01)


def made_up(seed: int, rows: int, width: int, longest: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
    return [torch.randn(n, width, generator=generator) * (1 + 2 * torch.rand(1, generator=generator)) for n in lengths]


@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from([0.01, 1.0, 50.0]),
    st.data(),
)
def test_the_choice_is_that_of_every_determinant(
    seed: int, rows: int, width: int, longest: int, ridge: float, data: st.DataObject
) -> None:
    embeddings = made_up(seed, rows, width, longest)
    size = data.draw(st.integers(1, rows))
    found = most_informative(embeddings, size, ridge)
    chosen, gains = naive(embeddings, size, ridge)
    assert list(found.rows) == chosen
    assert found.gains == pytest.approx(gains, rel=1e-7, abs=1e-8)
    again = most_informative(embeddings, size, ridge)
    assert found == again


def test_gains_fall_and_most_rows_are_looked_at_once() -> None:
    found = most_informative(made_up(3, 200, 16, 4), 40)
    assert list(found.gains) == sorted(found.gains, reverse=True)
    assert len(set(found.rows)) == 40
    assert found.looks < 200 * 40 / 4
    assert most_informative(made_up(3, 200, 16, 4), 10).rows == found.rows[:10]


def test_of_equal_rows_the_first_is_taken_and_the_next_adds_less() -> None:
    one = torch.tensor([[1.0, 2.0, 0.5]])
    found = most_informative([one, one, one], 3)
    assert found.rows == (0, 1, 2)
    x2 = 1 + 4 + 0.25
    assert found.gains == pytest.approx([math.log(1 + x2), math.log(1 + x2 / (1 + x2)), math.log(1 + x2 / (1 + 2 * x2))])


def test_many_steps_lose_no_precision() -> None:
    """The inverse is never worked out anew: after 300 rank-4 updates the gains still add up to the determinant."""
    embeddings = made_up(5, 300, 24, 4)
    found = most_informative(embeddings, 300)
    design = torch.eye(24, dtype=torch.float64) + sum(x.double().T @ x.double() for x in embeddings)
    assert sum(found.gains) == pytest.approx(float(torch.logdet(design)), rel=1e-9)


@pytest.mark.parametrize("size", [0, 3])
def test_more_than_there_are_cannot_be_chosen(size: int) -> None:
    with pytest.raises(ValueError, match="of 2 rows cannot be chosen"):
        most_informative(made_up(0, 2, 3, 2), size)


def test_the_extremes() -> None:
    assert extreme([1.0, 3.0, 2.0], 2, "highest").rows == (1, 2)
    assert extreme([1.0, 3.0, 2.0], 2, "lowest").rows == (0, 2)


@given(st.integers(1, 30), st.integers(0, 5), st.data())
def test_any_rows_are_different_and_follow_from_the_seed(rows: int, seed: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, rows))
    found = any_rows(rows, size, seed)
    assert len(set(found.rows)) == size and set(found.rows) <= set(range(rows))
    assert found == any_rows(rows, size, seed)
    assert found.rows == any_rows(rows, rows, seed).rows[:size]
