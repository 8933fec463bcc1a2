"""Streams that draw from several sources by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Protocol

from crosstrain.types import Example


class Source(Protocol):
    """What a mixture draws from."""

    @property
    def examples(self) -> Sequence[Example]:
        """All of them."""
        ...

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        """`n` examples from `position` on, and the position after them."""
        ...


@dataclass(frozen=True)
class Mixture:
    """Several sources as one stream: of its first n examples, whatever n, source i has w_i n / sum(w), rounded down or up.

    Which source comes at a position follows from the weights alone: of those that have had less than their share, the one whose
    next example is due first (Balinski and Young's quota method, which never leaves a share by a whole example). So two windows of
    one length differ by less than two examples of a source, and a weight's decimal digits are taken as they are written. Within a
    source, examples come as they would without the others, each in epochs of its own.

    >>> from crosstrain.data.streams import Stream
    >>> parts = [Stream(name, tuple(Example(f"{name}:{i}", "", (1,)) for i in range(2))) for name in ("a", "b")]
    >>> drawn, position = Mixture("train", ("a", "b"), tuple(parts), (3.0, 1.0)).draw(0, 8)
    >>> [e.id[0] for e in drawn]
    ['a', 'a', 'a', 'b', 'a', 'a', 'a', 'b']
    """

    name: str
    labels: tuple[str, ...]
    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """Those of all sources, one source after the other."""
        return tuple(e for source in self.sources for e in source.examples)

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        """`n` examples from `position` on, and the position after them."""
        places = [self._schedule.at(at) for at in range(position, position + n)]
        drawn = []
        for k, source in enumerate(self.sources):
            mine = [at for who, at in places if who == k]  # neighbours in the source, since all of its examples come in order
            drawn.append(iter(source.draw(mine[0], len(mine))[0] if mine else []))
        return [next(drawn[who]) for who, _ in places], position + n

    def counts(self, position: int, n: int) -> dict[str, int]:
        """How many of the `n` examples from `position` on are of each source."""
        who = [self._schedule.at(at)[0] for at in range(position, position + n)]
        return {label: who.count(k) for k, label in enumerate(self.labels)}

    def epochs(self, position: int) -> Mapping[str, float]:
        """Passes over each source before `position`."""
        rounds, inside = divmod(position, self._schedule.period)
        who = [self._schedule.at(at)[0] for at in range(inside)]
        return {
            label: (rounds * self._schedule.weights[k] + who.count(k)) / len(self.sources[k].examples)
            for k, label in enumerate(self.labels)
        }

    @cached_property
    def _schedule(self) -> _Schedule:
        exact = [Fraction(repr(w)) for w in self.weights]
        whole = [int(w * math.lcm(*(f.denominator for f in exact))) for w in exact]
        return _Schedule(tuple(w // math.gcd(*whole) for w in whole))


@dataclass
class _Schedule:
    """Which source comes when, for whole weights without a common divisor; worked out as far as it was asked for."""

    weights: tuple[int, ...]
    _places: list[tuple[int, int]] = field(default_factory=list)
    _had: list[int] = field(default_factory=list)

    @property
    def period(self) -> int:
        """Positions after which it starts again."""
        return sum(self.weights)

    def at(self, position: int) -> tuple[int, int]:
        """The source of a position, and the position in that source."""
        rounds, inside = divmod(position, self.period)
        while len(self._places) <= inside:
            self._next()
        who, rank = self._places[inside]
        return who, rounds * self.weights[who] + rank

    def _next(self) -> None:
        had = self._had = self._had or [0] * len(self.weights)
        n, period = len(self._places) + 1, self.period
        behind = [k for k, w in enumerate(self.weights) if had[k] * period < w * n]
        who = min(behind, key=lambda k: (Fraction(had[k] + 1, self.weights[k]), k))
        self._places.append((who, had[who]))
        had[who] += 1
