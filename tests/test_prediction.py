"""Predictions: how many steps a budget makes, what is measured once, and that a run is the same with one as without."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import crosstrain
from crosstrain import prediction, run
from crosstrain.config import Recipe, parse
from crosstrain.errors import UserError
from crosstrain.prediction import Prediction, expected_steps
from crosstrain.testing import save_tiny_model
from crosstrain.training import first_step
from crosstrain.training.cost import Cost
from crosstrain.training.record import read_lines

LUFFY = {"luffy": {"num_generations": 3}}


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests measured in this process is not there."""
    monkeypatch.setattr(prediction, "_MEASURED", {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(world: Path, *methods: Any, stage: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    stage = {"max_steps": 2, "batch_size": 3, "learning_rate": 1e-2, **(stage or {})}
    return {
        "model": {"name": str(world / "model"), "lora": {"r": 2, "dropout": 0.5}},  # dropout draws random numbers
        "data": str(world / "rows.jsonl"),
        "rewards": [f"{world}/reward.py:length"],
        "sampling": {"max_completion_length": 5},
        "evaluation": {"forgetting": False, "divergence": False},
        "device": "cpu",
        "precision": "fp32",
        "stages": [{**stage, "method": method} for method in methods],
        **more,
    }


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def untimed(folder: Path) -> list[dict[str, Any]]:
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "time" not in k and k != "cost/seconds"} for line in lines]


def test_a_run_is_bit_for_bit_the_same_without_its_prediction(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(world, "sft", LUFFY)
    predicted = crosstrain.train(wanted, tmp_path / "predicted").folder
    assert len(prediction._MEASURED) == 2, "both stages were measured"
    monkeypatch.setattr(run._Run, "_predict", lambda self, engine: None)
    plain = crosstrain.train(wanted, tmp_path / "plain").folder
    assert untimed(predicted) == untimed(plain)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (predicted, plain))
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_the_record_has_the_prediction_beside_the_fact(world: Path, tmp_path: Path) -> None:
    found = record(crosstrain.train(recipe(world, "sft", model=str(world / "model")), tmp_path / "sft").folder)
    predicted, measured = found["predicted"], found["measured"]
    assert predicted.keys() == measured.keys() == {"seconds", "peak_memory_gb", "flops", "steps"}
    assert (predicted["flops"], predicted["steps"]) == (measured["flops"], measured["steps"]), "the batches are all of the rows"
    assert measured["seconds"] == found["cost"]["seconds"] and predicted["seconds"] > 0
    assert 0.5 < predicted["peak_memory_gb"] / measured["peak_memory_gb"] < 2
    assert measured["peak_memory_gb"] <= found["peak_memory_gb"]
    assert 0 < found["utilisation"] < 1, "tiny layers are nothing but overhead"
    assert found["sampling"] is None
    adapters = record(crosstrain.train(recipe(world, "sft"), tmp_path / "adapters").folder)
    assert adapters["utilisation"] is None, "most gradients of weights are not computed"


def test_the_record_says_how_far_the_sampler_was_off(world: Path, tmp_path: Path) -> None:
    folder = crosstrain.train(recipe(world, LUFFY, logging_steps=1), tmp_path / "run").folder
    lines = read_lines(folder / "metrics.jsonl")
    means, largest = ([line[f"sampling/sampling_logp_difference/{name}"] for line in lines] for name in ("mean", "max"))
    expected = {"dtype": "float32", "logp_diff_mean": sum(means) / len(means), "logp_diff_max": max(largest)}
    assert record(folder)["sampling"] == pytest.approx(expected)


def test_a_resumed_run_adds_up_what_one_without_interruption_does(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over steps of which no line was written, and it keeps the prediction that it began with."""
    wanted = recipe(world, LUFFY, stage={"max_steps": 3}, logging_steps=5, save={"save_steps": 1})
    whole = record(crosstrain.train(wanted, tmp_path / "whole").folder)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run._Run, "_keep_best", _stop_at_3)
        crosstrain.train(wanted, tmp_path / "run")
    before = record(tmp_path / "run")["predicted"]
    monkeypatch.setattr(prediction, "measure_first_step", _stop)
    resumed = record(crosstrain.train(wanted, tmp_path / "run").folder)
    assert resumed["sampling"] == whole["sampling"]
    assert resumed["predicted"] == before
    assert {k: resumed["measured"][k] for k in ("flops", "steps")} == {k: whole["measured"][k] for k in ("flops", "steps")}


def _stop_at_3(run: Any, line: dict[str, Any]) -> None:
    if line["step"] == 3:
        raise KeyboardInterrupt


def _stop(*arguments: Any) -> None:
    raise AssertionError("measured once more")


def test_seeds_budgets_and_rates_share_one_measurement(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(settings: dict[str, Any]) -> Any:
        return run.plan(parse(Recipe, settings))

    first = planned(recipe(world, "sft", LUFFY))
    with monkeypatch.context() as patched:
        patched.setattr(prediction, "measure_first_step", _stop)
        again = planned(recipe(world, LUFFY, stage={"learning_rate": 1e-3, "max_steps": 2}, seed=3, save={"save_steps": 7}))
        assert again.stages[0].cost == first.stages[1].cost
        for other in ({"sampling": {"max_completion_length": 6}}, {"micro_batch_tokens": 64}, {"precision": "bf16"}):
            with pytest.raises(AssertionError, match="measured once more"):
                planned(recipe(world, LUFFY, **other))
    assert planned(recipe(world, LUFFY, sampling={"max_completion_length": 6})).stages[0].cost != first.stages[1].cost


@pytest.mark.parametrize(
    ("unit", "amount", "max_steps", "steps"),
    [("flops", 100.0, None, 10), ("flops", 101.0, None, 11), ("flops", 100.0, 3, 3), ("generated_tokens", 9.0, 4, 4)],
)
def test_a_stage_ends_with_the_step_that_uses_up_its_budget(
    world: Path, unit: str, amount: float, max_steps: int | None, steps: int
) -> None:
    """A step of 10 FLOPs that generates nothing."""
    parsed = parse(Recipe, recipe(world, "sft", stage={"max_steps": max_steps}, budget={"unit": unit, "amount": amount}))
    assert expected_steps(parsed, parsed.stages[0], Cost(flops=10.0), Cost()) == steps


def test_a_gate_that_used_no_demonstration_at_first_is_planned_as_if_it_would(world: Path) -> None:
    hpt = {"hpt": {"num_generations": 2, "solved_above": -1.0}}
    budget = {"unit": "demonstrations", "amount": 12}
    (stage,) = run.plan(parse(Recipe, recipe(world, hpt, stage={"max_steps": None}, budget=budget))).stages
    assert (stage.steps, stage.cost.demonstrations) == (4, 12)


def test_a_loss_that_is_no_number_is_told_by_the_plan(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = first_step.backward

    def broken(engine: Any, method: Any, batch: Any, counts: Any, meter: Any) -> None:
        score(engine, method, batch, {name: float("nan") for name in counts}, meter)

    monkeypatch.setattr(first_step, "backward", broken)
    with pytest.raises(UserError, match=r"the first step cannot be trained: loss/.* is nan; examples: .*; look at these rows"):
        run.plan(parse(Recipe, recipe(world, "sft")))


def test_stages_add_up_and_the_highest_memory_counts() -> None:
    stages = [
        prediction.StagePlan("sft", 2, Cost(flops=5.0, seconds=60.0), 1.5, ()),
        prediction.StagePlan("grpo", 3, Cost(flops=7.0, seconds=120.0), 2.0, ()),
    ]
    found = prediction.predict(stages, Cost())
    assert asdict(found) == {"seconds": 180.0, "peak_memory_gb": 2.0, "flops": 12.0, "steps": 5}
    assert str(found) == "5 steps, 12 FLOPs, about 3 min, peak memory 2.0 GB"
    assert str(Prediction(1.0, 0.5, 4.9e12, 1)) == "1 step, 4.9e+12 FLOPs, under a minute, peak memory 0.5 GB"
