"""Numbers that change over training: functions of the optimizer step (0 at the first)."""

from __future__ import annotations

import math

from crosstrain.types import Schedule


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` in a straight line over `steps` steps, then `end`.

    >>> [linear(1.0, 0.0, 4)(s) for s in (0, 2, 9)]
    [1.0, 0.5, 0.0]
    """
    if steps < 1:
        raise ValueError(f"linear: got steps={steps}; it must be at least 1")
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` along half a cosine over `steps` steps, then `end`.

    >>> [round(cosine(1.0, 0.0, 4)(s), 3) for s in (0, 2, 4)]
    [1.0, 0.5, 0.0]
    """
    if steps < 1:
        raise ValueError(f"cosine: got steps={steps}; it must be at least 1")
    return lambda step: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def warmup_cosine(peak: float, valley: float, warmup: int, decay: int) -> Schedule:
    """From 0 to `peak` over `warmup` steps, then along half a cosine to `valley` over `decay` steps, then `valley`.

    >>> [round(warmup_cosine(0.9, 0.1, 2, 4)(s), 3) for s in (0, 1, 2, 4, 99)]
    [0.0, 0.45, 0.9, 0.5, 0.1]
    """
    if warmup < 0 or decay < 1:
        raise ValueError(f"warmup_cosine: got warmup={warmup}, decay={decay}; warmup must be 0 or more, decay at least 1")
    falling = cosine(peak, valley, decay)
    return lambda step: peak * step / warmup if step < warmup else falling(step - warmup)


def learning_rate_factor(kind: str, progress: float, step: int, warmup_steps: int) -> float:
    """What the learning rate is multiplied with: linear warmup over `warmup_steps`, then `kind` over the stage.

    kind: "constant", "linear" (to 0) or "cosine" (to 0). progress: share of the stage that is done, 0 to 1, so that a stage
    that ends by budget has a schedule too. The first of w warmup steps has factor 1 / w, never 0.

    >>> learning_rate_factor("cosine", 0.5, 50, 10), learning_rate_factor("constant", 0.0, 0, 4)
    (0.5, 0.25)
    """
    warm = min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
    progress = min(max(progress, 0.0), 1.0)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }
    if kind not in shape:
        raise ValueError(f"lr_scheduler_type: got {kind!r}; allowed: {', '.join(shape)}")
    return warm * round(shape[kind], 12)
