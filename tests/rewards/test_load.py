"""Reward functions by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crosstrain.errors import UserError
from crosstrain.rewards import load_reward


def test_a_loaded_reward_is_called_as_trl_calls_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(completions, answer, **kwargs): return [float(c == a) for c, a in zip(completions, answer)]"
    )
    f = load_reward(f"{tmp_path / 'mine.py'}:f")
    assert f.name == "f"
    assert f(prompts=["p"] * 2, completions=["a", "b"], completion_ids=[[1], [2]], answer=["a", "a"]) == [1.0, 0.0]


def test_built_in_module_and_task_rewards_are_found() -> None:
    chat = [[{"role": "assistant", "content": "3 + 4 = 7"}]]
    assert load_reward("number_match")(completions=chat, answer=[7]) == [1.0]
    assert load_reward("crosstrain.rewards.builtin:exact_match")(completions=chat, answer=["7"]) == [0.0]
    assert load_reward("task:sums")(completions=chat, answer=["7"]) == [1.0]


def test_a_tasks_settings_reach_its_reward() -> None:
    pytest.importorskip("reasoning_gym")
    reward = load_reward("task:reasoning_gym", dataset="chain_sum", config={"max_terms": 2})
    assert reward.name == "reasoning_gym"
    columns = {"gym_seed": [0], "gym_size": [1], "gym_index": [0]}
    assert reward(completions=["no answer"], **columns) == [0.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_mtch", "did you mean 'exact_match'"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("some/where:f", "neither a .py file nor a module"),
        ("check.py:", "no name of a function"),
        ("task:sum", "did you mean 'sums'"),
    ],
)
def test_a_spec_that_names_nothing_says_what_would(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(spec)


def test_a_module_that_is_not_there_is_an_error_in_the_first_call() -> None:
    with pytest.raises(UserError, match="no_such_module"):
        load_reward("no_such_module.inner:f")(completions=[])


def test_settings_are_for_tasks_only() -> None:
    with pytest.raises(UserError, match="only task:NAME takes settings; got dataset"):
        load_reward("exact_match", dataset="x")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, crosstrain.rewards; crosstrain.rewards.load_reward('exact_match'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
