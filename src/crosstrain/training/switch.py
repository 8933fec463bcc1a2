"""When a stage ends early, by a metric, and which stage comes after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Watch:
    """What a rule remembers of a metric: the best value so far, and the looks that count against going on.

    Each rule is a pure function from one look to the next; the stage ends when `looks` comes to its patience. A value that is
    NaN is unknown: nothing was seen.
    """

    best: float = math.nan
    looks: int = 0


def plateau(watch: Watch, value: float, *, mode: str, min_delta: float = 0.0) -> Watch:
    """Counts looks since the last improvement by more than `min_delta`.

    >>> watch = Watch()
    >>> for value in (0.5, 0.6, 0.6, 0.59):
    ...     watch = plateau(watch, value, mode="max")
    >>> watch
    Watch(best=0.6, looks=2)
    """
    if math.isnan(value):
        return watch
    if math.isnan(watch.best) or _better_by(value, watch.best, mode) > min_delta:
        return Watch(value, 0)
    return replace(watch, looks=watch.looks + 1)


def peak(watch: Watch, value: float, *, mode: str, min_delta: float = 0.0) -> Watch:
    """Counts looks in a row that were worse than the best so far by more than `min_delta`: the metric has peaked and fallen.

    >>> watch = Watch()
    >>> for value in (0.5, 0.8, 0.79, 0.7, 0.6):
    ...     watch = peak(watch, value, mode="max", min_delta=0.05)
    >>> watch
    Watch(best=0.8, looks=2)
    >>> peak(watch, 0.78, mode="max", min_delta=0.05)
    Watch(best=0.8, looks=0)
    """
    if math.isnan(value):
        return watch
    if math.isnan(watch.best) or _better_by(value, watch.best, mode) >= 0:
        return Watch(value, 0)
    return replace(watch, looks=watch.looks + 1 if _better_by(watch.best, value, mode) > min_delta else 0)


def threshold(watch: Watch, value: float, *, mode: str, reached: float) -> Watch:
    """Counts looks in a row at `reached` or better: a solve rate, say.

    >>> watch = Watch()
    >>> for value in (0.4, 0.9, 0.7, 0.8, 0.9):
    ...     watch = threshold(watch, value, mode="max", reached=0.8)
    >>> watch
    Watch(best=0.9, looks=2)
    """
    if math.isnan(value):
        return watch
    best = value if math.isnan(watch.best) or _better_by(value, watch.best, mode) > 0 else watch.best
    return Watch(best, watch.looks + 1 if _better_by(value, reached, mode) >= 0 else 0)


def look(watch: Watch, value: float, *, rule: str, mode: str, min_delta: float, reached: float | None) -> Watch:
    """One more look by the rule of that name."""
    if rule == "threshold":
        assert reached is not None
        return threshold(watch, value, mode=mode, reached=reached)
    return {"plateau": plateau, "peak": peak}[rule](watch, value, mode=mode, min_delta=min_delta)


def _better_by(value: float, other: float, mode: str) -> float:
    return value - other if mode == "max" else other - value


def stage_after(number: int, comes_again: Sequence[bool]) -> int:
    """Which of a recipe's stages is the one of this number, counted from 0 over all rounds; the length where there is none.

    comes_again: of each stage, whether it is one of the last ones that are repeated until the budget is spent.

    >>> [stage_after(n, [False, True, True]) for n in range(6)], stage_after(3, [False] * 3)
    ([0, 1, 2, 1, 2, 1], 3)
    """
    n = len(comes_again)
    if number < n or not any(comes_again):
        return min(number, n)
    first = list(comes_again).index(True)
    return first + (number - first) % (n - first)
