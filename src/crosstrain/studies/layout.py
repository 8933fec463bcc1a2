"""A study's folder: which runs go where, whose folder it is, and who is working in it.

DIR/study.json                       what is compared, with which settings, versions and hardware
DIR/runs/base/                       the untrained model's evaluation
DIR/runs/<arm>/seed-<s>/             one run, as `crosstrain train` leaves it
DIR/tuning.json, DIR/tuning/...      the learning-rate search of `--tune`
DIR/results.json, DIR/report.html    made from the files above, again at any time

A study may be corrected while it runs: what has not begun is as the study says now. What has begun is never mixed with that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crosstrain.config import Recipe, StudySpec, config_hash
from crosstrain.config.differences import say_differences
from crosstrain.errors import UserError
from crosstrain.run_folder import make_folder
from crosstrain.training import checkpoint
from crosstrain.training.record import read_lines

OF_BASE = ("model", "device", "precision", "evaluation", "sampling")
"""The shared settings that the untrained model's evaluation depends on."""

NAMES = ("name", "title")
"""Settings that say only what a study is called."""

CHOICES = ("arms", "base", "contrasts", "seeds")
"""Settings that say what a study compares."""

SHOWN = 5
"""Runs that a message names."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    folder: relative to the study's folder, with forward slashes. save_weights: whether it leaves the trained model.
    """

    arm: str
    seed: int
    folder: str
    save_weights: bool

    @property
    def title(self) -> str:
        """The run's name in messages."""
        return f"{self.arm}, seed {self.seed}"


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A folder name for each arm: letters, digits and hyphens; no two alike and none called `base`.

    >>> slugs(["sft -> grpo", "GRPO (beta 0)", "grpo beta=0", "Base"])
    {'sft -> grpo': 'sft-to-grpo', 'GRPO (beta 0)': 'grpo-beta-0', 'grpo beta=0': 'grpo-beta-0-2', 'Base': 'base-2'}
    """
    taken = {"base"}
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("->", " to "))[:60].strip("-") or "arm"
        slug, n = plain, 2
        while slug in taken:
            slug, n = f"{plain}-{n}", n + 1
        taken.add(slug)
        found[name] = slug
    return found


def study_runs(spec: StudySpec) -> list[StudyRun]:
    """Every run of a study, in the order that makes partial results useful: the first seed of every arm, then the next.

    Only the first seed of each arm leaves its weights: they are large, and one model per arm is what gets used.
    """
    names = slugs([arm.name for arm in spec.arms])
    return [
        StudyRun(arm.name, seed, f"runs/{names[arm.name]}/seed-{seed}", save_weights=seed == spec.seeds[0])
        for seed in spec.seeds
        for arm in spec.arms
    ]


def read_record(folder: Path) -> dict[str, Any]:
    """A run's record, empty when there is none yet."""
    file = folder / "record.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a finished run."""
    return read_record(folder).get("status") == "finished"


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds anything of its training: a step, a checkpoint, its end."""
    steps = read_lines(folder / "metrics.jsonl")
    return bool(steps) or is_finished(folder) or checkpoint.latest(folder / "checkpoints") is not None


@contextmanager
def only_one_process(out: Path) -> Iterator[None]:
    """Hold a study's folder; UserError when another process does. A killed process lets go by itself."""
    make_folder(out)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is running the study in {out}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def check_folder(out: Path, spec: StudySpec, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The study.json of a folder that holds this study, {} of one in which nothing has begun; UserError for anything else.

    identity: `spec` (as JSON), `config_hash`, `quick` and `tune`; they are what makes two studies the same. A corrected study is
    this one, too, where everything that has begun is as it says now: what differs is of runs that are still to begin. Results
    count as begun, for they would be lost.
    """
    file = out / "study.json"
    if not file.is_file():
        strangers = sorted(p.name for p in out.iterdir() if p.name != ".lock") if out.is_dir() else []
        if out.exists() and (strangers or not out.is_dir()):
            what = f"holds {strangers[0]!r} but no study" if strangers else "is a file"
            raise UserError(f"{out} {what}; choose another --out")
        return {}
    there: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    begun = _begun(out, there)
    reported = _was_finished(there) or (out / "results.json").is_file()
    if not begun and not reported:
        return {}
    for flag in ("quick", "tune"):
        if there[flag] != identity[flag]:
            was, now = ("with", "without") if there[flag] else ("without", "with")
            removable = not reported and not any(run["folder"] in begun for run in there["runs"])
            remove = f"remove {_some(str(out / folder) for folder in begun)} or choose" if removable else "or"
            raise UserError(
                f"the study in {out} was started {was} --{flag} and this one is {now} it; use the same flags to go on with it, "
                f"{remove} another --out to start anew"
            )
    if there["config_hash"] != identity["config_hash"]:
        _check_correction(out, spec, there, identity, begun, reported=reported)
    return there


def check_code(out: Path, runs: Sequence[StudyRun], code: Mapping[str, str]) -> None:
    """UserError when runs or trials that stay in the folder were trained with other files of methods and rewards than `code`.

    code: what the runs to go would be trained with, as in `own_code.code_of`. Records of earlier versions have none to compare.
    """
    names = {run.folder: run.title for run in runs}
    trials = sorted(file.parent.relative_to(out).as_posix() for file in (out / "tuning").rglob("record.json"))
    found: dict[str, list[str]] = {}
    for folder in (*names, *trials):
        if is_finished(out / folder) or checkpoint.latest(out / folder / "checkpoints") is not None:
            before = read_record(out / folder).get("code", {})
            for file in before.keys() & code.keys():
                if before[file] != code[file]:
                    found.setdefault(file, []).append(folder)
    if found:
        file, folders = min(found.items())
        raise UserError(
            f"{file} is not what it was when these began: {_some((names.get(f, f) for f in folders), '; ')}; a study does not mix "
            f"the two. Put it back to go on, remove {_some(str(out / f) for f in folders)} to begin them anew with the new one, or "
            "choose another --out"
        )


def _begun(out: Path, there: Mapping[str, Any]) -> dict[str, str]:
    """What the study of a folder has begun, by folder."""
    found = {run["folder"]: f"{run['arm']}, seed {run['seed']}" for run in there["runs"] if has_begun(out / run["folder"])}
    found |= {place: "the untrained model" for place in ("runs/base", "base") if is_finished(out / place)}
    trials = (out / "tuning").rglob("record.json")
    return found | ({"tuning": "the search for learning rates"} if any(has_begun(one.parent) for one in trials) else {})


def _check_correction(
    out: Path,
    spec: StudySpec,
    there: Mapping[str, Any],
    identity: Mapping[str, Any],
    begun: Mapping[str, str],
    *,
    reported: bool,
) -> None:
    """UserError unless the study leaves all that has begun in the folder as it is, and what a finished one compares, too."""
    old, new = there["spec"], identity["spec"]
    if all(old.get(key) == new.get(key) for key in {*old, *new} - {*NAMES}):
        return
    planned = {run.folder: run for run in study_runs(spec)}
    runs = {run["folder"]: StudyRun(run["arm"], run["seed"], run["folder"], run["save_weights"]) for run in there["runs"]}
    searched = there["tune"]  # every run depends on the search
    same = [run for folder, run in runs.items() if folder in begun and planned.get(folder) == run and not searched]
    kept = {run.folder for run in same if _recipe_is(out / run.folder, spec.recipe(run.arm, run.seed))}
    same_base = all(old["shared"].get(key) == new["shared"].get(key) for key in OF_BASE)
    stale = [folder for folder in begun if folder not in kept and (searched or folder in runs or not same_base)]
    other_runs = planned != runs
    settled = _was_finished(there) and (other_runs or any(old.get(k) != new.get(k) for k in ("base", "contrasts")))
    if settled and kept and not stale:
        differ = say_differences(*({key: one.get(key) for key in CHOICES} for one in (old, new)))
        of = "runs" if other_runs else "comparisons"
        raise UserError(
            f"{out} holds a finished study of other {of}: {differ}; set it back, or choose another --out to start anew"
        )
    if stale or (reported and not kept):
        what = _some((begun[folder] for folder in stale), "; ") or "its report, whose runs are not here"
        ways = ["Set it back to go on with that study"]
        if kept or not reported:  # with no run left, a report would be replaced by another study's
            anew = [str(out / folder) for folder in stale if folder in planned or folder not in runs]
            gone = [str(out / folder) for folder in stale if folder in runs and folder not in planned]
            ways += [f"remove {_some(anew)} to begin that anew as it says here"] if anew and not settled else []
            ways += [f"remove {_some(gone)} to go on without what this study does not have"] if gone and not settled else []
        raise UserError(
            f"{out} holds another study: {say_differences(old, new)}; begun with what it says there: {what}. "
            f"{', '.join(ways)}, or choose another --out to start anew"
        )


def _was_finished(there: Mapping[str, Any]) -> bool:
    """Whether a study came to its end once, also where it tries failed runs again."""
    return "budget" in there


def _some(names: Iterable[str], between: str = ", ") -> str:
    """The first of these names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return between.join(listed[:SHOWN]) + more


def _recipe_is(folder: Path, recipe: Recipe) -> bool:
    """Whether a run began with that recipe."""
    file = folder / "recipe.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["hash"] == config_hash(recipe)
