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
from collections.abc import Iterator, Mapping, Sequence
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

SHOWN = 3
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
    this one, too, where everything that has begun is as it says now: what differs is of runs that are still to begin.
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
    if not begun:
        return {}
    for flag in ("quick", "tune"):
        if there[flag] != identity[flag]:
            was, now = ("with", "without") if there[flag] else ("without", "with")
            raise UserError(
                f"the study in {out} was started {was} --{flag} and this one is {now} it; use the same flags to go on with it, "
                "or another --out to start anew"
            )
    if there["config_hash"] != identity["config_hash"]:
        _check_correction(out, spec, there, identity, begun)
    return there


def _begun(out: Path, there: Mapping[str, Any]) -> dict[str, str]:
    """What the study of a folder has begun, by folder."""
    found = {run["folder"]: f"{run['arm']}, seed {run['seed']}" for run in there["runs"] if has_begun(out / run["folder"])}
    found |= {place: "the untrained model" for place in ("runs/base", "base") if is_finished(out / place)}
    trials = (out / "tuning").rglob("record.json")
    return found | ({"tuning": "the search for learning rates"} if any(has_begun(one.parent) for one in trials) else {})


def _check_correction(
    out: Path, spec: StudySpec, there: Mapping[str, Any], identity: Mapping[str, Any], begun: Mapping[str, str]
) -> None:
    """UserError unless the study leaves all that has begun in the folder as it is, and a finished one's choice of runs, too."""
    differ = say_differences(there["spec"], identity["spec"])
    if there["tune"]:  # every run depends on the search
        stale = list(begun)
    else:
        planned = {run.folder: run for run in study_runs(spec)}
        runs = {run["folder"]: StudyRun(run["arm"], run["seed"], run["folder"], run["save_weights"]) for run in there["runs"]}
        old, new = (one["spec"]["shared"] for one in (there, identity))
        same_base = all(old.get(key) == new.get(key) for key in OF_BASE)
        same = [run for folder, run in runs.items() if folder in begun and planned.get(folder) == run]
        kept = {run.folder for run in same if _recipe_is(out / run.folder, spec.recipe(run.arm, run.seed))}
        stale = [folder for folder in begun if folder not in kept and (folder in runs or not same_base)]
        if not stale and there.get("status") == "finished" and planned != runs:
            raise UserError(f"{out} holds a finished study of other runs: {differ}; choose another --out to start anew")
    if stale:
        more = f" and {len(stale) - SHOWN} more" if len(stale) > SHOWN else ""
        what, where = "; ".join(begun[f] for f in stale[:SHOWN]), ", ".join(str(out / f) for f in stale[:SHOWN])
        raise UserError(
            f"{out} holds another study: {differ}; begun with what it says there: {what}{more}. Set it back to go on with that "
            f"study, remove {where}{more} to begin that anew as it says here, or choose another --out to start anew"
        )


def _recipe_is(folder: Path, recipe: Recipe) -> bool:
    """Whether a run began with that recipe."""
    file = folder / "recipe.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["hash"] == config_hash(recipe)
