"""One run inside a study: its failure is written down and does not stop the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crosstrain.config import Recipe
from crosstrain.errors import UserError
from crosstrain.studies.layout import has_begun, read_record
from crosstrain.training.checkpoint import write_json
from crosstrain.training.record import read_lines


class TrainRun(Protocol):
    """`crosstrain.run.train`, or what stands in for it."""

    def __call__(self, recipe: Recipe, output_dir: Path, *, base: Any, save_weights: bool, display: Any) -> Any: ...


class EvaluateBase(Protocol):
    """`crosstrain.run.evaluate_base`, or what stands in for it."""

    def __call__(self, recipe: Recipe, folder: Path, *, display: Any) -> Any: ...


@dataclass(frozen=True)
class Actions:
    """What a study calls to plan, train, evaluate, report and tidy up; tests put quick stand-ins here."""

    plan: Callable[[Recipe], Any]
    train: TrainRun
    evaluate_base: EvaluateBase
    write_report: Callable[[Path], Path]
    free_memory: Callable[[], None]


def real_actions() -> Actions:
    """The functions that do the work; imported here because they load the training stack and the plots."""
    from crosstrain import run
    from crosstrain.memory import give_back
    from crosstrain.studies.report import write_report

    return Actions(run.plan, run.train, run.evaluate_base, write_report, give_back)


@dataclass(frozen=True)
class Attempt:
    """How a run ended: its evaluation (None when nothing is measured), or why it failed."""

    evaluation: Mapping[str, Any] | None = None
    error: str | None = None


def attempt(
    actions: Actions,
    recipe: Recipe,
    folder: Path,
    *,
    first: bool,
    base: Any = None,
    save_weights: bool = False,
    display: Any = None,
) -> Attempt:
    """Run a recipe in its folder, resuming what is there, and say how it ended.

    An exception is written to the folder's record.json as `status: failed` with its message, and the study goes on; started
    again, the study tries that run again. Two kinds stop the study: Ctrl-C, and a UserError that probably concerns every run:
    one raised before the run's first step, or while no run has finished yet (`first`).
    """
    _forget_failure(folder)
    try:
        result = actions.train(recipe, folder, base=base, save_weights=save_weights, display=display)
        return Attempt(evaluation=result.evaluation)
    except Exception as error:
        if isinstance(error, UserError) and (first or not read_lines(folder / "metrics.jsonl")):
            raise
        _note_failure(folder, error)
        return Attempt(error=_message(error))
    finally:
        actions.free_memory()


def _note_failure(folder: Path, error: Exception) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    story = "".join(traceback.format_exception(error))
    failure = {"type": type(error).__name__, "message": _message(error), "traceback": story}
    write_json(folder / "record.json", {**read_record(folder), "status": "failed", "error": failure})


def _forget_failure(folder: Path) -> None:
    record = read_record(folder)
    if not has_begun(folder):  # to be started from nothing, and with another recipe if that was what was wrong
        (folder / "record.json").unlink(missing_ok=True)
    elif record.get("status") == "failed":
        del record["error"]
        write_json(folder / "record.json", {**record, "status": "running"})


def _message(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
