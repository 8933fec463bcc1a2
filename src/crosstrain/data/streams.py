"""Named, seekable streams of examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosstrain.errors import UserError
from crosstrain.types import Example


@dataclass(frozen=True)
class Stream:
    """Examples in an order that is a pure function of (seed, position): shuffled anew each epoch, resumable from a number.

    >>> from crosstrain.types import Example
    >>> s = Stream("train", tuple(Example(f"train:{i}", "", (1,)) for i in range(3)), seed=0)
    >>> drawn, position = s.draw(0, 3)
    >>> sorted(e.id for e in drawn), position, s.epoch(position)
    (['train:0', 'train:1', 'train:2'], 3, 1)
    """

    name: str
    examples: tuple[Example, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError(f"data stream {self.name!r} has no examples")

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        """`n` examples from `position` on, and the position after them."""
        size = len(self.examples)
        orders: dict[int, list[int]] = {}
        drawn = []
        for at in range(position, position + n):
            epoch = at // size
            if epoch not in orders:
                orders[epoch] = self._order(epoch)
            drawn.append(self.examples[orders[epoch][at % size]])
        return drawn, position + n

    def epoch(self, position: int) -> int:
        """Whole passes over the examples before `position`."""
        return position // len(self.examples)

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples)).tolist()
        return order
