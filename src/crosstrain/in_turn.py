"""Saying a long sequence of stages shortly."""

from __future__ import annotations

from collections.abc import Sequence


def in_turn(names: Sequence[str], then: str = " -> ") -> str:
    """The names in order, what comes more than twice in turn said once.

    >>> in_turn(["sft", "grpo"]), in_turn(["sft", *["dpo", "grpo"] * 3, "sft"])
    ('sft -> grpo', 'sft -> (dpo -> grpo) x 3 -> sft')
    """
    parts: list[str] = []
    at = 0
    while at < len(names):
        period, times = 1, 1
        for n in range(1, (len(names) - at) // 3 + 1):
            again = 1
            while names[at + again * n : at + (again + 1) * n] == names[at : at + n]:
                again += 1
            if again > 2 and again * n > period * times:
                period, times = n, again
        one = then.join(names[at : at + period])
        parts.append(one if times == 1 else f"({one}) x {times}")
        at += period * times
    return then.join(parts)
