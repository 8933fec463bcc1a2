"""Reward functions by name. Light on purpose: the processes that score import this, and no torch."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from crosstrain.errors import UserError, nearest
from crosstrain.rewards.model import ModelReward, is_model

FORMS = "a built-in name, file.py:function, package.module:function, task:NAME, or a reward model (a folder, or a hub id)"


@dataclass(frozen=True)
class Reward:
    """A reward function by its spec; the code behind it is loaded where it is called, not before.

    spec: see `load_reward`. config: settings of the task in `task:NAME`.

    >>> Reward("exact_match")(prompts=["2+2="], completions=["4"], completion_ids=[[4]], answer=["4"])
    [1.0]
    """

    spec: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What metrics call it: the function's or the task's name."""
        return self.spec.rpartition(":")[2]

    def __call__(self, **columns: Any) -> list[float | None]:
        """Scores from TRL's keywords: prompts, completions, completion_ids and every extra column."""
        scores: list[float | None] = find_function(self.spec, self.config)(**columns)
        return scores


def load_reward(spec: str, **config: Any) -> Reward | ModelReward:
    """The reward function that `spec` names: a built-in name, `path/to/file.py:function`, `package.module:function`, `task:NAME`
    for the reward of a task with the settings `config`, or a reward model's folder or hub id.

    Raises UserError for a spec of no known form, an unknown built-in, a file that is not there, a folder that holds no reward
    model, and settings for anything but a task. Whether the function itself exists is seen where it is loaded: at the start of a
    `RewardPool`, or in the first call.
    """
    kind, _, name = spec.rpartition(":")
    if config and kind != "task":
        raise UserError(f"reward {spec}: only task:NAME takes settings; got {', '.join(sorted(config))}")
    if not kind:
        from crosstrain.rewards.builtin import BUILT_IN

        if name not in BUILT_IN and is_model(spec):
            return ModelReward(spec)
        if name not in BUILT_IN:
            raise UserError(f"unknown reward {spec!r}; {nearest(spec, BUILT_IN)}; other forms: {FORMS}")
    elif not name.isidentifier():
        raise UserError(f"reward {spec!r}: {name!r} is no name of a function; a reward is {FORMS}")
    elif kind.endswith(".py"):
        if not Path(kind).expanduser().is_file():
            raise UserError(f"reward {spec}: there is no file {kind}")
    elif kind == "task":
        from crosstrain.tasks import get_task

        get_task(name, **config)
    elif not re.fullmatch(r"\w+(\.\w+)*", kind):
        raise UserError(f"reward {spec!r}: {kind!r} is neither a .py file nor a module; a reward is {FORMS}")
    try:
        json.dumps(config)
    except TypeError as error:
        raise UserError(f"reward {spec}: its settings must be JSON values: {error}") from error
    return Reward(spec, config)


def find_function(spec: str, config: Mapping[str, Any]) -> Callable[..., Any]:
    """The function itself. Raises UserError when it is missing or cannot be called as TRL calls rewards."""
    kind, _, name = spec.rpartition(":")
    if kind == "task":
        from crosstrain.tasks import get_task

        return get_task(name, **config).reward
    if not kind:
        from crosstrain.rewards.builtin import BUILT_IN

        return BUILT_IN[name]
    module = _from_file(Path(kind).expanduser()) if kind.endswith(".py") else _from_module(spec, kind)
    function = getattr(module, name, None)
    if not callable(function):
        others = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        hint = nearest(name, others) if others else "it defines no function"
        raise UserError(f"reward {spec}: {kind} has no function {name!r}; {hint}")
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        raise UserError(
            f"reward {spec}: {name} must take **kwargs, since it gets prompts, completions, completion_ids and every extra column "
            f"as keywords; it is {name}{inspect.signature(function)}"
        )
    return function


def _from_file(file: Path) -> ModuleType:
    name = f"reward_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look modules up by name
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # for what the file imports from its own folder
    spec.loader.exec_module(module)
    return module


def _from_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"reward {spec}: {error}; it must be importable from here or be given as file.py:function") from error
