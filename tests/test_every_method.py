"""Every registered method as a whole run: it trains, and one that was stopped ends as one that was not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import crosstrain
from crosstrain.methods import METHODS, load_method
from crosstrain.testing import save_tiny_model
from crosstrain.training.display import Display
from crosstrain.training.record import read_lines

SMALL: dict[str, dict[str, Any]] = {
    "dapo": {"minibatches": 2},
    "difficulty_curriculum": {"column": "difficulty"},
    "hpt_soft": {"num_generations": 7},
    "mifo": {"buffer_size": 2, "hardest": 0.4},
    "pear": {"behaviour": "reference"},
    "relift": {"buffer_size": 2},
    "rollout_selection": {"keep": 2},
    "srl": {"think_end": ""},
}
"""Settings of methods that differ from the published ones, or from 4 completions."""

REWARD = "def letters(completions, **kwargs):\n    return [float(len(set(c)) > 3) for c in completions]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "teacher", seed=1)
    (folder / "reward.py").write_text(REWARD)
    kinds: dict[str, list[dict[str, Any]]] = {
        "demonstration": [
            {"prompt": f"say {i}", "completion": f"it is {i}", "answer": str(i), "difficulty": i} for i in range(7)
        ],
        "pair": [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(7)],
        "label": [{"prompt": f"say {i}", "completion": f"it is {i}", "label": i % 2 == 0} for i in range(7)],
    }
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(world: Path, name: str, *, model: str | None = None, teacher: str | None = None, **more: Any) -> dict[str, Any]:
    """Three steps of a method, on whatever rows it needs."""
    settings = dict(SMALL.get(name, {}))
    known = METHODS[name].settings
    if "num_generations" in known:
        settings.setdefault("num_generations", 4)
    if known.get("max_completion_length") is not None:
        settings.setdefault("max_completion_length", 6)
    method = load_method(name, **settings)
    streams = method.plan.streams(method.init())
    return {
        "model": model or str(world / "model"),
        "data": {stream: str(world / f"{method.plan.brings(stream) or 'demonstration'}.jsonl") for stream in streams},
        **({"rewards": [f"{world / 'reward.py'}:letters"]} if method.plan.samples else {}),
        "method": {name: settings},
        "max_steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "sampling": {"max_completion_length": 6},
        "evaluation": {"forgetting": False, "divergence": False},
        "save": {"save_steps": 1},
        **({"teacher": teacher or str(world / "teacher")} if method.reads("teacher") else {}),
        **more,
    }


class Stopped(Exception):
    """Somebody pulled the plug."""


def stopping_at(step: int) -> Display:
    """A display that ends the run before a step is saved."""
    display = Display()

    def look(done: float, line: Mapping[str, Any]) -> None:
        if line["step"] == step:
            raise Stopped

    display.step = look  # type: ignore[method-assign]
    return display


def without_timings(folder: Path) -> list[dict[str, Any]]:
    lines = read_lines(folder / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and k not in ("step_time", "cost/seconds")}
        for line in lines
    ]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_and_ends_the_same_when_it_was_stopped(world: Path, tmp_path: Path, name: str) -> None:
    settings = recipe(world, name, precision="fp32", device="cpu")
    whole = crosstrain.train(settings, tmp_path / "whole")
    assert whole.cost.processed_tokens > 0
    norms = [line.get("grad_norm") for line in read_lines(whole.folder / "metrics.jsonl")]
    assert any(norm is not None and math.isfinite(norm) and norm > 0 for norm in norms), "no step trained anything"

    with pytest.raises(Stopped):
        crosstrain.train(settings, tmp_path / "stopped", display=stopping_at(2))
    stopped = crosstrain.train(settings, tmp_path / "stopped")
    assert repr(without_timings(stopped.folder)) == repr(without_timings(whole.folder))  # NaN is NaN here
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole.folder, stopped.folder))
    start = load_file(world / "model" / "model.safetensors")
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert any(not torch.equal(one[key], start[key]) for key in one), "no weight moved"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_follows_a_critic(world: Path, tmp_path: Path, name: str) -> None:
    """A stage finds what another has left: a value head among the weights, moments and marks, streams further on."""
    one, other = recipe(world, "ppo"), recipe(world, name, precision="fp32", device="cpu")
    keys = ("method", "batch_size", "learning_rate")
    stages = [{**{key: r[key] for key in keys}, "max_steps": n} for r, n in ((one, 1), (other, 2), (one, 1))]
    rest = {key: value for key, value in other.items() if key not in (*keys, "max_steps")}
    both = {**rest, "rewards": one["rewards"], "data": {**one["data"], **other["data"]}, "stages": stages}
    if METHODS[name].factory().plan.brings("train") in ("pair", "label"):
        both["data"] = {"prompts": one["data"]["train"], **other["data"]}
        stages[0]["data"] = stages[2]["data"] = "prompts"
    whole = crosstrain.train(both, tmp_path / "whole", save_weights=False)
    with pytest.raises(Stopped):
        crosstrain.train(both, tmp_path / "stopped", save_weights=False, display=stopping_at(3))
    stopped = crosstrain.train(both, tmp_path / "stopped", save_weights=False)
    assert repr(without_timings(stopped.folder)) == repr(without_timings(whole.folder))


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("name", METHODS)
def test_a_real_model_takes_two_steps(world: Path, tmp_path: Path, name: str) -> None:
    real = "smollm2-135m-instruct"
    settings = recipe(world, name, model=real, teacher=real, max_steps=2, learning_rate=1e-5)
    found = crosstrain.train(settings, tmp_path / "run", save_weights=False)
    lines = read_lines(found.folder / "metrics.jsonl")
    assert len(lines) == 2
    assert all(math.isfinite(line["grad_norm"]) for line in lines if "grad_norm" in line)
