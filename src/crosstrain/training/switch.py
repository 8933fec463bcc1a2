"""When a stage ends early: no improvement of a metric for a number of looks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plateau:
    """The best value so far and the looks since.

    >>> p = Plateau()
    >>> for value in (0.5, 0.6, 0.6, 0.59):
    ...     p = p.look(value, mode="max")
    >>> p.best, p.looks
    (0.6, 2)
    """

    best: float = math.nan
    looks: int = 0

    def look(self, value: float, *, mode: str, min_delta: float = 0.0) -> Plateau:
        """After seeing another value; one that is better by more than `min_delta` starts the count anew."""
        gain = value - self.best if mode == "max" else self.best - value
        if math.isnan(self.best) or gain > min_delta:
            return Plateau(value, 0)
        return replace(self, looks=self.looks + 1)
