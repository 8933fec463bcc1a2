"""Streams in which what is easy, or hard, comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crosstrain.types import Example

Pacing = Literal["linear", "sqrt", "sorted"]


def ranking(difficulty: Sequence[float], direction: Literal["easy_first", "hard_first"]) -> tuple[int, ...]:
    """Indices from what comes first to what comes last; equals stay in their order.

    >>> ranking([2.0, 1.0, 2.0], "easy_first"), ranking([2.0, 1.0, 2.0], "hard_first")
    ((1, 0, 2), (0, 2, 1))
    """
    sign = 1 if direction == "easy_first" else -1
    return tuple(sorted(range(len(difficulty)), key=lambda i: (sign * difficulty[i], i)))


@dataclass(frozen=True)
class Curriculum:
    """Examples by difficulty, in an order that is a pure function of (seed, position) (competence-based, arXiv:1903.09848).

    Of N examples, the draw at position t < T = until N is uniform over the first c(t) N of the ranking, rounded up:

        linear: c(t) = start + (1 - start) t / T        sqrt: c(t) = sqrt(start^2 + (1 - start^2) t / T)

    so that rows may come again while others wait. From T on, every example comes once an epoch, shuffled anew. `sorted` has no pool
    and T = 0: every epoch has every example once, in the order of the ranking.

    ranking: indices into `examples`, what comes first at its beginning.
    """

    name: str
    examples: tuple[Example, ...]
    ranking: tuple[int, ...]
    pacing: Pacing = "linear"
    start: float = 0.1
    until: float = 1.0
    seed: int = 0

    @property
    def paced(self) -> int:
        """Positions until every example is in the pool."""
        return 0 if self.pacing == "sorted" else math.ceil(self.until * len(self.examples))

    def pool(self, position: int) -> int:
        """How many examples, from the ranking's first, can come at a position.

        >>> c = Curriculum("train", (Example("a", "", ()),) * 10, tuple(range(10)), start=0.2, until=0.8)
        >>> [c.pool(t) for t in range(9)]
        [2, 3, 4, 5, 6, 7, 8, 9, 10]
        """
        if position >= self.paced:
            return len(self.examples)
        gone = position / self.paced
        if self.pacing == "sqrt":
            share = math.sqrt(self.start**2 + (1 - self.start**2) * gone)
        else:
            share = self.start + (1 - self.start) * gone
        return min(math.ceil(share * len(self.examples) - 1e-9), len(self.examples))

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        """`n` examples from `position` on, and the position after them."""
        size, orders = len(self.examples), {}
        drawn = []
        for at in range(position, position + n):
            if at < self.paced:
                rank = int(np.random.default_rng([self.seed, 1, at]).integers(self.pool(at)))
            else:
                epoch, rank = divmod(at - self.paced, size)
                if self.pacing != "sorted":
                    if epoch not in orders:
                        orders[epoch] = np.random.default_rng([self.seed, 0, epoch]).permutation(size).tolist()
                    rank = orders[epoch][rank]
            drawn.append(self.examples[self.ranking[rank]])
        return drawn, position + n
