"""Kill -9 at any moment, run the same command again: bit-identical weights and metrics, timings aside."""

from __future__ import annotations

import json
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from safetensors.torch import load_file

from crosstrain.testing import save_tiny_model

TIMINGS = {"step_time", "cost/seconds", *(f"time/{part}" for part in ("sampling", "reward", "batch", "backward", "optimizer"))}
REWARD = """
def first_letter(prompts, completions, answer, **kwargs):
    return [float(len(c[0]["content"]) > 3) + 0.1 * len(set(c[0]["content"])) for c in completions]
"""


def stage(method: Any, **more: Any) -> dict[str, Any]:
    return {"method": method, "max_steps": 6, "batch_size": 3, "learning_rate": 1e-2, **more}


STAGES = {
    "sft": [stage("sft", lr_scheduler_type="cosine", warmup_steps=2)],
    "grpo": [stage({"grpo": {"num_generations": 3, "num_iterations": 2, "minibatches": 2}})],
    "luffy": [stage({"luffy": {"num_generations": 3}})],
    "ppo": [stage({"ppo": {"num_generations": 2, "num_ppo_epochs": 2, "num_mini_batches": 2}}, value_learning_rate=0.1)],
    "replay": [stage({"replay": {"num_generations": 3, "solved_above": 1.3, "start_rate": 0.0}})],
    "mifo": [stage({"mifo": {"num_generations": 3, "solved_above": 1.4, "buffer_size": 2, "hardest": 0.4}})],
    "sft then grpo": [stage("sft", max_steps=3), stage({"grpo": {"num_generations": 3}}, restart_optimizer=False, max_steps=4)],
    "sft then grpo, lora": [stage("sft", max_steps=3), stage({"grpo": {"num_generations": 3}}, max_steps=4)],
}


MEMORIES = {"replay": "weight_share/replay/policy", "mifo": "weight_share/demo/expert"}
"""What stands in a line of metrics where a method made use of what it remembered."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "completion": [{"role": "assistant", "content": f"it is {i}"}],
            "answer": str(i),
        }
        for i in range(7)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(world: Path, name: str) -> Path:
    content = {
        "model": {"name": str(world / "model"), "lora": {"r": 2} if name.endswith("lora") else None},
        "data": str(world / "rows.jsonl"),
        "rewards": [f"{world / 'reward.py'}:first_letter"],
        "stages": STAGES[name],
        "sampling": {"max_completion_length": 6},
        "evaluation": {"forgetting": False, "divergence": False},
        "save": {"save_steps": 1},
        "precision": "fp32",
        "device": "cpu",
    }
    path = world / f"{name.replace(' ', '-')}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(path: Path, out: Path, *, fresh: bool = False) -> BaseProcess:
    return forked.start(["train", str(path), "--out", str(out)], printed(out), fresh=fresh)


def printed(out: Path) -> Path:
    return out.with_suffix(".txt")


def finish(path: Path, out: Path, *, fresh: bool = False) -> None:
    process = start(path, out, fresh=fresh)
    process.join(240)
    assert process.exitcode == 0, printed(out).read_text()


def kill_after(moment: int, path: Path, out: Path, *, fresh: bool = False) -> None:
    """Start a run and end it by force once that many steps are on record."""
    process = start(path, out, fresh=fresh)
    deadline = time.monotonic() + 240
    while len(steps(out)) < moment:
        assert process.is_alive(), printed(out).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"


def steps(out: Path) -> list[dict[str, Any]]:
    file = out / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


FRESH = "sft then grpo"
"""The pipeline whose killed and resumed processes are started as a user starts them."""


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_ends_as_if_it_had_not_been(world: Path, tmp_path: Path, name: str) -> None:
    path, fresh = recipe(world, name), name == FRESH
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(path, whole)
    last = len(steps(whole))

    kill_after(random.Random(name).randint(1, last - 2), path, killed, fresh=fresh)
    assert len(steps(killed)) < last, "the run was over before it was killed"
    finish(path, killed, fresh=fresh)

    if name in MEMORIES:
        assert any(MEMORIES[name] in line for line in steps(whole)), "nothing was remembered"
    clean = [{k: v for k, v in line.items() if k not in TIMINGS} for line in steps(whole)]
    again = [{k: v for k, v in line.items() if k not in TIMINGS} for line in steps(killed)]
    assert again == clean
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    start_weights = load_file(world / "model" / "model.safetensors")
    assert any(not torch.equal(one[k], start_weights[k]) for k in one), "the run trained nothing"
