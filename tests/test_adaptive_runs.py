"""Whole runs of methods that remember, look or read in ways of their own: after a kill they end as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import crosstrain
from crosstrain import run
from crosstrain.errors import UserError
from crosstrain.testing import save_tiny_model, tiny_tokenizer
from crosstrain.training.record import read_lines

TIMINGS = ("step_time", "cost/seconds", "time/")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    answers = [f"it is {i}" for i in range(5)]
    n = [len(tiny_tokenizer()(answer)["input_ids"]) + 1 for answer in answers]
    rows = {
        "demos": [{"prompt": f"say {i}", "completion": answer} for i, answer in enumerate(answers)],
        "scored": [
            {"prompt": f"say {i}", "completion": answer, "behaviour_logp": [-0.1 * (i + 1)] * n[i]}
            for i, answer in enumerate(answers)
        ],
        "prompts": [{"prompt": f"what is {i}"} for i in range(4)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    return folder


def recipe(world: Path, method: Any, data: dict[str, str], **more: Any) -> dict[str, Any]:
    return {
        "model": str(world / "model"),
        "data": {name: str(world / f"{file}.jsonl") for name, file in data.items()},
        "rewards": [f"{world}/reward.py:length"],
        "sampling": {"max_completion_length": 4},
        "evaluation": {"forgetting": False, "divergence": False},
        "stages": [{"method": method, "max_steps": 6, "batch_size": 4, "learning_rate": 1e-2}],
        "device": "cpu",
        "precision": "fp32",
        "save": {"save_steps": 1},
        **more,
    }


BOTH = {"rl": "prompts", "demos": "demos"}
RUNS: dict[str, tuple[Any, dict[str, str]]] = {
    "sasr": ({"sasr": {"warmup_steps": 1, "num_generations": 2}}, BOTH),
    "amft": ({"amft": {"warmup_steps": 1, "num_generations": 2, "entropy_lr": 0.5, "meta_lr": 1.0, "meta_every": 2}}, BOTH),
    "pear": ("pear", {"train": "scored"}),
    "pear by the base": ({"pear": {"behaviour": "reference"}}, {"train": "demos"}),
    "token_cleaning": ("token_cleaning", {"train": "demos"}),
    "ift": ("ift", {"train": "demos"}),
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in read_lines(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted = recipe(world, *RUNS[name])
    whole = crosstrain.train(wanted, tmp_path / "whole").folder
    saved, saves = run._Run._save, iter(range(100))

    def killed(self: Any) -> None:
        n = next(saves)
        if n == 1:
            raise KeyboardInterrupt
        saved(self)
        if n == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(run._Run, "_save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            crosstrain.train(wanted, tmp_path / "killed")
    again = crosstrain.train(wanted, tmp_path / "killed").folder
    assert lines(again) == lines(whole)
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
    planned = run.plan(run.as_recipe(wanted))
    assert planned.predicted.steps == 6


def test_pear_without_log_probs_is_told_before_step_1(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs the column `behaviour_logp` .* which 5 of 5 rows of 'train' lack"):
        crosstrain.train(recipe(world, "pear", {"train": "demos"}), tmp_path / "run")


def test_a_stage_may_be_ended_by_a_norm_that_not_every_step_measures(world: Path, tmp_path: Path) -> None:
    """AMFT measures in its first, fourth and seventh step here; the fourth is the second look, and not better by enough."""
    method = {"amft": {"warmup_steps": 0, "num_generations": 2, "meta_lr": 0.1, "meta_every": 3}}
    until = {"metric": "grad_norm/demo", "rule": "plateau", "mode": "max", "patience": 1, "min_delta": 1e6}
    stages = [{"method": method, "max_steps": 8, "batch_size": 4, "learning_rate": 1e-4, "until": until}]
    result = crosstrain.train(recipe(world, method, BOTH, stages=stages), tmp_path / "run")
    [ended] = json.loads((result.folder / "record.json").read_text())["stages"]
    assert ended == {"method": "amft", "steps": 4, "ended_by": "plateau of grad_norm/demo"}
