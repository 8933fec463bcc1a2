"""Files and modules of the user's own are noticed when they change; installed ones and ours are not looked at."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from crosstrain.config import Recipe, parse
from crosstrain.own_code import code_of


def test_files_and_modules_of_ones_own_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("raise AssertionError('it must not be imported')\n")
    (tmp_path / "mine/rewards.py").write_text("def score(completions, **kwargs): ...\n")
    (tmp_path / "task.py").write_text("")
    names = [
        "mine.rewards:score",
        "task:sums",
        "crosstrain.rewards.builtin:exact",
        "numpy.linalg:norm",
        "json:dumps",
        "no.where:f",
    ]
    recipe = parse(
        Recipe, {"data": {"task": "sums"}, "method": "grpo", "learning_rate": 1e-5, "max_steps": 1, "rewards": names}
    )
    text = (tmp_path / "mine/rewards.py").read_bytes()
    assert code_of(recipe) == {"mine.rewards": hashlib.sha256(text).hexdigest()}
