"""Whole runs of methods that remember: what a recipe needs for them, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import crosstrain
from crosstrain import run
from crosstrain.errors import UserError
from crosstrain.testing import save_tiny_model

REWARD = """
def some(prompts, completions, **kwargs):
    return [float(len(set(c)) > 3) for c in completions]

def none(prompts, completions, **kwargs):
    return [0.0 for c in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}", "level": 10 * i} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(world: Path, method: Any, *, reward: str | None = "some", **more: Any) -> dict[str, Any]:
    stage = {"method": method, "max_steps": 3, "batch_size": 3, "learning_rate": 1e-2, **more}
    return {
        "model": str(world / "model"),
        "data": str(world / "rows.jsonl"),
        **({} if reward is None else {"rewards": [f"{world}/reward.py:{reward}"]}),
        "sampling": {"max_completion_length": 5},
        "evaluation": {"forgetting": False, "divergence": False},
        "stages": [stage],
        "device": "cpu",
        "precision": "fp32",
    }


def lines(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


SRL = {"srl": {"num_generations": 3, "steps": 3, "think_end": ""}}


def test_srl_needs_no_verifier_and_says_so_where_one_is_given(world: Path, tmp_path: Path) -> None:
    result = crosstrain.train(recipe(world, SRL, reward=None), tmp_path / "run")
    assert all(0 < line["reward"] <= 1 for line in lines(result.folder))
    unread = "rewards: no stage has completions for them, so nothing is scored with them"
    assert run.plan(run.as_recipe(recipe(world, SRL))).warnings == (unread,)
    assert run.plan(run.as_recipe(recipe(world, SRL, reward=None))).warnings == ()
    with pytest.raises(UserError, match="nothing scores them"):
        crosstrain.train(recipe(world, "relift", reward=None), tmp_path / "other")


def test_a_step_of_imitation_is_no_look_at_the_reward(world: Path, tmp_path: Path) -> None:
    """Nothing is ever solved: after each step of rollouts comes one of demonstrations, which has no reward to look at."""
    until = {"metric": "reward", "mode": "max", "patience": 2}
    method = {"relift": {"num_generations": 2, "buffer_size": 3, "minibatches": 1}}
    result = crosstrain.train(recipe(world, method, reward="none", max_steps=9, until=until), tmp_path / "run")
    found = lines(result.folder)
    assert [("reward" in line, "weight_share/demo/expert" in line) for line in found] == [(True, False), (False, True)] * 2 + [
        (True, False)
    ], "0 at first, and twice no better"
    assert [line["cost/demonstrations"] for line in found] == [0, 3, 3, 6, 6]
    spent = [line["cost/generated_tokens"] for line in found]
    assert spent[0] == spent[1] < spent[2] == spent[3], "imitation samples nothing"


def test_what_is_written_of_completions_is_what_was_sampled(world: Path, tmp_path: Path) -> None:
    method = {"replay": {"num_generations": 4, "start_rate": 0.0, "replay_ratio": 1.0}}
    result = crosstrain.train(recipe(world, method, max_steps=6), tmp_path / "run")
    assert any("weight_share/replay/policy" in line for line in lines(result.folder))
    written = lines(result.folder, "completions")
    assert len({json.dumps([w["id"], w["step"]]) for w in written}) == len(written)
    recalled = [w for w in written if "@recalled" in w["id"]]
    assert recalled and any(w["reward"] == 0 for w in recalled), "what is replayed was always solved"


def test_difficulty_may_come_from_a_column(world: Path, tmp_path: Path) -> None:
    settings = {
        "column": "level",
        "initial_target": 30.0,
        "width": 15.0,
        "step_size": 1.0,
        "revisit": 0.0,
        "num_generations": 2,
    }
    result = crosstrain.train(recipe(world, {"difficulty_curriculum": settings}, max_steps=6, batch_size=1), tmp_path / "run")
    assert sum(line["examples_skipped"] for line in lines(result.folder)) > 0
    drawn = {w["id"].partition("@")[0] for w in lines(result.folder, "completions")}
    assert drawn == {"train:2", "train:3", "train:4"}
    with pytest.raises(UserError, match="'grade' is None"):
        crosstrain.train(recipe(world, {"difficulty_curriculum": {"column": "grade"}}), tmp_path / "other")
