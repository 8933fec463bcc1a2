"""That both sides do the same: losses step by step, and greedy answers, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pair import Side, alone, in_turn


@dataclass(frozen=True)
class Check:
    """What was compared, the largest difference found, and what is allowed."""

    check: str
    value: float
    limit: float
    met: bool


def curves(
    ours: Side, peer: Side, logs: Path, steps: int, title: str, names: Sequence[str], limit: float = 1e-2
) -> list[Check]:
    """The largest difference of each metric over `steps` training steps from the same weights on the same rows."""
    one, other = in_turn(ours, peer, logs, steps, warmup=0)
    checks = []
    for name in names:
        gap = max(abs(a[name] - b[name]) for a, b in zip(one.lines, other.lines, strict=True))
        checks.append(Check(f"{title}: {name} over {steps} steps", gap, limit, gap <= limit))
    return checks


def greedy(ours: Side, peer: Side, logs: Path) -> Check:
    """The share of greedy answers that differ in any token."""
    one, other = (alone(side, logs, 1, warmup=0).lines[0]["tokens"] for side in (ours, peer))
    differ = sum(a != b for a, b in zip(one, other, strict=True)) / len(one)
    return Check(f"greedy answers to {len(one)} prompts that differ", differ, 0.0, differ == 0)
