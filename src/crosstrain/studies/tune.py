"""The learning-rate search of `study --tune`: the same grid, seeds and budget for every arm, judged on development questions.

Every arm gets one trial per rate and seed. In an arm of several stages the rate of the *last* stage is searched, so that its
search is no larger than the others'. An earlier stage takes the rate that was chosen for the arm that is that stage's method alone
(`sft -> grpo` trains its `sft` stage at the rate of the arm `sft`), or keeps the study file's rate where there is no such arm.
Trials see neither the test questions nor the out-of-distribution ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from crosstrain.config import ArmSpec, Recipe, StudySpec
from crosstrain.errors import UserError, nearest
from crosstrain.studies.attempt import Actions, attempt
from crosstrain.studies.layout import is_finished, slugs
from crosstrain.training.checkpoint import write_json
from crosstrain.training.display import about


@dataclass(frozen=True)
class Trial:
    """One run of the search. value: its development metric, None when the run failed; then `error` says why."""

    arm: str
    learning_rate: float
    seed: int
    folder: str
    value: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Chosen:
    """The rates of an arm's stages after the search, and whether the last one lies at an end of the grid."""

    learning_rates: tuple[float, ...]
    at_edge: bool


def check_can_tune(spec: StudySpec) -> None:
    """UserError when the study does not say what to search or on which questions."""
    if spec.tune is None:
        raise UserError("--tune needs `tune:` in the study file, for example `tune: {learning_rates: [3e-6, 1e-5, 3e-5]}`")
    if spec.shared.evaluation.dev is None:
        raise UserError("--tune needs development questions: add `shared.evaluation.dev` (a task, its split `dev`, a size)")
    rates = spec.tune.learning_rates
    if len(set(rates)) < len(rates):
        raise UserError(f"tune.learning_rates has a repeated rate: {rates}")


def search(spec: StudySpec, out: Path, actions: Actions, display: Any, say: Callable[[str], None]) -> StudySpec:
    """The study with the rates that a search on development questions chose; every trial is in `out/tuning.json`.

    Interrupted searches resume: finished trials are not run again.
    """
    check_can_tune(spec)
    assert spec.tune is not None
    trials: list[Trial] = []
    chosen: dict[str, Chosen] = {}
    total = len(spec.arms) * len(spec.tune.learning_rates) * len(spec.tune.seeds)
    seconds: list[float] = []
    # Single-stage arms first: arms of several stages take their earlier stages' rates from them.
    for arm in sorted(spec.arms, key=lambda one: len(one.stages) > 1):
        before = earlier_rates(arm, spec.arms, chosen)
        found: list[Trial] = []
        for trial in planned_trials(spec, arm):
            display.begin(f"trial {len(trials) + len(found) + 1} of {total} ({arm.name} at {trial.learning_rate:g})")
            fresh, started = not is_finished(out / trial.folder), time.monotonic()
            first = all(one.value is None for one in (*trials, *found))
            rated = with_rates(arm, (*before, trial.learning_rate))
            found.append(_run(spec, rated, trial, out, actions, display, first=first))
            if fresh:
                seconds.append(time.monotonic() - started)
            say(f"{display.title}: {_result(found[-1], spec.tune.metric)}{_left(seconds, total - len(trials) - len(found))}")
        trials += found
        best = best_rate(found)
        grid = spec.tune.learning_rates
        chosen[arm.name] = Chosen((*before, best), at_edge=len(grid) > 1 and best in (min(grid), max(grid)))
        _write(spec, out, trials, chosen)
    tuned = spec.model_copy(update={"arms": [with_rates(arm, chosen[arm.name].learning_rates) for arm in spec.arms]})
    for name, one in chosen.items():
        if one.at_edge:
            say(f"note: {name}: the best rate, {one.learning_rates[-1]:g}, is at an end of the grid; a wider one may do better")
    say("learning rates chosen by the search; to keep them, paste this into the study file:\n" + arms_yaml(tuned))
    return tuned


def planned_trials(spec: StudySpec, arm: ArmSpec) -> list[Trial]:
    """The trials of one arm, not yet run."""
    assert spec.tune is not None
    folder = f"tuning/{slugs([a.name for a in spec.arms])[arm.name]}"
    return [
        Trial(arm.name, rate, seed, f"{folder}/lr-{rate:g}/seed-{seed}")
        for rate in spec.tune.learning_rates
        for seed in spec.tune.seeds
    ]


def earlier_rates(arm: ArmSpec, arms: Sequence[ArmSpec], chosen: Mapping[str, Chosen]) -> tuple[float, ...]:
    """The rates of an arm's stages before the last: those chosen for the same method alone, else the study file's."""
    alone = {one.stages[0].method.model_dump_json(): one.name for one in arms if len(one.stages) == 1}
    names = [alone.get(stage.method.model_dump_json()) for stage in arm.stages[:-1]]
    return tuple(
        chosen[name].learning_rates[0] if name is not None else stage.learning_rate
        for name, stage in zip(names, arm.stages, strict=False)
    )


