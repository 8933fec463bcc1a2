"""Formulas in words: what a gate, a denominator, an advantage or a normaliser is called in tables and pages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Part = TypeVar("Part", bound=Callable[..., Any])


def says(words: str) -> Callable[[Part], Part]:
    """Mark a part of an objective with its formula, for `words_of`.

    >>> words_of(says("max(R, 0)")(lambda batch: batch.reward))
    'max(R, 0)'
    """

    def mark(part: Part) -> Part:
        part.__dict__["words"] = words
        return part

    return mark


def words_of(part: Callable[..., Any]) -> str:
    """The formula that `says` gave to a part; else what the first line of its docstring says; empty where it has none.

    A `functools.partial` over some authors' trajectories says so.
    """
    if isinstance(part, functools.partial):
        over = part.keywords.get("over")
        whose = {"EXPERT": "the demonstration", "POLICY": "the rollouts"}
        names = [] if over is None else [text for name, text in whose.items() if name in {source.name for source in over}]
        return words_of(part.func) + (f", taken over {' and '.join(names)}" if names else "")
    words = getattr(part, "words", None)
    return str(words) if words is not None else (part.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")
