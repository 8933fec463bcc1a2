"""How far a run's prediction is from what it then takes, on two small recipes in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.random_model import Size, save_random_model

GOAL = 0.25
"""Largest error of a prediction that is good enough to plan with."""

KEYS = ("seconds", "peak_memory_gb", "flops")

METHODS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"method": "sft", "batch_size": 16},
    "grpo": {"method": {"grpo": {"num_generations": 8, "beta": 0.0}}, "batch_size": 4},
}


def prediction_errors(folder: Path, size: Size, steps: int) -> list[dict[str, Any]]:
    """A row per recipe and quantity: what was predicted, what was measured, and by which share the first is off.

    Each recipe trains a random model of `size` for `steps` steps on sums; `folder` holds models and runs.
    """
    model = save_random_model(folder / "model", size)
    rows = []
    for name, stage in METHODS.items():
        record = _train(folder / name, _recipe(model, stage, steps))
        for key in KEYS:
            predicted, measured = record["predicted"][key], record["measured"][key]
            rows.append(
                {
                    "recipe": name,
                    "quantity": key,
                    "predicted": predicted,
                    "measured": measured,
                    "error": predicted / measured - 1,
                }
            )
    return rows


def misses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every prediction that is off by more than GOAL.

    >>> misses([{"recipe": "sft", "quantity": "seconds", "predicted": 2.0, "measured": 1.0, "error": 1.0}])
    ['sft: seconds were predicted 100% too high, the goal is within 25%']
    """
    return [
        f"{row['recipe']}: {row['quantity']} were predicted {abs(row['error']):.0%} too {'high' if row['error'] > 0 else 'low'}, "
        f"the goal is within {GOAL:.0%}"
        for row in rows
        if abs(row["error"]) > GOAL
    ]


def _recipe(model: Path, stage: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {"task": "sums", "size": 256},
        "sampling": {"max_completion_length": 32},
        "evaluation": {"forgetting": False, "divergence": False},
        "device": "cpu",
        "stages": [{**stage, "max_steps": steps, "learning_rate": 1e-6}],
    }


def _train(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run in a process of its own, whose memory nothing else is in."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
    command = [sys.executable, "-m", "crosstrain", "train", str(folder / "recipe.yaml"), "--out", str(folder / "run")]
    subprocess.run(command, check=True, capture_output=True)
    record: dict[str, Any] = json.loads((folder / "run" / "record.json").read_text(encoding="utf-8"))
    return record
