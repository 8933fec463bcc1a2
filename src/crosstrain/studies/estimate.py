"""How long a study takes: a plan from each arm's first steps before it starts, and time left from runs once there are any."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosstrain.config import EvaluationSpec, Recipe, StudySpec
from crosstrain.errors import UserError
from crosstrain.in_turn import in_turn
from crosstrain.training.display import about

if TYPE_CHECKING:
    from crosstrain.planning import RunPlan


@dataclass(frozen=True)
class StudyPlan:
    """What a study will do; `str` of it is what is printed before it starts and by `--dry-run`.

    arms: one run of each arm, by name. seeds: runs per arm. trials: runs of the learning-rate search per arm, each with
    `trial_share` of the budget.
    """

    name: str
    quick: bool
    budget: str
    arms: Mapping[str, RunPlan]
    seeds: int
    base: bool
    questions: int
    samples: int
    trials: int = 0
    trial_share: float = 1.0

    @property
    def training_seconds(self) -> float:
        """Expected seconds of training: all runs and the search, without evaluation."""
        runs = self.seeds + self.trials * self.trial_share
        return sum(arm.predicted.seconds for arm in self.arms.values()) * runs

    @property
    def peak_memory_gb(self) -> float:
        """The most memory that training any arm takes."""
        return max(arm.predicted.peak_memory_gb for arm in self.arms.values())

    def __str__(self) -> str:
        runs = len(self.arms) * self.seeds
        lines = [f"study: {self.name}" + (" (--quick: a taste, not a result)" if self.quick else "")]
        first = next(iter(self.arms.values()))
        lines.append(f"model: {first.model} on {first.device}, {first.precision}")
        lines += [f"data: {name}, {rows} rows" for name, rows in first.rows.items()]
        lines.append(
            f"runs: {len(self.arms)} arms x {self.seeds} seeds = {runs}" + (", and the untrained model" if self.base else "")
        )
        lines.append(f"budget of each run: {self.budget}")
        width = max(len(name) for name in self.arms)
        for name, arm in self.arms.items():
            steps = in_turn([f"about {stage.steps} steps of {stage.method}" for stage in arm.stages], ", then ")
            lines.append(f"    {name:<{width}}  {steps}; {about(arm.predicted.seconds)}")
        if self.trials:
            share = "the same budget" if self.trial_share == 1 else f"{self.trial_share:.0%} of that budget"
            lines.append(f"learning-rate search: {self.trials} trials per arm with {share}, before the runs")
        lines += sorted({f"warning: {text}" for arm in self.arms.values() for text in arm.warnings})
        evaluated = runs + self.base
        lines.append(f"evaluation: {evaluated} models on {self.questions} questions x {self.samples} samples")
        lines.append(
            f"predicted: {about(self.training_seconds)} of training, peak memory {self.peak_memory_gb:.1f} GB (from the first "
            "batch of each arm), and the evaluations, which are timed on the first model; after each run the time left is measured"
        )
        return "\n".join(lines)


def plan_study(spec: StudySpec, plan_run: Callable[[Recipe], RunPlan], *, quick: bool = False, tune: bool = False) -> StudyPlan:
    """Load and check what every arm needs, and predict what the study takes; nothing is trained or written.

    UserError when an arm's method, data, reward or evaluation cannot be used, or when an arm would never spend the budget.
    """
    arms: dict[str, RunPlan] = {}
    for arm in spec.arms:
        try:
            arms[arm.name] = plan_run(spec.recipe(arm.name, spec.seeds[0]))
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from error
        _check_spends(spec, arm.name, arms[arm.name])
    trials = len(spec.tune.learning_rates) * len(spec.tune.seeds) if tune and spec.tune else 0
    return StudyPlan(
        name=spec.title or spec.name,
        quick=quick,
        budget=f"{spec.budget.amount:.4g} {spec.budget.unit}",
        arms=arms,
        seeds=len(spec.seeds),
        base=spec.base,
        questions=count_questions(spec.shared.evaluation),
        samples=spec.shared.evaluation.samples_per_question,
        trials=trials,
        trial_share=spec.tune.budget_share if trials and spec.tune else 1.0,
    )


def _check_spends(spec: StudySpec, name: str, arm: RunPlan) -> None:
    for k, stage in enumerate(arm.stages):
        if getattr(stage.cost, spec.budget.unit) == 0:
            raise UserError(
                f"arm {name!r}: stage {k} ({stage.method}) spends no {spec.budget.unit}, so it would never use up its budget; "
                "choose another 'budget.unit' (flops and processed_tokens are spent by every method)"
            )


def count_questions(spec: EvaluationSpec) -> int:
    """Held-out questions of all sets."""
    return sum(one.size for one in (*spec.in_distribution, *spec.out_of_distribution))


def expected_seconds(
    arm: str, planned: Mapping[str, float], measured: Mapping[str, Sequence[float]], evaluation: float = 0.0
) -> float:
    """Expected seconds of one run of an arm, evaluation included.

    The mean of the arm's finished runs; before there is one, its planned training time plus `evaluation`, scaled by how far
    other arms' plans were from what was measured.

    >>> expected_seconds("sft", {"sft": 60, "grpo": 60}, {}, evaluation=20)
    80.0
    >>> expected_seconds("grpo", {"sft": 60, "grpo": 120}, {"sft": [160]}, evaluation=20)
    280.0
    """
    if measured.get(arm):
        return statistics.fmean(measured[arm])
    told = {name: seconds for name, seconds in measured.items() if seconds and name in planned}
    before = sum((planned[name] + evaluation) * len(seconds) for name, seconds in told.items())
    scale = sum(map(sum, told.values())) / before if before else 1.0
    return (planned[arm] + evaluation) * scale
