"""Reward functions that need no file of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from crosstrain.tasks.arithmetic import parse_number
from crosstrain.tasks.registry import completion_text


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the reply is the column `answer`, spaces around both aside, else 0.

    >>> exact_match(completions=["Paris", "It is Paris"], answer=["Paris", "Paris"])
    [1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [float(completion_text(c).strip() == str(a).strip()) for c, a in pairs]


def number_match(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the whole number that the reply is, or ends with after =, :, "is" or "equals", is the column `answer`, else 0.

    >>> number_match(completions=["2 + 2 = 4", "4 or 5"], answer=["4", 4])
    [1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [float(parse_number(completion_text(c)) == str(a).strip()) for c, a in pairs]


BUILT_IN: Mapping[str, Callable[..., list[float | None]]] = {"exact_match": exact_match, "number_match": number_match}
