"""pass@k against exact combinatorics."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.errors import UserError
from crosstrain.evaluate.pass_at_k import pass_at_k


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int]:
    k = draw(st.integers(1, 40))
    n = draw(st.integers(2 * k, 200))
    return n, draw(st.integers(0, n)), k


@given(cases())
def test_equals_the_exact_fraction(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    exact = 1 - Fraction(comb(n - correct, k), comb(n, k))
    assert pass_at_k(n, correct, k) == pytest.approx(float(exact), abs=1e-13)


@given(cases())
def test_lies_between_pass_at_1_and_1_and_grows_with_right_answers(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    value = pass_at_k(n, correct, k)
    assert correct / n - 1e-12 <= value <= 1.0
    if correct < n:
        assert pass_at_k(n, correct + 1, k) >= value - 1e-12


def test_is_the_share_of_subsets_of_k_samples_with_a_right_one() -> None:
    right = [True, False, False, True, False, False, False, False]
    subsets = list(combinations(right, 3))
    assert pass_at_k(8, 2, 3) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_is_unbiased() -> None:
    # the expectation over the number of right answers, a binomial, is the chance that k independent tries have a success
    n, k, p = 8, 4, 0.3
    expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "correct", "k", "message"),
    [(7, 1, 4, "needs at least 8 samples"), (8, 9, 4, "9 right answers of 8"), (8, -1, 2, "-1 right"), (8, 1, 0, "at least 1")],
)
def test_refuses_what_cannot_be_estimated(n: int, correct: int, k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pass_at_k(n, correct, k)
