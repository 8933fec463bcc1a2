"""A method's state as a batch file gives it: completed with what it is at first, and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from crosstrain.errors import UserError, nearest
from crosstrain.types import Method

KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "a number, or null",
}
"""What a value of the state must be, by the type of the first one; null stands for a number that is not known yet."""


def state_of(method: Method, given: Mapping[str, Any] | None, *, groups: int) -> dict[str, Any]:
    """The state that a step begins with: what is given, over `method.init()` and what plans find beside it (seed, batch_size).

    Raises UserError for keys that are not there, for values of another type than the first, and for what the method cannot use.
    """
    first = dict(method.init())
    known = {"seed": 0, "batch_size": groups, **first}
    for key, value in (given or {}).items():
        if key not in known:
            own = "" if first else f" (method {method.name} keeps nothing from step to step)"
            raise UserError(f"state: unknown key {key!r}{own}; {nearest(key, known)}")
        if not _alike(value, known[key]):
            kind = KINDS.get(type(known[key]), type(known[key]).__name__)
            raise UserError(f"state.{key}: got {value!r}; it must be {kind}, as at first ({known[key]!r})")
        if not _finite(value):
            raise UserError(f"state.{key}: got a number in it that is not finite; give finite numbers")
    state = {**known, **(given or {})}
    try:
        method.at(state), method.plan.streams(state)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"state: method {method.name} cannot use {dict(given or {})} ({error}); give together what a run has at one step"
        ) from error
    return state


def _alike(value: Any, first: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if first is None:
        return value is None or number
    return number if type(first) is float else type(value) is type(first)


def _finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
