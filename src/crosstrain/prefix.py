"""What sequences have in common at their start, which can be computed once for all of them."""

from __future__ import annotations

from collections.abc import Sequence


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences start with alike. Of sequences in sorted order, the first and the last have what all have.

    >>> common_start((5, 6, 7), (5, 6, 8, 9)), common_start((5, 6), (5, 6, 7)), common_start((), (1,))
    (2, 2, 0)
    """
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)
