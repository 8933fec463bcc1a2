"""Equal budgets: refused before a study starts where they cannot be, checked against what was spent when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from crosstrain.config import ArmSpec, StudySpec
from crosstrain.errors import UserError
from crosstrain.studies.layout import StudyRun, is_finished, read_record
from crosstrain.training.record import read_lines


@dataclass(frozen=True)
class Spent:
    """What one finished run spent of the study's budget, in its unit.

    overshoot: spent beyond the amount; negative when the run ended early (a plateau, a step limit). largest_step: the most
    that lay between two lines of the run's metrics. equal: the overshoot is at most one step in each stage.
    """

    arm: str
    seed: int
    spent: float
    overshoot: float
    largest_step: float
    equal: bool


def check_can_be_equal(spec: StudySpec) -> None:
    """UserError when some arm cannot spend the study's budget: stages without a share, or shares that do not add up to 1."""
    for i, arm in enumerate(spec.arms):
        _check_arm(i, arm)


def _check_arm(i: int, arm: ArmSpec) -> None:
    if arm.stages[-1].repeat_until_budget:
        return  # spends what the stages before left
    shares = [stage.budget_share for stage in arm.stages]
    if len(shares) == 1 and shares[0] is None and arm.stages[0].max_steps is None:
        return
    where = f"arms.{i} ({arm.name})"
    for k, share in enumerate(shares):
        if share is None:
            raise UserError(
                f"{where}: stage {k} ends by 'max_steps' alone, so the arm would not spend the study's budget; give it a "
                "'budget_share'" + (" or remove 'max_steps'" if len(shares) == 1 else " (the stages' shares add up to 1)")
            )
    total = sum(share for share in shares if share is not None)
    if abs(total - 1) > 1e-6:
        raise UserError(f"{where}: the stages' 'budget_share' add up to {total:g}; in a study they must add up to 1")


def spent_by(spec: StudySpec, run: StudyRun, out: Path) -> Spent:
    """What a finished run spent, from its record and metrics."""
    unit, amount = spec.budget.unit, spec.budget.amount
    spent = float(read_record(out / run.folder)["cost"][unit])
    along = [0.0, *(float(line[f"cost/{unit}"]) for line in read_lines(out / run.folder / "metrics.jsonl")), spent]
    largest = max(after - before for before, after in pairwise(along))
    stages = next(len(arm.stages) for arm in spec.arms if arm.name == run.arm)  # rounds until the budget is spent end with it
    within = abs(spent - amount) <= stages * largest * (1 + 1e-9)
    return Spent(run.arm, run.seed, spent, spent - amount, largest, within)


def budget_check(spec: StudySpec, runs: Sequence[StudyRun], out: Path) -> dict[str, Any]:
    """The study.json entry `budget`: unit, amount, every finished run's spending, and whether all are equal within a step."""
    found = [spent_by(spec, run, out) for run in runs if is_finished(out / run.folder)]
    return {
        "unit": spec.budget.unit,
        "amount": spec.budget.amount,
        "equal": all(one.equal for one in found),
        "runs": [asdict(one) for one in found],
    }


def budget_warnings(check: dict[str, Any]) -> list[str]:
    """A line for every run whose spending is not equal within a step."""
    return [
        f"{one['arm']}, seed {one['seed']} spent {one['spent']:.4g} {check['unit']} of {check['amount']:.4g}: more than one step "
        f"{'above' if one['overshoot'] > 0 else 'below'} the study's budget, so it is not comparable at equal cost"
        for one in check["runs"]
        if not one["equal"]
    ]