def with_rates(arm: ArmSpec, learning_rates: Sequence[float]) -> ArmSpec:
    """The arm with other learning rates, one per stage; where the last stage came before, as in a repetition, it has its rate."""
    rates = [learning_rates[-1] if s == arm.stages[-1] else r for s, r in zip(arm.stages, learning_rates, strict=True)]
    stages = [s.model_copy(update={"learning_rate": r}) for s, r in zip(arm.stages, rates, strict=True)]
    return arm.model_copy(update={"stages": stages})


def trial_recipe(spec: StudySpec, arm: ArmSpec, seed: int) -> Recipe:
    """The recipe of a trial: the arm's own, with the search's share of the budget, measured on development questions only."""
    assert spec.tune is not None
    full = spec.model_copy(update={"arms": [arm]}).recipe(arm.name, seed)
    dev = full.evaluation.dev
    assert dev is not None
    only_dev = {
        # Under another name, as the set `dev` may also be looked at along the way (`eval_steps`).
        "in_distribution": [dev.model_copy(update={"name": f"{dev.name} (search)"})],
        "out_of_distribution": [],
        "samples_per_question": full.evaluation.dev_samples,
        "pass_at_k": [],
        "forgetting": False,
        "divergence": False,
        "dev": dev if full.evaluation.eval_steps else None,
    }
    evaluation = full.evaluation.model_copy(update=only_dev)
    assert full.budget is not None
    budget = full.budget.model_copy(update={"amount": full.budget.amount * spec.tune.budget_share})
    return full.model_copy(update={"evaluation": evaluation, "budget": budget})


def best_rate(trials: Sequence[Trial]) -> float:
    """The rate with the highest mean over seeds; the smaller of equal ones, which changes the model less.

    A rate with a failed trial is out. UserError when none is left.

    >>> best_rate([Trial("a", 1e-6, 0, "", 0.2), Trial("a", 1e-5, 0, "", 0.4), Trial("a", 1e-4, 0, "", None, "NaN")])
    1e-05
    """
    values: dict[float, list[float | None]] = {}
    for trial in trials:
        values.setdefault(trial.learning_rate, []).append(trial.value)
    means = {rate: statistics.fmean(v for v in found if v is not None) for rate, found in values.items() if None not in found}
    if not means:
        raise UserError(
            f"arm {trials[0].arm!r}: a trial failed at every rate of tune.learning_rates ({trials[-1].error}); try smaller rates"
        )
    return min(means, key=lambda rate: (-means[rate], rate))


def dev_value(evaluation: Mapping[str, Any] | None, metric: str) -> float:
    """A trial's development metric; UserError when that is not measured."""
    measured = {} if evaluation is None else evaluation["metrics"]
    if metric not in measured:
        raise UserError(f"tune.metric: {metric!r} is not measured on the development questions; {nearest(metric, measured)}")
    return float(measured[metric])


def arms_yaml(spec: StudySpec) -> str:
    """The arms as they stand in a study file, settings at their default left out."""
    arms = [arm.model_dump(mode="json", exclude_defaults=True) for arm in spec.arms]
    return yaml.safe_dump({"arms": arms}, sort_keys=False, allow_unicode=True, width=120)


def _result(trial: Trial, metric: str) -> str:
    return f"failed: {trial.error}" if trial.value is None else f"{metric} {trial.value:.3f}"


def _left(seconds: Sequence[float], trials: int) -> str:
    """The time the rest of the search takes, from the trials run so far."""
    return f"; {about(statistics.fmean(seconds) * trials)} of the search left" if seconds and trials else ""


def _run(spec: StudySpec, arm: ArmSpec, trial: Trial, out: Path, actions: Actions, display: Any, *, first: bool) -> Trial:
    assert spec.tune is not None
    recipe = trial_recipe(spec, arm, trial.seed)
    ended = attempt(actions, recipe, out / trial.folder, first=first, display=display)
    if ended.error is not None:
        return replace(trial, error=ended.error)
    return replace(trial, value=dev_value(ended.evaluation, spec.tune.metric))


def _write(spec: StudySpec, out: Path, trials: Sequence[Trial], chosen: Mapping[str, Chosen]) -> None:
    assert spec.tune is not None
    write_json(
        out / "tuning.json",
        {
            "metric": spec.tune.metric,
            "dev": spec.shared.evaluation.dev.model_dump(mode="json"),
            "dev_samples": spec.shared.evaluation.dev_samples,
            "learning_rates": spec.tune.learning_rates,
            "seeds": spec.tune.seeds,
            "budget": {"unit": spec.budget.unit, "amount": spec.budget.amount * spec.tune.budget_share},
            "rule": "highest mean over seeds, the smaller of equal rates; in arms of several stages the last stage is searched",
            "trials": [asdict(trial) for trial in trials],
            "chosen": {name: asdict(one) for name, one in chosen.items()},
        },
    )
