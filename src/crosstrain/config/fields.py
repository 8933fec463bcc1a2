"""The kinds of values that settings have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from crosstrain.rollout.sampler import LEAST_TEMPERATURE

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

FOR_HASH = "for a hash"
"""Context of a serialization that is hashed: settings that change no result are left out."""

Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]
Temperature = Annotated[float, Field(ge=LEAST_TEMPERATURE, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True, description="Seed of the random numbers.")]
Flag = Annotated[bool, Field(strict=True)]
TaskConfig = Annotated[dict[str, Any], Field(description="Settings of the task, by name.")]


def named(key: str, value: Any) -> Any:
    """A bare string as the mapping of one key that it is short for."""
    return {key: value} if isinstance(value, str) else value
