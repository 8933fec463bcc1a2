"""A run's folder: whose it is, and what a finished run left in it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosstrain.config import Recipe, config_hash
from crosstrain.config.differences import say_differences
from crosstrain.errors import UserError
from crosstrain.training.checkpoint import write_json
from crosstrain.training.cost import Cost
from crosstrain.training.record import read_lines


@dataclass(frozen=True)
class RunResult:
    """What a finished run left: its folder, what it cost, its last metrics and its evaluation (None when nothing is set)."""

    folder: Path
    cost: Cost
    metrics: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None


def folder_of(recipe: Recipe, output_dir: str | Path | None) -> Path:
    """Where the run goes: what is given, else what the recipe says; UserError when neither does."""
    where = output_dir or recipe.output_dir
    if where is None:
        raise UserError("a run needs a folder: give --out DIR (output_dir in Python, or `output_dir:` in the recipe)")
    return Path(where)


def open_folder(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The folder's record so far; UserError when it belongs to something else. A recipe whose run never began is replaced."""
    saved, record = folder / "recipe.json", folder / "record.json"
    mine = {"hash": config_hash(recipe), "recipe": recipe.model_dump(mode="json")}
    if saved.is_file():
        theirs = json.loads(saved.read_text(encoding="utf-8"))
        if not record.is_file():  # whatever was wrong with the recipe may be corrected
            write_json(saved, mine)
            return {}
        if theirs["hash"] != mine["hash"]:
            said = say_differences(theirs["recipe"], mine["recipe"])
            raise UserError(
                f"{folder} holds a run of another recipe: {said}; set it back to go on with that run, or choose another --out"
            )
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found
    make_folder(folder)
    if any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no run of crosstrain; choose another --out")
    write_json(saved, mine)
    return {}


def make_folder(folder: Path) -> None:
    """The folder and its parents, when they are not there yet; UserError when they cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder} is a file; choose another --out") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; choose another --out") from None


def result_of(folder: Path, record: Mapping[str, Any]) -> RunResult:
    """What a finished run's folder holds."""
    lines = read_lines(folder / "metrics.jsonl")
    found = folder / "evaluation.json"
    evaluation = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None
    return RunResult(folder, Cost(**record["cost"]), lines[-1] if lines else {}, evaluation)


def now() -> str:
    """The time, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
