"""Running a study: every arm and seed under one budget, resumable, with a report at the end."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from crosstrain.config import StudySpec, config_hash
from crosstrain.config.differences import differences, say_differences
from crosstrain.errors import UserError
from crosstrain.models import resolve_device
from crosstrain.own_code import code_of
from crosstrain.rewards.child import check_not_in_worker
from crosstrain.studies import tune as tuning
from crosstrain.studies.attempt import Actions, attempt, real_actions
from crosstrain.studies.budget import budget_check, budget_warnings, check_can_be_equal
from crosstrain.studies.estimate import StudyPlan, plan_study
from crosstrain.studies.layout import StudyRun, check_code, check_folder, is_finished, only_one_process, read_record, study_runs
from crosstrain.studies.progress import Clock, StudyDisplay
from crosstrain.training.checkpoint import write_json
from crosstrain.training.display import about
from crosstrain.training.record import hardware, read_lines, versions


def plan(spec: StudySpec, *, quick: bool = False, tune: bool = False, actions: Actions | None = None) -> StudyPlan:
    """What a study would do and take, after checking everything it needs; nothing is trained or written."""
    spec = checked(spec, quick=quick, tune=tune)
    return plan_study(spec, (actions or real_actions()).plan, quick=quick, tune=tune)


def checked(spec: StudySpec, *, quick: bool, tune: bool) -> StudySpec:
    """The study as it will run, with its `quick` settings if asked for; UserError when it cannot be a fair one."""
    if quick:
        if not spec.quick:
            raise UserError("--quick: this study file has no `quick:` settings, for example `quick: {seeds: [0]}`")
        spec = spec.quickened()
    check_can_be_equal(spec)
    if tune:
        tuning.check_can_tune(spec)
    return spec


def run_study(
    spec: StudySpec,
    out: Path,
    *,
    quick: bool = False,
    tune: bool = False,
    console: Console | None = None,
    actions: Actions | None = None,
) -> Path:
    """Train and evaluate every arm with every seed in the folder `out`, and return the path of the report.

    The same call again goes on where it was interrupted: finished runs are kept, an unfinished one resumes from its last
    checkpoint, a failed one is tried again. A corrected study goes on, too, unless something that has begun would be another now.
    tune: first search each arm's learning rate on development questions, write
    `out/tuning.json`, and run the study with the rates found. A run that fails is recorded as failed, with its message.

    Raises UserError when the folder holds runs of another study or is in use, or when a setting is wrong; RuntimeError when every
    run of the first seed failed.
    """
    check_not_in_worker()
    spec = checked(spec, quick=quick, tune=tune).model_copy(update={"quick": {}})  # now applied, or of no concern
    identity = {
        "spec": spec.model_dump(mode="json"),
        "config_hash": config_hash(spec),
        "quick": quick,
        "tune": tune,
    }
    check_folder(out, spec, identity)
    with only_one_process(out):
        record = check_folder(out, spec, identity)
        work = _Study(spec, out, record, actions or real_actions(), console or Console(stderr=True))
        if work.is_finished():
            work.correct(identity)
            return work.actions.write_report(out)
        work.open(identity)
        try:
            return work.to_the_end(quick=quick, tune=tune)
        except KeyboardInterrupt:
            work.display.finish()
            work.say(f"stopped; what is finished is kept in {out}: the same command goes on from there")
            raise


class _Study:
    """One study from opening its folder to its report; `run_study` makes it, nothing else does."""

    def __init__(self, spec: StudySpec, out: Path, record: dict[str, Any], actions: Actions, console: Console) -> None:
        self.spec, self.out, self.record, self.actions, self.console = spec, out, record, actions, console
        self.runs = study_runs(spec)
        self.display = StudyDisplay(console)

    def say(self, text: str) -> None:
        """A message on a line of its own."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def is_finished(self) -> bool:
        """Whether nothing is left to do but the report."""
        return self.record.get("status") == "finished" and not self._pending()

    def correct(self, identity: Mapping[str, Any]) -> None:
        """Write into study.json, and say, what the study says otherwise now than when it was started or last corrected."""
        if self.record["config_hash"] == identity["config_hash"]:
            return
        taken = "what has begun is as it was, and the runs to go take what it says here"
        if self.is_finished():
            taken = "every run is finished, so only study.json and the report take it"
        self.say(f"note: {say_differences(self.record['spec'], identity['spec'])}; {taken}")
        found = differences(self.record["spec"], identity["spec"])
        correction = {
            "at": _now(),
            "differences": [{"setting": key, "before": before, "after": after} for key, before, after in found],
            "finished": [run.folder for run in self.runs if is_finished(self.out / run.folder)],
        }
        self.record |= {**identity, **self._names(), "corrections": [*self.record.get("corrections", []), correction]}
        self._write()

    def _names(self) -> dict[str, str]:
        return {"name": self.spec.name, "title": self.spec.title or self.spec.name}

    def open(self, identity: Mapping[str, Any]) -> None:
        """Write study.json, or go on with the one that is there, as the study says now."""
        seconds: dict[str, float | None] = {}
        if self.record:
            self._warn_of_other_versions()
            self.record["resumed"] += 1
            seconds = {e["folder"]: e["seconds"] for e in self.record["runs"] if is_finished(self.out / e["folder"])}
            self.correct(identity)
        else:
            self.record |= {
                "started_at": _now(),
                "resumed": 0,
                "versions": versions(),
                "hardware": hardware(resolve_device(self.spec.shared.device)),
            }
        self.record |= {
            **identity,
            **self._names(),
            "base": "runs/base" if self.spec.base else None,
            "models_kept": f"of seed {self.spec.seeds[0]} of each arm, in its run's folder model/",
            "runs": [
                {
                    "arm": run.arm,
                    "seed": run.seed,
                    "folder": run.folder,
                    "save_weights": run.save_weights,
                    "seconds": seconds.get(run.folder),
                }
                for run in self.runs
            ],
            "status": "running",
            "finished_at": None,
        }
        self._write()

    def to_the_end(self, *, quick: bool, tune: bool) -> Path:
        """Plan, search, evaluate the base, run everything, check the budgets and write the report."""
        pending = self._pending()
        clock = Clock({})
        if pending:
            self.say("measuring a step of each arm")
            planned = plan_study(self.spec, self.actions.plan, quick=quick, tune=tune)
            code = {name: sha for run in pending for name, sha in code_of(self.spec.recipe(run.arm, run.seed)).items()}
            check_code(self.out, self.runs, code)
            clock = Clock({name: arm.predicted.seconds for name, arm in planned.arms.items()}, self._measured())
            kept = len(self.runs) - len(pending)
            self.say(f"going on with {self.out}: {kept} of {len(self.runs)} runs are finished" if kept else str(planned))
        if tune:
            self.spec = tuning.search(self.spec, self.out, self.actions, self.display, self.say)
        self._note_learning_rates(tune)
        base = self._evaluate_base(clock) if pending or self.spec.base else None
        self._run_all(base, clock)
        return self._finish()

    def _evaluate_base(self, clock: Clock) -> Any:
        """The untrained model's answers, when the study shows them or divergences are measured against them."""
        spec = self.spec.shared.evaluation
        if not self.spec.base and not spec.divergence:
            return None
        folder = self.out / ("runs/base" if self.spec.base else "base")
        self.display.begin("the untrained model")
        recipe = self.spec.recipe(self.spec.arms[0].name, self.spec.seeds[0])
        answers = self.actions.evaluate_base(recipe, folder, display=self.display)
        clock.evaluation = float(read_record(folder).get("cost", {}).get("seconds", 0.0))
        return answers

    def _run_all(self, base: Any, clock: Clock) -> None:
        total = len(self.runs)
        pending = self._pending()
        clock.waiting = [run.arm for run in pending]
        self.display.clock = clock
        if pending:
            known = "measured" if clock.measured else "training predicted, evaluation measured"
            self.say(f"runs to go: {len(pending)}, {about(clock.left())} ({known})")
        for i, run in enumerate(self.runs):
            if run in pending:
                clock.waiting = clock.waiting[1:]
                self._one(run, f"run {i + 1} of {total} ({run.title})", base, clock)
            if i + 1 < total and self.runs[i + 1].seed != run.seed:
                self._end_of_seed(run, fresh=run in pending)
        self.display.clock = None

    def _one(self, run: StudyRun, title: str, base: Any, clock: Clock) -> None:
        folder = self.out / run.folder
        first = len(self._pending()) == len(self.runs)
        resumed = bool(read_lines(folder / "metrics.jsonl"))
        self.display.begin(title, run.arm)
        recipe = self.spec.recipe(run.arm, run.seed)
        started = time.monotonic()
        ended = attempt(
            self.actions, recipe, folder, first=first, base=base, save_weights=run.save_weights, display=self.display
        )
        seconds = time.monotonic() - started
        self.display.finish()
        if ended.error is not None:
            self.say(f"{title} failed: {ended.error}; the others go on")
            return
        if not resumed:  # a resumed run's time is only that of its rest
            clock.note(run.arm, seconds)
            self._entry(run)["seconds"] = round(seconds, 1)
            self._write()
        left = f"{about(clock.left())} left in all" if clock.waiting else "all runs done"
        self.say(f"{title} done in {seconds:.0f} s; {left}")

    def _end_of_seed(self, run: StudyRun, *, fresh: bool) -> None:
        """After each seed of all arms: stop if nothing works, else show what is there so far."""
        same = [one for one in self.runs if one.seed == run.seed]
        if not any(is_finished(self.out / one.folder) for one in same):
            raise RuntimeError(f"every run of seed {run.seed} failed; the first: {self._why(same[0])}")
        if not fresh:
            return
        try:
            self.say(f"report so far: {self.actions.write_report(self.out)}")
        except Exception as error:  # hours of training must not be lost to a report that is written again at the end
            self.say(f"warning: no report so far: {type(error).__name__}: {error}")

    def _finish(self) -> Path:
        if len(self._pending()) == len(self.runs):
            raise RuntimeError(f"every run failed; the first: {self._why(self.runs[0])}")
        failed = [run.title for run in self._pending()]
        budget = budget_check(self.spec, self.runs, self.out)
        self.record |= {"status": "finished", "finished_at": _now(), "budget": budget}
        self._write()
        for text in budget_warnings(budget):
            self.say(f"warning: {text}")
        if failed:
            self.say(f"failed: {'; '.join(failed)}; the same command tries again, the report is about the others")
        return self.actions.write_report(self.out)

    def _why(self, run: StudyRun) -> str:
        return str(read_record(self.out / run.folder)["error"]["message"])

    def _pending(self) -> list[StudyRun]:
        """The runs that are not finished."""
        return [run for run in self.runs if not is_finished(self.out / run.folder)]

    # --- study.json -------------------------------------------------------------------------------------------------

    def _note_learning_rates(self, tune: bool) -> None:
        rates = {arm.name: [stage.learning_rate for stage in arm.stages] for arm in self.spec.arms}
        self.record["learning_rates"] = {"from": "tuning.json" if tune else "study file", "arms": rates}
        self._write()

    def _measured(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for entry in self.record["runs"]:
            if entry["seconds"] is not None:
                found.setdefault(entry["arm"], []).append(entry["seconds"])
        return found

    def _entry(self, run: StudyRun) -> dict[str, Any]:
        entry: dict[str, Any] = next(e for e in self.record["runs"] if e["folder"] == run.folder)
        return entry

    def _warn_of_other_versions(self) -> None:
        before, now = self.record["versions"], versions()
        changed = [
            f"{k} {before.get(k)} then, {now.get(k)} now" for k in sorted({*before, *now}) if before.get(k) != now.get(k)
        ]
        if changed:
            self.say(f"warning: finished runs are kept although versions changed: {'; '.join(changed)}")

    def _write(self) -> None:
        write_json(self.out / "study.json", self.record)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
