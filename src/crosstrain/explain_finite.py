"""Which of the given numbers make a result that is no number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crosstrain.errors import UserError
from crosstrain.explain_given import LOG_PROBS, GivenTrajectory
from crosstrain.types import Batch

READ = (*LOG_PROBS, "entropy", "value", "old_value")

SHOWN = 3
"""Trajectories, and tokens of each, that a message names."""


def check_finite(
    name: str,
    batch: Batch,
    losses: Mapping[str, float],
    weights: Sequence[Tensor],
    at: Sequence[tuple[int, int]],
    rows: Sequence[GivenTrajectory],
) -> None:
    """UserError where a loss, a weight or an advantage is not finite, with the trajectories and the tokens' numbers behind it."""
    bad = torch.zeros_like(batch.trained)
    for weight in weights:
        bad |= ~torch.isfinite(weight)
    credit = torch.isinf(batch.advantage) & batch.trained
    if not bool(bad.any()) and not bool(credit.any()) and all(map(math.isfinite, losses.values())):
        return
    what = next((f"loss {term}" for term, loss in losses.items() if not math.isfinite(loss)), "weight of a token")
    hit = bad | credit if bool((bad | credit).any()) else batch.trained
    found = [r for r in range(len(rows)) if bool(hit[r].any())]
    found.sort(key=lambda r: -max(_size(rows[r], t) for t in _tokens(hit[r])))
    told = "; ".join(f"groups.{at[r][0]}.trajectories.{at[r][1]} {_numbers(rows[r], _tokens(hit[r]))}" for r in found[:SHOWN])
    unscored = [f"groups.{at[r][0]}.trajectories.{at[r][1]}" for r in found if rows[r].reward is None]
    if unscored and bool(torch.isnan(batch.advantage[hit]).any()):
        raise UserError(
            f"method {name} needs `reward`, which is absent from {', '.join(unscored[:SHOWN])} (a demonstration counts as right "
            "beside rollouts alone, and there are none)"
        )
    raise UserError(
        f"the {what} of method {name} is not finite: {told}. Log-probs of exactly 0 (a probability of 1), and ones further than "
        "about 700 from each other, leave the range of numbers: give log-probs that a model could have found, and rewards of a "
        "usual size"
    )


def _tokens(hit: Tensor) -> list[int]:
    return [int(t) for t in torch.nonzero(hit).flatten()]


def _size(row: GivenTrajectory, t: int) -> float:
    """How far a token's numbers are from each other, or from what is usual."""
    known = [values[t] for name in READ if (values := getattr(row, name)) is not None]
    return max(known) - min(known) if len(known) > 1 else abs(known[0])


def _numbers(row: GivenTrajectory, tokens: Sequence[int]) -> str:
    worst = sorted(sorted(tokens, key=lambda t: -_size(row, t))[:SHOWN])

    def of(t: int) -> str:
        known: dict[str, Any] = {name: values[t] for name in READ if (values := getattr(row, name)) is not None}
        return f"token {t}: " + ", ".join(f"{name} {value:g}" for name, value in known.items())

    reward = "" if row.reward is None else f"reward {row.reward:g}, "
    more = f" and {len(tokens) - len(worst)} more" if len(tokens) > len(worst) else ""
    return f"({reward}{'; '.join(map(of, worst))}{more})"
