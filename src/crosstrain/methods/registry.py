"""How a method is named, made from settings, and found again from a record."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from crosstrain.errors import UserError, nearest
from crosstrain.methods.checks import counts
from crosstrain.types import Method

Factory = Callable[..., Method]

Family = Literal["supervised", "rejection sampling", "preference", "reinforcement learning", "hybrid", "distillation"]

Checked = Literal["official source", "port", "paper", "reconstructed"]
"""What a method was written from: its authors' code, a framework's, the paper alone, or descriptions by others."""

DIRECTIONS: dict[Family, str] = {
    "supervised": "(RL ->) SFT",
    "rejection sampling": "(RL ->) SFT",
    "preference": "preference",
    "reinforcement learning": "(SFT ->) RL",
    "hybrid": "SFT+RL",
    "distillation": "distillation",
}
"""Where the survey (arXiv:2603.13985, Table 1) puts a family: what helps what. It has no row for distillation."""


@dataclass(frozen=True)
class Entry:
    """A registered method: its factory, where it was published, the family it is listed under, what helps what in it, and what it
    was written from.

    works, fails: when the literature finds that it helps, and when not, with arXiv numbers. deviates: where ours differs from the
    paper or its code, and what of it is a guess. Empty where nothing is known, or nothing differs.
    """

    name: str
    factory: Factory
    paper: str
    family: Family
    direction: str
    checked: Checked
    year: int
    works: str = ""
    fails: str = ""
    deviates: str = ""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The factory's keyword arguments and their defaults (the published settings)."""
        return {name: p.default for name, p in inspect.signature(self.factory).parameters.items()}


METHODS: dict[str, Entry] = {}


def method(
    *,
    paper: str,
    family: Family,
    checked: Checked = "official source",
    direction: str | None = None,
    year: int | None = None,
    works: str = "",
    fails: str = "",
    deviates: str = "",
) -> Callable[[Factory], Factory]:
    """Register a factory under its own name, and let what it makes record that name and all its settings.

    direction: the family's, unless given. year: that of the arXiv number, unless given. works, fails, deviates: see `Entry`.
    """
    when = year if year is not None else 2000 + int(paper.removeprefix("arXiv:")[:2])

    def register(factory: Factory) -> Factory:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def make(**settings: Any) -> Method:
            bound = signature.bind(**settings)
            bound.apply_defaults()
            counts(bound.arguments)
            return replace(factory(**settings), name=factory.__name__, settings=dict(bound.arguments), paper=paper)

        survey = direction or DIRECTIONS[family]
        entry = Entry(factory.__name__, make, paper, family, survey, checked, when, works, fails, deviates)
        METHODS[factory.__name__] = entry
        return make

    return register


def load_method(name: str, **settings: Any) -> Method:
    """The method called `name` with `settings`, its defaults the published ones.

    name: one of `METHODS`, or `file.py:function` for a factory of your own.
    Raises UserError for an unknown name or setting (with the nearest valid one) and for a value the factory refuses.

    >>> load_method("grpo", beta=0.0).settings["num_generations"]
    8
    """
    factory = factory_of(name)
    allowed = inspect.signature(factory).parameters
    for key in settings:
        if key not in allowed:
            hint = nearest(key, allowed) if allowed else "it has no settings"
            raise UserError(f"method {name}: unknown setting {key!r}; {hint}")
    for key, value in settings.items():
        if value is not None or "None" not in str(allowed[key].annotation):
            _check_kind(name, key, value, _kind(allowed[key]))
    required = [key for key, p in allowed.items() if p.default is p.empty and key not in settings]
    if required:
        raise UserError(f"method {name}: the setting {required[0]!r} has no default; give it a value")
    try:
        made = factory(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name}: {error}") from error
    defaults = {key: p.default for key, p in allowed.items()}
    return made if made.name else replace(made, name=name, settings={**defaults, **settings})


def factory_of(name: str) -> Factory:
    """The factory called `name`, one of `METHODS` or `file.py:function`; UserError where there is none."""
    return _from_file(name) if ".py:" in name else _by_name(name)


def _kind(setting: inspect.Parameter) -> type | None:
    """What a setting is: its default's kind, and with a default of None what its annotation has beside `None`."""
    if setting.default is not None:
        return type(setting.default)
    plain: dict[str, type] = {"int | None": int, "float | None": float, "str | None": str}
    return plain.get(str(setting.annotation))


def _check_kind(name: str, key: str, value: Any, kind: type | None) -> None:
    """UserError when a setting is not of its kind; None for a kind says nothing."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and number,
        float: number and math.isfinite(value),
        str: isinstance(value, str),
    }
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    if kind in fits and not fits[kind]:
        raise UserError(f"method {name}: {key} must be {words[kind]}; got {value!r}")


def _by_name(name: str) -> Factory:
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name].factory


def _from_file(name: str) -> Factory:
    path, _, function = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"method {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    factory = getattr(module, function, None)
    if factory is None:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        hint = nearest(function, own) if own else "it defines none"
        raise UserError(f"method {name}: {path} has no function {function!r}; {hint}")
    return factory  # type: ignore[no-any-return]
