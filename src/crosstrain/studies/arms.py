"""A study's arms as their files have them: which runs there are, how they ended, what they measured and cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crosstrain.errors import UserError
from crosstrain.studies.layout import read_record
from crosstrain.training.cost import Cost

BASE = "base"
_OF_RUN = ("steps", "skipped_steps", "stages", "warnings", "peak_memory_gb", "cost")
_SETUP = ("model", "parameters", "precision", "layout", "forward", "sampler", "template_hash", "data")


@dataclass(frozen=True)
class Arm:
    """An arm of a study.

    evaluations: those of its finished runs, by seed; the base has one, of seed None. runs: how every run ended, as results.json
    lists them. cost: the mean over finished runs. rewarded: whether its training sampled completions (an RL or hybrid arm).
    methods, setup: what the first run recorded about its methods, its model and how it was computed.
    """

    name: str
    evaluations: Mapping[int | None, Mapping[str, Any]]
    runs: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, float] | None = None
    rewarded: bool = False
    methods: Sequence[Mapping[str, Any]] = ()
    setup: Mapping[str, Any] | None = None

    @property
    def is_base(self) -> bool:
        """Whether this is the untrained model."""
        return self.name == BASE


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """A JSON file's content; UserError with the text `missing` when there is none."""
    if not file.is_file():
        raise UserError(missing)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read_arms(folder: Path, study: Mapping[str, Any]) -> list[Arm]:
    """The arms of a study in the order of its file, the base first."""
    arms = [_read_base(folder, study["base"])] if study.get("base") else []
    return arms + [_read_arm(folder, one["name"], study["runs"]) for one in study["spec"]["arms"]]


def reference_evaluation(folder: Path, arms: Sequence[Arm]) -> Mapping[str, Any] | None:
    """The base's evaluation, which changes are measured against, also where the base is no arm of the study."""
    for arm in arms:
        if arm.is_base and arm.evaluations:
            return arm.evaluations[None]
    file = folder / BASE / "evaluation.json"
    return read_json(file, "") if file.is_file() else None


def _read_base(folder: Path, place: str) -> Arm:
    record, evaluation = read_record(folder / place), _evaluation(folder / place)
    run = {"seed": None, "folder": place, **_run_entry(record, evaluation), "cost": None}
    found: dict[int | None, Mapping[str, Any]] = {} if evaluation is None else {None: evaluation}
    # What its evaluation took is no cost of training.
    return Arm(BASE, found, (run,), asdict(Cost()) if found else None, setup=_setup(record))


def _read_arm(folder: Path, name: str, listed: Sequence[Mapping[str, Any]]) -> Arm:
    runs: list[dict[str, Any]] = []
    found: dict[int | None, Mapping[str, Any]] = {}
    records = []
    for run in listed:
        if run["arm"] != name:
            continue
        record, evaluation = read_record(folder / run["folder"]), _evaluation(folder / run["folder"])
        runs.append({"seed": run["seed"], "folder": run["folder"], **_run_entry(record, evaluation)})
        records.append(record)
        if evaluation is not None and record.get("status") == "finished":
            found[run["seed"]] = evaluation
    costs = [run["cost"] for run in runs if run["status"] == "finished"]
    mean = {unit: statistics.fmean(c[unit] for c in costs) for unit in asdict(Cost())} if costs else None
    first = next((r for r in records if r.get("methods")), {})
    return Arm(
        name,
        found,
        tuple(runs),
        mean,
        rewarded=mean is not None and mean["generated_tokens"] > 0,
        methods=first.get("methods", ()),
        setup=_setup(first),
    )


def _evaluation(folder: Path) -> dict[str, Any] | None:
    file = folder / "evaluation.json"
    return read_json(file, "") if file.is_file() else None


def _run_entry(record: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    error = record.get("error")
    return {
        "status": record.get("status", "not started"),
        "error": error["message"] if isinstance(error, Mapping) else error,
        "evaluated": evaluation is not None,
        **{key: record.get(key) for key in _OF_RUN},
    }


def _setup(record: Mapping[str, Any]) -> dict[str, Any] | None:
    found = {key: record[key] for key in _SETUP if key in record}
    return found or None
