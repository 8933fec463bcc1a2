"""How a recipe scores completions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from crosstrain.config.fields import STRICT, Count, Number, Positive, named


def _function_name(value: Any) -> Any:
    """A function as `file.py:function`: rewards run in processes of their own, which load it from there."""
    if not callable(value):
        return value
    function = inspect.unwrap(value)
    name = getattr(function, "__qualname__", repr(function))
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    if not (file.endswith(".py") and Path(file).is_file() and name.isidentifier()):
        raise ValueError(
            f"got {name} from {file or 'nowhere'}; a reward runs in another process, which loads it from a .py file: "
            "give a function that stands at the top level of one"
        )
    return f"{Path(file).resolve()}:{name}"


class RewardSpec(BaseModel):
    """One reward function and its weight. A bare string is its name."""

    model_config = STRICT
    name: Annotated[str, BeforeValidator(_function_name)] = Field(
        description="Built-in reward, `file.py:function`, `task` (the reward of the data's task), or a reward model: the folder or "
        "hub id of a sequence classifier with one label. In Python, a function."
    )
    weight: Number = Field(1.0, description="Factor of this score in the weighted sum.")

    _short = model_validator(mode="before")(lambda value: {"name": value} if callable(value) else named("name", value))


class RewardsSpec(BaseModel):
    """How completions are scored. A bare list (or a single one) is the list of functions."""

    model_config = STRICT
    functions: list[RewardSpec] = Field(default_factory=lambda: [RewardSpec(name="task")], min_length=1)
    timeout_s: Positive = Field(10.0, description="Seconds one reward call may take before its process is killed.")
    on_error: Literal["raise", "missing"] = Field(
        "raise", description="A failing reward stops the run (raise) or counts as no score (missing)."
    )
    workers: Count = Field(1, description="Child processes that score.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str) or callable(value) or (isinstance(value, Mapping) and "name" in value):
            return {"functions": [value]}
        return {"functions": value} if isinstance(value, list) else value
