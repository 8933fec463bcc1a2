"""`explain` for methods with a value head: values are given, and what would move them is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from crosstrain.cli import main
from crosstrain.config.files import parse
from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import load_method
from crosstrain.methods.describe import needs_of


def batch_of(*trajectories: dict[str, Any]) -> GivenBatch:
    return parse(GivenBatch, {"groups": [{"trajectories": list(trajectories)}]})


OWN: dict[str, Any] = {
    "source": ["prompt", "policy", "policy"],
    "logp": [0, -1, -1],
    "reward": 1.0,
    "old_logp": [0, -1, -1 - math.log(1.5)],
    "value": [0, 0.8, 0.65],
    "old_value": [0, 0.5, 0.25],
}


def test_ppo_by_hand() -> None:
    """The numbers of the method's own test: A = -+ 1/sqrt 2, the second ratio clipped, the second value too far away already."""
    found = explain(load_method("ppo", kl_coef=0.0, lam=0.5), batch_of(OWN))
    [shown] = found["groups"][0]["trajectories"]
    a = 1 / math.sqrt(2)
    assert found["groups"][0]["advantage"][0] == [None, pytest.approx(-a, abs=1e-7), pytest.approx(a, abs=1e-7)]
    assert shown["weights"] == pytest.approx([0.0, -a / 2, 0.0], abs=1e-7)
    assert shown["value_weights"] == pytest.approx([0.0, 0.1 * (0.625 - 0.8) / 2, 0.0])
    assert [t["name"] for t in found["terms"]] == ["rl", "value"]


def test_an_absent_old_value_is_the_current_one() -> None:
    now = {k: v for k, v in OWN.items() if k not in ("old_value", "old_logp")}
    both = explain(load_method("ppo", kl_coef=0.0), batch_of({**now, "old_value": now["value"], "old_logp": now["logp"]}))
    assert explain(load_method("ppo", kl_coef=0.0), batch_of(now)) == both


def test_a_reward_model_moves_rewards_and_no_word() -> None:
    """r_w = 2 and r_l = 1 at the last tokens: +- sigmoid(-1)."""
    answers = [
        {"source": ["prompt", "expert", "expert"], "logp": [0, -1, -1], "reward": 1.0, "value": [0, 9, 2.0]},
        {"source": ["prompt", "expert"], "logp": [0, -1], "reward": 0.0, "value": [0, 1.0]},
    ]
    found = explain(load_method("reward_model"), batch_of(*answers))
    better, worse = found["groups"][0]["trajectories"]
    s = 1 / (1 + math.e)
    assert better == {"selected": True, "weights": [0.0, 0.0, 0.0], "value_weights": pytest.approx([0.0, 0.0, s])}
    assert worse["value_weights"] == pytest.approx([0.0, -s])


def test_values_that_are_missing_are_named() -> None:
    for name, one in (("ppo", {"kl_coef": 0.0}), ("reward_model", {})):
        lacking = [{k: v for k, v in OWN.items() if k not in ("value", "old_value")}]
        if name == "reward_model":
            lacking = [{**lacking[0], "source": ["prompt", "expert", "expert"], "reward": reward} for reward in (1.0, 0.0)]
        with pytest.raises(UserError, match=f"method {name} needs `value`, which is absent from groups.0.trajectories.0"):
            explain(load_method(name, **one), batch_of(*lacking))


def test_it_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "batch.json"
    file.write_text(json.dumps({"groups": [{"trajectories": [OWN]}]}))
    assert main(["explain", "ppo", "--batch", str(file), "--set", "kl_coef=0.0", "--set", "lam=0.5"]) == 0
    assert "The value head's output would rise at 0 tokens and fall at 1." in " ".join(capsys.readouterr().out.split())


def test_what_they_need_is_a_value_head() -> None:
    assert needs_of(load_method("ppo")) == ["verifier", "reference model", "value head"]
    assert needs_of(load_method("ppo", kl_coef=0.0)) == ["verifier", "value head"]
    assert needs_of(load_method("reward_model")) == ["preferences", "value head"]
