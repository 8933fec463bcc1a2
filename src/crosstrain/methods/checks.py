"""What methods share of refusing settings: each message names the setting, what was got, and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTS = ("num_generations", "num_iterations", "minibatches", "num_ppo_epochs", "num_mini_batches", "epochs")
"""Settings that are a number of something in every method that has them, and so at least 1."""


def counts(settings: Mapping[str, Any]) -> None:
    """ValueError when one of `COUNTS` among the settings is a whole number below 1; what a method means by None is its business."""
    at_least(1, **{name: settings[name] for name in COUNTS if isinstance(settings.get(name), int)})


def at_least(lowest: float, **settings: float) -> None:
    """ValueError when one of the settings is below `lowest`.

    >>> at_least(2, num_generations=1)
    Traceback (most recent call last):
    ValueError: num_generations: got 1; it must be at least 2
    """
    for name, value in settings.items():
        if not value >= lowest:
            raise ValueError(f"{name}: got {value}; it must be at least {lowest:g}")


def positive(**settings: float) -> None:
    """ValueError when one of the settings is not above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value}; it must be positive")


def clip(*, high: float | None = None, dual_clip: float | None = None, **low: float) -> None:
    """ValueError when the bounds of PPO's clip are none: `low`, under the name of the setting, is how far below 1 a ratio may be,
    and how far above it too unless `high` (the setting `epsilon_high`) says another.

    >>> clip(epsilon=-0.1)
    Traceback (most recent call last):
    ValueError: epsilon: got -0.1; it must be in (0, 1)
    """
    [(name, value)] = low.items()
    if not 0 < value < 1:
        raise ValueError(f"{name}: got {value}; it must be in (0, 1)")
    if high is not None and not high > 0:
        raise ValueError(f"epsilon_high: got {high}; it must be positive")
    above = value if high is None else high
    if dual_clip is not None and not dual_clip > 1 + above:
        raise ValueError(
            f"dual_clip: got {dual_clip}; it must be above the clip's own upper bound, {1 + above:g}, or None for no dual clip"
        )


def several(num_generations: int, why: str) -> None:
    """ValueError when a group would be a single completion, from which, for the reason given, nothing could be learned.

    >>> several(1, "a mean of one leaves no advantage")
    Traceback (most recent call last):
    ValueError: num_generations: got 1; a mean of one leaves no advantage, so it must be at least 2
    """
    if num_generations < 2:
        raise ValueError(f"num_generations: got {num_generations}; {why}, so it must be at least 2")


EQUAL = "the rewards of a single completion are all equal, and such a group is dropped"
"""Why `several` refuses where `plans.drop_equal_rewards` selects."""


def inert(why: str, **settings: tuple[Any, Any]) -> None:
    """ValueError when one of the settings, each given as (value, default), is not its default although nothing reads it.

    >>> inert("bounds is 'cap'", epsilon=(0.1, 0.2))
    Traceback (most recent call last):
    ValueError: epsilon: got 0.1, which has no effect, as bounds is 'cap'; leave it out
    """
    for name, (value, default) in settings.items():
        if value != default:
            raise ValueError(f"{name}: got {value}, which has no effect, as {why}; leave it out")
