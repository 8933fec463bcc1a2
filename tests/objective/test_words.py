"""What parts of an objective are called: their formula, their docstring's first line, and whose trajectories they are over."""

from __future__ import annotations

from functools import partial

import pytest

from crosstrain.objective.words import says, words_of
from crosstrain.types import Batch, Source


@says("f")
def marked(batch: Batch, over: tuple[Source, ...] = (), power: float = 1.0) -> None:
    """Not this line."""


def plain(batch: Batch) -> None:
    """This line.

    And not this one.
    """


def test_the_formula_comes_before_the_docstring() -> None:
    assert words_of(marked) == "f" and words_of(plain) == "This line" and words_of(lambda batch: batch) == ""


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ((Source.POLICY,), "f, taken over the rollouts"),
        ((Source.EXPERT,), "f, taken over the demonstration"),
        ((Source.POLICY, Source.EXPERT), "f, taken over the demonstration and the rollouts"),
        ((Source.TOOL,), "f"),
    ],
)
def test_whose_trajectories_a_part_is_taken_over(over: tuple[Source, ...], words: str) -> None:
    assert words_of(partial(marked, over=over)) == words
    assert words_of(partial(marked, power=2.0)) == "f"
