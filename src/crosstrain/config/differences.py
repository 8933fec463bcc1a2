"""In which settings two configurations differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def differences(there: Any, here: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The settings in which two configurations differ, as (dotted key, there, here); None where a key is missing.

    >>> differences({"budget": {"amount": 1.0}, "seeds": [0]}, {"budget": {"amount": 2.0}, "seeds": [0, 1]})
    [('budget.amount', 1.0, 2.0), ('seeds', [0], [0, 1])]
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        pairs = [(str(key), there.get(key), here.get(key)) for key in sorted({*there, *here})]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    else:
        return [] if there == here else [(path, there, here)]
    return [found for key, a, b in pairs for found in differences(a, b, f"{path}.{key}" if path else key)]


def say_differences(there: Any, here: Any, show: int = 3) -> str:
    """The same for people, the first few of them."""
    found = differences(there, here)
    said = [f"{key} is {_short(a)} there and {_short(b)} here" for key, a, b in found[:show]]
    return ", ".join(said) + (f", and {len(found) - show} more settings differ" if len(found) > show else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
