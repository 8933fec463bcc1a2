"""The reward of the GRPO benchmark, called by both sides in TRL's way."""

from __future__ import annotations

import re
from typing import Any


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last whole number of a completion is the answer, else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = [re.findall(r"-?\d+", text) for text in texts]
    return [float(bool(numbers) and numbers[-1] == right) for numbers, right in zip(found, answer, strict=True)]
