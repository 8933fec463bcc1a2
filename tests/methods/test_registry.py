"""Methods by name, with their settings on record, and from a file of one's own."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest

from crosstrain.config import load_study
from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import METHODS, load_method
from crosstrain.methods.describe import record
from crosstrain.methods.registry import DIRECTIONS
from crosstrain.objective.words import words_of
from crosstrain.testing import check_method


@pytest.mark.parametrize("name", METHODS)
def test_a_method_records_its_name_paper_and_every_setting(name: str) -> None:
    made, entry = load_method(name), METHODS[name]
    assert made.name == name and made.paper == entry.paper and entry.paper.partition(":")[0] in ("arXiv", "doi")
    assert made.settings == entry.settings
    assert all(
        p.kind is p.KEYWORD_ONLY or p.default is not p.empty for p in inspect.signature(entry.factory).parameters.values()
    )


def test_a_family_and_a_direction_are_the_surveys() -> None:
    assert {entry.family for entry in METHODS.values()} == set(DIRECTIONS)
    assert {entry.direction for entry in METHODS.values()} <= set(DIRECTIONS.values())


def test_named_settings_of_grpo_record_their_own_name_and_settings() -> None:
    made = load_method("dapo", num_generations=4)
    assert made.name == "dapo"
    assert set(made.settings) == set(METHODS["dapo"].settings) and made.settings["num_generations"] == 4


@pytest.mark.parametrize(
    ("name", "settings", "term", "formula"),
    [
        ("asft", {}, "anchor", "KL(ref || pi) over the vocabulary"),
        ("asft", {"direction": "reverse"}, "anchor", "KL(pi || ref) over the vocabulary"),
        ("grpo", {}, "rl", "max(-A r, -A clip(r)), r = pi / old"),
        ("grpo", {"off_policy_correction": "mask"}, "rl", "max(-A r, -A clip(r)), r = pi / old, times w"),
        ("ipo", {}, "ipo", "(d_chosen - d_rejected - 5)^2, d = sum of log pi - log ref"),
        ("ipo", {"average": True}, "ipo", "(d_chosen - d_rejected - 5)^2, d = mean of log pi - log ref"),
        ("ppo", {}, "value", "max((V - R)^2, (clip(V) - R)^2) / 2"),
        ("ppo", {"cliprange_value": 0.0}, "value", "(V - R)^2 / 2"),
        ("reward_model", {}, "preference", "-log sigmoid(r_w - r_l - margin)"),
        (
            "reward_model",
            {"center_rewards_coefficient": 0.01},
            "preference",
            "-log sigmoid(r_w - r_l - margin) + 0.01 (r_w + r_l)^2",
        ),
    ],
)
def test_a_setting_that_changes_the_loss_changes_its_words(
    name: str, settings: dict[str, Any], term: str, formula: str
) -> None:
    assert {t.name: t.describe for t in load_method(name, **settings).terms}[term] == formula


def test_credit_is_named_as_plainly_as_it_is() -> None:
    """ReMax's is one number per answer unless a KL or a discount makes it differ by token."""
    assert words_of(load_method("remax").advantage) == "R - R of the greedy completion"
    assert words_of(load_method("remax", gamma=0.5).advantage) != words_of(load_method("remax").advantage)


def test_unknown_names_and_settings_are_met_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="unknown method 'grpoo'; did you mean 'grpo'"):
        load_method("grpoo")
    with pytest.raises(UserError, match="unknown setting 'num_generation'; did you mean 'num_generations'"):
        load_method("grpo", num_generation=4)


OWN = """
from crosstrain.methods.plans import demonstrations
from crosstrain.objective.terms import by, nll
from crosstrain.types import Method, Per, Source

def weighted_sft(coef: float) -> Method:
    return half_sft(coef)

def in_epochs(epochs: int | None = None) -> Method:
    return half_sft()

def half_sft(coef: float = 0.5) -> Method:
    if coef <= 0:
        raise ValueError(f"coef: got {coef}; it must be positive")
    return Method(terms=(nll("demo", on=by(Source.EXPERT), per=Per(("own_tokens",)), coef=coef),), plan=demonstrations())
"""


def test_a_method_of_ones_own_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    made = load_method(f"{file}:half_sft", coef=0.25)
    assert made.name == f"{file}:half_sft" and made.settings == {"coef": 0.25}
    assert made.terms[0].coefficient(0) == 0.25
    assert load_method(f"{file}:half_sft").settings == {"coef": 0.5}, "a record has defaults too"
    assert load_method(f"{file}:in_epochs").settings == {"epochs": None}
    with pytest.raises(UserError, match="coef: got -1"):
        load_method(f"{file}:half_sft", coef=-1)
    with pytest.raises(UserError, match="'cof'; did you mean 'coef'"):
        load_method(f"{file}:half_sft", cof=1)
    with pytest.raises(UserError, match="no function 'half_sf'; did you mean 'half_sft'"):
        load_method(f"{file}:half_sf")
    with pytest.raises(UserError, match=r"no function 'other'; allowed: half_sft, in_epochs, weighted_sft$"):
        load_method(f"{file}:other")
    with pytest.raises(UserError, match="'coef' has no default"):
        load_method(f"{file}:weighted_sft")
    with pytest.raises(UserError, match="there is no file"):
        load_method(f"{tmp_path}/other.py:half_sft")


MINE = f"{Path(__file__).parents[2] / 'examples' / 'my_method.py'}:focal"


def test_a_method_of_a_users_own_file_has_settings_a_record_and_keeps_the_contract() -> None:
    method = load_method(MINE, power=2.0)
    assert method.settings == {"power": 2.0}
    check_method(method)
    found = record(MINE)
    assert found["settings"] == {"power": 1.0} and found["needs"] == ["demonstrations"] and found["paper"] is None
    assert found["summary"].startswith("Focal imitation")
    with pytest.raises(UserError, match="unknown setting 'pwoer'; did you mean 'power'"):
        load_method(MINE, pwoer=2.0)


def test_what_a_users_method_does_is_explained() -> None:
    """(1 - p)^2 over three tokens of probability 1/2, and over their number."""
    one = {"source": ["prompt", "expert", "expert", "expert"], "logp": [0, *[math.log(0.5)] * 3]}
    found = explain(load_method(MINE, power=2.0), GivenBatch(groups=[{"trajectories": [one]}]))
    assert found["groups"][0]["trajectories"][0]["weights"] == pytest.approx([0, 1 / 12, 1 / 12, 1 / 12])


def test_a_users_method_has_a_place_in_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    spec = load_study("examples/my_study.yaml")
    made = [load_method(arm.stages[0].method.name, **arm.stages[0].method.settings) for arm in spec.arms]
    assert [m.name for m in made] == ["sft", "dft", "examples/my_method.py:focal"]
