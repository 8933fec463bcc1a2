"""Stages in sequence: data of their own, rounds, rules that end them; and all of it after a kill at any step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import crosstrain
from crosstrain import run
from crosstrain.config import Recipe, StudySpec, parse
from crosstrain.errors import UserError
from crosstrain.in_turn import in_turn
from crosstrain.studies.budget import check_can_be_equal
from crosstrain.studies.tune import with_rates
from crosstrain.testing import save_tiny_model
from crosstrain.training import checkpoint
from crosstrain.training.record import read_lines
from crosstrain.training.switch import Watch, look, peak, plateau, stage_after, threshold
from tensors import equal

GRPO = {"grpo": {"num_generations": 3}}
TIMINGS = ("step_time", "cost/seconds", "time/")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    rows = {
        "demos": [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(5)],
        "pairs": [{"prompt": f"tell {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(7)],
        "prompts": [{"prompt": f"what is {i}"} for i in range(4)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    return folder


def stage(method: Any, **more: Any) -> dict[str, Any]:
    return {"method": method, "max_steps": 2, "batch_size": 3, "learning_rate": 1e-2, **more}


def recipe(world: Path, *stages: Any, **more: Any) -> dict[str, Any]:
    return {
        "model": str(world / "model"),
        "data": {name: str(world / f"{name}.jsonl") for name in ("demos", "pairs", "prompts")},
        "rewards": [f"{world}/reward.py:length"],
        "sampling": {"max_completion_length": 4},
        "evaluation": {"forgetting": False, "divergence": False},
        "stages": list(stages),
        "device": "cpu",
        "precision": "fp32",
        "save": {"save_steps": 1},
        **more,
    }


DEV = {"task": "sums", "split": "dev", "size": 2}
LOOKS = {
    "evaluation": {
        "forgetting": False,
        "divergence": False,
        "eval_steps": 1,
        "dev": {"name": "dev", **DEV},
        "dev_ood": {"name": "shifted", **DEV, "seed": 1},
    },
    "max_length": 400,
    "max_prompt_length": 200,
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in read_lines(folder / "metrics.jsonl")]


def ended(folder: Path) -> list[tuple[str, int, str]]:
    stages = json.loads((folder / "record.json").read_text())["stages"]
    return [(s["method"], s["steps"], s["ended_by"]) for s in stages]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


# --- data of a stage -------------------------------------------------------------------------------------------------


def test_each_stage_draws_from_its_own_stream_and_goes_on_where_an_earlier_one_stopped(world: Path, tmp_path: Path) -> None:
    stages = [stage("sft", data="demos"), stage("dpo", data={"train": "pairs"}), stage(GRPO, data="prompts")]
    again = stage("sft", data="demos", max_steps=1)
    result = crosstrain.train(recipe(world, *stages, again), tmp_path / "run")
    assert [line["epoch"] for line in lines(result.folder)] == [3 / 5, 6 / 5, 3 / 7, 6 / 7, 3 / 4, 6 / 4, 9 / 5]
    seen = read_lines(result.folder / "completions.jsonl")
    assert all("what is" in json.dumps(line) for line in seen)
    assert json.loads((result.folder / "record.json").read_text())["warnings"] == []
    other = crosstrain.train(recipe(world, stage("sft", data="demos", max_steps=3)), tmp_path / "straight")
    assert lines(other.folder)[:2] == lines(result.folder)[:2], "the first stage is as it would be alone"


def test_a_method_of_two_streams_takes_a_mapping_and_both_may_be_one(world: Path, tmp_path: Path) -> None:
    chord = {"chord_mu": {"num_generations": 2}}
    apart = stage(chord, data={"rl": "prompts", "demos": "demos"}, max_steps=1, batch_size=6)
    found = lines(crosstrain.train(recipe(world, apart), tmp_path / "apart").folder)
    assert found[0]["epoch"] == 6 / 9, "4 demonstrations and 2 prompts of 5 + 4 rows"
    one = stage(chord, data={"rl": "demos"}, max_steps=1, batch_size=6)
    found = lines(crosstrain.train(recipe(world, one), tmp_path / "one").folder)
    assert found[0]["epoch"] == 6 / 5, "both draw from the same rows, one after the other"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (stage("sft", data="demoz"), r"stage 0 draws from a data stream 'demoz'; the recipe has demos, pairs, prompts"),
        (stage("sft", data={"trian": "demos"}), r"method sft draws from no stream 'trian'; did you mean 'train'"),
        (stage("sft"), r"method sft draws from a data stream 'train'.*a stage's `data` says which stream is its 'train'"),
        (stage("chord_mu", data="demos"), r"draws from rl, demos; give `data: \{rl: demos, demos: demos\}`"),
        (stage("sft", data="pairs"), r"method sft needs a demonstration .* 7 of 7 rows of 'pairs' lack"),
        (stage("dpo", data="demos"), r"method dpo needs `chosen` and `rejected`, which 5 of 5 rows of 'demos' lack"),
    ],
)
def test_wrong_streams_are_told_before_step_1(world: Path, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        crosstrain.train(recipe(world, wrong), tmp_path / "run")
    assert not lines(tmp_path / "run")


def test_streams_that_no_stage_draws_from_are_named_and_the_plan_knows_the_others(world: Path) -> None:
    planned = run.plan(run.as_recipe(recipe(world, stage("sft", data="demos"), stage("dpo", data="pairs"))))
    assert "data.prompts: no stage draws from it" in planned.warnings
    assert not any("demos" in w or "pairs" in w for w in planned.warnings)
    apart = run.plan(run.as_recipe(recipe(world, stage("sft", data="demos"), stage("sft", data="long"), data=_long(world))))
    assert apart.stages[1].cost.processed_tokens > 2 * apart.stages[0].cost.processed_tokens


def _long(world: Path) -> dict[str, str]:
    rows = [{"prompt": f"say {i}", "completion": f"it is {i} " * 8} for i in range(5)]
    (world / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"demos": str(world / "demos.jsonl"), "long": str(world / "long.jsonl")}


def test_reference_log_probs_computed_beforehand_are_those_of_the_stages_stream(world: Path, tmp_path: Path) -> None:
    for flag in (False, True):
        dpo = stage("dpo", data="pairs", precompute_ref_log_probs=flag)
        crosstrain.train(recipe(world, stage("sft", data="demos"), dpo), tmp_path / f"{flag}")
    one, other = (weights(tmp_path / name) for name in ("False", "True"))
    assert one
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_an_arm_names_its_data_beside_its_method() -> None:
    spec = {
        "name": "s",
        "shared": {"model": "x", "data": {"demos": "a.jsonl", "pairs": "b.jsonl"}},
        "arms": [
            {"method": "sft", "learning_rate": 1e-5, "data": "demos"},
            {"method": "dpo", "learning_rate": 1e-5, "data": "pairs"},
        ],
        "budget": {"amount": 100},
    }
    study = parse(StudySpec, spec)
    assert [study.recipe(arm.name, 0).stages[0].data for arm in study.arms] == ["demos", "pairs"]


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_are_the_stages_written_out(world: Path, tmp_path: Path) -> None:
    sft, grpo = stage("sft", data="demos"), stage(GRPO, data="prompts", max_steps=1, restart_optimizer=False)
    rounds = recipe(world, {"repeat": 2, "stages": [sft, grpo]})
    assert parse(Recipe, rounds) == parse(Recipe, recipe(world, sft, grpo, sft, grpo))
    nested = recipe(world, {"repeat": 2, "stages": [sft, {"repeat": 3, "stages": [grpo]}]})
    assert [s.method.name for s in parse(Recipe, nested).stages] == (["sft"] + ["grpo"] * 3) * 2
    result = crosstrain.train(rounds, tmp_path / "run")
    assert [(m, n) for m, n, _ in ended(result.folder)] == [("sft", 2), ("grpo", 1)] * 2


def test_one_step_of_each_in_turn_keeps_the_moments(world: Path, tmp_path: Path) -> None:
    once = crosstrain.train(recipe(world, stage("sft", data="demos", max_steps=4)), tmp_path / "once")
    kept = {"repeat": 4, "stages": [stage("sft", data="demos", max_steps=1, restart_optimizer=False)]}
    rounds = crosstrain.train(recipe(world, kept), tmp_path / "rounds")
    torch.testing.assert_close(weights(rounds.folder), weights(once.folder), rtol=0, atol=0)
    fresh = {"repeat": 4, "stages": [stage("sft", data="demos", max_steps=1)]}
    restarted = crosstrain.train(recipe(world, fresh), tmp_path / "restarted")
    assert not equal(weights(restarted.folder), weights(once.folder))


def test_a_share_of_the_budget_is_for_all_rounds() -> None:
    sft = {"method": "sft", "learning_rate": 1e-5, "budget_share": 0.25}
    grpo = {"method": "grpo", "learning_rate": 1e-6, "budget_share": 0.75}
    made = parse(Recipe, {"data": "a.jsonl", "budget": {"amount": 80}, "stages": [{"repeat": 4, "stages": [sft, grpo]}]})
    assert [s.budget_share for s in made.stages] == [0.0625, 0.1875] * 4


def test_rounds_end_with_the_budget(world: Path, tmp_path: Path) -> None:
    budget = {"unit": "processed_tokens", "amount": 1500}
    turn = {"repeat": "until_budget", "stages": [stage("sft", data="demos"), stage(GRPO, data="prompts", max_steps=1)]}
    wanted = recipe(world, stage("sft", data="demos"), turn, budget=budget)
    result = crosstrain.train(wanted, tmp_path / "run")
    spent = [line["cost/processed_tokens"] for line in lines(result.folder)]
    assert spent[-1] >= 1500 > spent[-2]
    stages = ended(result.folder)
    assert [m for m, _, _ in stages] == (["sft", "sft", "grpo"] + ["sft", "grpo"] * len(stages))[: len(stages)]
    assert len(stages) > 5, "more rounds than were written down"
    assert stages[-1][2] == "budget"
    assert {why for _, _, why in stages[:-1]} == {"max_steps"}
    assert [line["stage"] for line in lines(result.folder)] == sorted(line["stage"] for line in lines(result.folder))
    planned = run.plan(run.as_recipe(wanted))
    total = sum(s.cost.processed_tokens for s in planned.stages)
    assert math.isclose(total, 1500, rel_tol=0.05), "the plan has all rounds"
    assert abs(planned.predicted.steps - len(spent)) <= 3


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ([{"repeat": 0, "stages": [stage("sft")]}], {}, r"stages\.0\.repeat.*greater than or equal to 1"),
        ([{"repeat": 2, "stages": []}], {}, r"stages\.0\.stages.*at least 1 item"),
        (
            [{"repeat": 2, "stages": [stage("sft", lerning_rate=1.0)]}],
            {},
            r"'stages\.0\.stages\.0\.lerning_rate'; did you mean 'l",
        ),
        ([{"repeat": 2, "stages": [stage("sft")], "max_step": 3}], {}, r"'stages\.0\.max_step'; allowed: repeat, stages"),
        ([{"repeat": "until_budget", "stages": [stage("sft")]}], {}, "needs a budget of processed_tokens or flops.*no budget"),
        (
            [{"repeat": "until_budget", "stages": [stage("sft")]}],
            {"budget": {"unit": "demonstrations", "amount": 9}},
            "which every step spends; got budget.unit 'demonstrations'",
        ),
        (
            [{"repeat": "until_budget", "stages": [stage("sft")]}, stage("dpo")],
            {"budget": {"amount": 9}},
            "so no stage can come after it",
        ),
        (
            [{"repeat": "until_budget", "stages": [stage("sft", max_steps=None)]}],
            {"budget": {"amount": 9}},
            "every stage needs 'max_steps'",
        ),
        (
            [{"repeat": 2, "stages": [{"repeat": "until_budget", "stages": [stage("sft")]}]}],
            {"budget": {"amount": 9}},
            "cannot stand inside another",
        ),
    ],
)
def test_rounds_that_cannot_be_are_refused(world: Path, stages: list[Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Recipe, recipe(world, *stages, **more))


def study_of(*arms: Any) -> StudySpec:
    shared = {"model": "x", "data": "a.jsonl"}
    return parse(StudySpec, {"name": "s", "shared": shared, "arms": list(arms), "budget": {"amount": 100}})


def test_a_study_has_arms_of_rounds() -> None:
    turn = [{"method": m, "learning_rate": 1e-5, "budget_share": 0.5} for m in ("sft", "grpo")]
    study = study_of({"stages": [{"repeat": 3, "stages": turn}]})
    assert study.arms[0].name == "(sft -> grpo) x 3"
    check_can_be_equal(study)
    rated = with_rates(study.arms[0], [1e-5, 2.0, 1e-5, 3.0, 1e-5, 4.0])
    assert [s.learning_rate for s in rated.stages] == [1e-5, 4.0] * 3, "the rate searched for is that of all rounds"
    turn = [{"method": m, "learning_rate": 1e-5, "max_steps": 1} for m in ("sft", "grpo")]
    endless = study_of({"stages": [turn[0], {"repeat": "until_budget", "stages": turn}]})
    assert endless.arms[0].name == "sft -> (sft -> grpo) x *"
    check_can_be_equal(endless)


def test_the_plan_says_repeated_stages_once(world: Path) -> None:
    turn = {"repeat": 5, "stages": [stage("sft", data="demos"), stage(GRPO, data="prompts", max_steps=1)]}
    shown = str(run.plan(run.as_recipe(recipe(world, turn))))
    assert shown.count("-log pi per own_tokens") == 1
    assert "stages 0, 2, ..., 8, each of 5: sft, about 2 steps" in shown


def test_what_comes_again_is_said_once() -> None:
    assert in_turn([]) == ""
    assert in_turn(["a", "a"]) == "a -> a"
    assert in_turn(["a"] * 3) == "(a) x 3"
    assert in_turn(["a", "b"] * 50 + ["a"]) == "(a -> b) x 50 -> a"
    assert in_turn(["a", "b", "b", "b"] * 3) == "(a -> b -> b -> b) x 3"


def test_checkpoints_of_many_stages_are_ordered_as_numbers(tmp_path: Path) -> None:
    for number in (999, 1000):
        checkpoint.save(tmp_path, 5, checkpoint.Checkpoint({}, {}, {"stage": number}), stage=number, keep=2)
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert checkpoint.load(latest).state["stage"] == 1000


# --- rules -----------------------------------------------------------------------------------------------------------


def seen(rule: Callable[..., Watch], values: list[float], **settings: Any) -> list[int]:
    watch, counts = Watch(), []
    for value in values:
        watch = rule(watch, value, **settings)
        counts.append(watch.looks)
    return counts


def test_rules_by_hand() -> None:
    up = [0.1, 0.3, 0.29, 0.2, 0.3, 0.31, 0.1]
    assert seen(plateau, up, mode="max") == [0, 0, 1, 2, 3, 0, 1]
    assert seen(peak, up, mode="max", min_delta=0.05) == [0, 0, 0, 1, 0, 0, 1]
    assert seen(peak, up, mode="max") == [0, 0, 1, 2, 0, 0, 1]
    assert seen(threshold, up, mode="max", reached=0.3) == [0, 1, 0, 0, 1, 2, 0]
    down = [-x for x in up]
    assert seen(peak, down, mode="min", min_delta=0.05) == [0, 0, 0, 1, 0, 0, 1]
    assert seen(threshold, down, mode="min", reached=-0.3) == [0, 1, 0, 0, 1, 2, 0]
    for rule, more in ((plateau, {}), (peak, {}), (threshold, {"reached": 0.5})):
        assert rule(Watch(0.4, 3), math.nan, mode="max", **more) == Watch(0.4, 3), "what is unknown was not seen"
    assert look(Watch(), 1.0, rule="threshold", mode="max", min_delta=0.0, reached=1.0).looks == 1
    assert look(Watch(2.0, 0), 1.0, rule="peak", mode="max", min_delta=0.5, reached=None).looks == 1
    assert [stage_after(n, [True, True]) for n in range(4)] == [0, 1, 0, 1]


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float], name: str = "eval_ood_accuracy") -> None:
    """Development metrics that are what the test says, whatever the model is."""
    measured = run._Run._measure_dev

    def measure(self: Any) -> dict[str, float]:
        found = measured(self)
        return {**found, name: values[self.progress.step - 1]} if name in found else found

    monkeypatch.setattr(run._Run, "_measure_dev", measure)


def test_after_an_ood_peak_the_next_stage_starts_from_it(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.2, 0.6, 0.55, 0.3, 0.2, 0.1, 0.1, 0.1])
    until = {"rule": "peak", "metric": "eval_ood_accuracy", "mode": "max", "patience": 2, "min_delta": 0.1}
    save = {"save_steps": 1, "best_metric": "eval_ood_accuracy"}
    first = stage("sft", data="demos", max_steps=8, until=until)
    second = stage("dpo", data="pairs", max_steps=1, init_from="best")
    result = crosstrain.train(recipe(world, first, second, save=save, **LOOKS), tmp_path / "run")
    assert ended(result.folder) == [("sft", 5, "peak of eval_ood_accuracy"), ("dpo", 1, "max_steps")]
    short = recipe(world, stage("sft", data="demos", max_steps=2), stage("dpo", data="pairs", max_steps=1))
    straight = crosstrain.train(short, tmp_path / "straight")
    assert lines(result.folder)[-1]["loss"] == lines(straight.folder)[-1]["loss"], "the peak was at step 2"


def test_a_solve_rate_ends_a_stage(world: Path, tmp_path: Path) -> None:
    reached = {"rule": "threshold", "metric": "reward", "mode": "max", "patience": 3, "value": 0.0}
    result = crosstrain.train(recipe(world, stage(GRPO, data="prompts", max_steps=9, until=reached)), tmp_path / "run")
    assert ended(result.folder) == [("grpo", 3, "threshold of reward")]
    never = {**reached, "value": 1e9}
    result = crosstrain.train(recipe(world, stage(GRPO, data="prompts", max_steps=4, until=never)), tmp_path / "never")
    assert ended(result.folder) == [("grpo", 4, "max_steps")]


@pytest.mark.parametrize(
    ("until", "more", "message"),
    [
        (
            {"rule": "threshold", "metric": "loss", "mode": "min", "patience": 1},
            {},
            "'rule: threshold' and a 'value' go together",
        ),
        ({"metric": "loss", "mode": "min", "patience": 1, "value": 1.0}, {}, "'rule: threshold' and a 'value' go together"),
        (
            {"rule": "threshold", "metric": "loss", "mode": "min", "patience": 1, "value": 1.0, "min_delta": 0.1},
            {},
            "'min_delta' has no effect",
        ),
        (
            {"rule": "peak", "metric": "eval_ood_accuracy", "mode": "max", "patience": 1},
            {"evaluation": {**LOOKS["evaluation"], "dev_ood": None}},
            "needs 'evaluation.dev_ood'",
        ),
        (
            {"rule": "peak", "metric": "eval_accuracy", "mode": "max", "patience": 1},
            {"evaluation": {**LOOKS["evaluation"], "dev": None}},
            "needs 'evaluation.dev'",
        ),
        ({"rule": "pek", "metric": "loss", "mode": "min", "patience": 1}, {}, "must be 'plateau', 'peak' or 'threshold'"),
    ],
)
def test_rules_without_sense_are_refused(world: Path, until: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Recipe, recipe(world, stage("sft", data="demos", until=until), **more))


def test_shifted_questions_that_are_never_looked_at_are_refused(world: Path) -> None:
    never = {**LOOKS["evaluation"], "eval_steps": 0}
    with pytest.raises(UserError, match="'dev_ood' has no effect: 'eval_steps' is 0"):
        parse(Recipe, recipe(world, stage("sft"), evaluation=never))


# --- kills -----------------------------------------------------------------------------------------------------------

PEAK = {"rule": "peak", "metric": "eval_ood_accuracy", "mode": "max", "patience": 2, "min_delta": 0.1}
PIPELINES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "streams": (
        [stage("sft", data="demos"), stage("dpo", data="pairs"), stage(GRPO, data="prompts"), stage("sft", data="demos")],
        {},
    ),
    "rounds": (
        [
            {
                "repeat": 3,
                "stages": [stage("sft", data="demos"), stage(GRPO, data="prompts", max_steps=1, restart_optimizer=False)],
            }
        ],
        {},
    ),
    "until the budget": (
        [
            {
                "repeat": "until_budget",
                "stages": [
                    stage({"iw_sft": {}}, data="demos", restart_optimizer=False),
                    stage(GRPO, data="prompts", max_steps=1, restart_optimizer=False),
                ],
            }
        ],
        {"budget": {"unit": "processed_tokens", "amount": 1200}},
    ),
    "peak": (
        [stage("sft", data="demos", max_steps=6, until=PEAK), stage(GRPO, data="prompts", max_steps=3, init_from="best")],
        {**LOOKS, "save": {"save_steps": 1, "best_metric": "eval_ood_accuracy"}},
    ),
    "threshold": (
        [
            stage(
                GRPO,
                data="prompts",
                max_steps=6,
                until={"rule": "threshold", "metric": "reward", "mode": "max", "patience": 3, "value": 0.0},
            ),
            stage("sft", data="demos"),
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_killed_after_any_step_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed at every other save, before it and after it in turn."""
    stages, more = PIPELINES[name]
    if name == "peak":
        scripted(monkeypatch, [0.2, 0.6, 0.55, 0.3, 0.2, 0.1, 0.1, 0.1])
    whole = crosstrain.train(recipe(world, *stages, **more), tmp_path / "whole").folder
    saved, saves = run._Run._save, iter(range(1000))

    def killed(self: Any) -> None:
        n = next(saves)
        if n % 4 == 1:
            raise KeyboardInterrupt
        saved(self)
        if n % 4 == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run._Run, "_save", killed)
    for _ in range(40):
        try:
            again = crosstrain.train(recipe(world, *stages, **more), tmp_path / "killed").folder
            break
        except KeyboardInterrupt:
            pass
    assert next(saves) > 6, "it was killed more than twice"
    assert lines(again) == lines(whole)
    assert ended(again) == ended(whole)
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
