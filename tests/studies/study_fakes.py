"""Stand-ins for planning, training and evaluation that take milliseconds and write the files that the real ones write.

Run as a script it is a whole study with slow fakes, for tests that kill it: `study_fakes.py OUT CALLS SECONDS_PER_STEP`.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from crosstrain.config import Recipe, StudySpec, config_hash, parse
from crosstrain.studies.attempt import Actions
from crosstrain.studies.runner import run_study
from crosstrain.training.checkpoint import write_json
from crosstrain.training.cost import Cost
from crosstrain.training.record import append_lines, read_lines

STUDY: dict[str, Any] = {
    "name": "small",
    "shared": {
        "data": {"task": "sums"},
        "device": "cpu",
        "evaluation": {
            "in_distribution": [{"name": "sums", "task": "sums", "size": 4}],
            "dev": {"name": "dev", "task": "sums", "split": "dev", "size": 4},
            "dev_samples": 2,
        },
    },
    "arms": [
        {"method": "sft", "learning_rate": 1e-5},
        {
            "stages": [
                {"method": "sft", "learning_rate": 1e-5, "budget_share": 0.5},
                {"method": {"grpo": {"beta": 0.0}}, "learning_rate": 2e-5, "budget_share": 0.5},
            ]
        },
    ],
    "seeds": [0, 1],
    "budget": {"unit": "flops", "amount": 100.0},
    "tune": {"learning_rates": [1e-6, 1e-5, 1e-4], "seeds": [7]},
    "quick": {"seeds": [5], "budget.amount": 20.0},
}


def small_study(**changes: Any) -> StudySpec:
    """A study of two arms and two seeds, with some of its top-level keys replaced."""
    return parse(StudySpec, {**STUDY, **changes})


def accuracy(recipe: Recipe) -> float:
    """What a fake run scores: best at a rate of 1e-5 in its last stage."""
    return {1e-6: 0.25, 1e-5: 0.75, 1e-4: 0.5}.get(recipe.stages[-1].learning_rate, 0.1)


@dataclass
class Fakes:
    """Fake actions that note what was asked of them.

    step_cost: spent per step. before_step: called with (recipe, step) before each one; it may raise.
    """

    step_cost: float = 30.0
    before_step: Callable[[Recipe, int], None] = lambda recipe, step: None
    score: Callable[[Recipe], float] = accuracy
    trained: list[tuple[Path, Recipe, dict[str, Any]]] = field(default_factory=list)
    bases: list[Path] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)

    def actions(self) -> Actions:
        return Actions(self.plan, self.train, self.evaluate_base, self.write_report, lambda: None)

    def plan(self, recipe: Recipe) -> Any:
        amount = recipe.budget.amount if recipe.budget else 0.0
        stages = [SimpleNamespace(method=s.method.name, steps=4, cost=Cost(1, 1, amount, 1)) for s in recipe.stages]
        return SimpleNamespace(
            model="tiny",
            precision="fp32",
            device="cpu",
            rows={"train": 8},
            warnings=(),
            predicted=SimpleNamespace(seconds=120.0, peak_memory_gb=3.1),
            stages=tuple(stages),
        )

    def train(self, recipe: Recipe, output_dir: Path, *, base: Any, save_weights: bool, display: Any) -> Any:
        record_file = output_dir / "record.json"
        record = json.loads(record_file.read_text()) if record_file.is_file() else {}
        if record.get("status") != "finished":
            self.trained.append((output_dir, recipe, {"base": base, "save_weights": save_weights}))
            record = self._run(recipe, output_dir, record, display)
        evaluation = json.loads((output_dir / "evaluation.json").read_text())
        return SimpleNamespace(folder=output_dir, cost=Cost(**record["cost"]), metrics={}, evaluation=evaluation)

    def _run(self, recipe: Recipe, folder: Path, record: dict[str, Any], display: Any) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "recipe.json", {"hash": config_hash(recipe)})
        write_json(folder / "record.json", {**record, "status": "running"})
        assert recipe.budget is not None
        lines = read_lines(folder / "metrics.jsonl")
        step, spent = len(lines), lines[-1]["cost/flops"] if lines else 0.0
        display.start(folder.name, 0.0)
        while spent < recipe.budget.amount:
            self.before_step(recipe, step)
            step, spent = step + 1, spent + self.step_cost
            append_lines(folder / "metrics.jsonl", [{"step": step, "cost/flops": spent, "loss": 1.0}])
            display.step(spent / recipe.budget.amount, {"loss": 1.0, "cost/processed_tokens": 10.0 * step})
        display.finish()
        write_json(folder / "evaluation.json", {"metrics": {"accuracy": self.score(recipe)}})
        record = {**record, "status": "finished", "cost": asdict(Cost(flops=spent))}
        write_json(folder / "record.json", record)
        return record

    def evaluate_base(self, recipe: Recipe, folder: Path, *, display: Any) -> Any:
        self.bases.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "record.json", {"status": "finished", "cost": {"seconds": 3.0}})
        return "the base's answers"

    def write_report(self, folder: Path) -> Path:
        self.reports.append(folder)
        return folder / "report.html"

    def names(self) -> list[str]:
        """The folders that were trained in, as <arm>/seed-<s>."""
        return ["/".join(folder.parts[-2:]) for folder, _, _ in self.trained]


def quiet() -> tuple[Console, io.StringIO]:
    """A console that is no terminal, and what is printed on it."""
    printed = io.StringIO()
    return Console(file=printed, width=200), printed


def main(out: str, calls: str, seconds: str) -> None:
    """A whole study whose steps take `seconds`; every trained step adds a line to the file `calls`."""

    def slowly(recipe: Recipe, step: int) -> None:
        time.sleep(float(seconds))
        with Path(calls).open("a") as file:
            file.write(f"{recipe.stages[-1].method.name} seed {recipe.seed} step {step}\n")

    fakes = Fakes(before_step=slowly)
    run_study(small_study(), Path(out), console=Console(stderr=True), actions=fakes.actions())


if __name__ == "__main__":
    main(*sys.argv[1:])
