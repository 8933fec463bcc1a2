"""Trackers get every line's numbers, and are closed also when a run fails."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from crosstrain.config import Recipe, parse
from crosstrain.errors import UserError
from crosstrain.training.trackers import TRACKERS, trackers


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **k: seen.append(("init", k)),
        log=lambda line, step: seen.append(("log", line, step)),
        finish=lambda: seen.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return seen


def test_lines_arrive_with_their_step(calls: list[Any]) -> None:
    with trackers(["trackio"], project="p", run="r", config={"seed": 1}) as log:
        log({"step": 3, "method": "sft", "loss": 0.5, "reward": math.nan})
    assert calls == [
        ("init", {"project": "p", "name": "r", "config": {"seed": 1}}),
        ("log", {"step": 3, "loss": 0.5}, 3),
        ("finish",),
    ]


def test_a_failed_run_closes_its_trackers(calls: list[Any]) -> None:
    with pytest.raises(RuntimeError), trackers(["trackio"], project="p", run="r", config={}):
        raise RuntimeError
    assert calls[-1] == ("finish",)


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(UserError, match=f"report_to: {name} is not installed .*pip install"),
        trackers([name], project="p", run="r", config={}),
    ):
        pass


def test_an_unknown_one_is_refused_when_the_recipe_is_read() -> None:
    recipe = {"data": "rows.jsonl", "method": "sft", "learning_rate": 1e-5, "max_steps": 1, "report_to": ["tensorbord"]}
    with pytest.raises(UserError, match=r"report_to\.0: .*'trackio' or 'wandb'"):
        parse(Recipe, recipe)
