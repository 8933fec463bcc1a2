"""The user's own Python files that a recipe names, to notice when they change."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from crosstrain.config import Recipe

INSTALLED = ("site-packages", "dist-packages")
"""Folders of packages that were installed: they have a version, and are not looked at."""


def code_of(recipe: Recipe) -> dict[str, str]:
    """sha256 of the Python files that methods and rewards come from, by file or module as the recipe names it.

    What they import is not looked at.
    """
    named = [stage.method.name for stage in recipe.stages]
    named += [] if recipe.rewards is None else [spec.name for spec in recipe.rewards.functions]
    places = {name.rpartition(":")[0] for name in named}
    files = {place: Path(place).expanduser() if place.endswith(".py") else _own_module(place) for place in sorted(places)}
    return {place: hashlib.sha256(file.read_bytes()).hexdigest() for place, file in files.items() if file is not None}


def _own_module(name: str) -> Path | None:
    """The file of a module of the user's, found without importing its packages; None for anything else."""
    if name == "task" or not re.fullmatch(r"\w+(\.\w+)*", name) or name.split(".")[0] == "crosstrain":
        return None
    path = [*sys.path, os.getcwd()]  # as the process that calls rewards looks for it
    spec = None
    for part in name.split("."):
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    file = Path((spec and spec.origin) or "")
    installed = any(part in INSTALLED for part in file.parts) or file.is_relative_to(sysconfig.get_path("stdlib"))
    return file if file.is_file() and not installed else None
