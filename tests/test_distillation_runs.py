"""Whole runs that distil: from a recipe to weights, what they cost, what stops them, and what a kill changes: nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import crosstrain
from crosstrain import run
from crosstrain.cli import app
from crosstrain.errors import UserError
from crosstrain.testing import save_tiny_model, tiny_model, tiny_tokenizer
from crosstrain.training import checkpoint
from crosstrain.training.record import read_lines
from tensors import equal

TIMINGS = {"step_time", "cost/seconds", *(f"time/{part}" for part in ("sampling", "reward", "batch", "backward", "optimizer"))}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "teacher", seed=5)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "completion": [{"role": "assistant", "content": f"it is {i}"}],
        }
        for i in range(7)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in rows))
    return folder


def recipe(world: Path, *methods: Any, **more: Any) -> dict[str, Any]:
    return {
        "model": str(world / "model"),
        "teacher": str(world / "teacher"),
        "data": str(world / "rows.jsonl"),
        "sampling": {"max_completion_length": 5},
        "evaluation": {"forgetting": False, "divergence": False},
        "stages": [{"method": m, "max_steps": 3, "batch_size": 3, "learning_rate": 1e-2} for m in methods],
        "save": {"save_steps": 1},
        "device": "cpu",
        "precision": "fp32",
        **more,
    }


SDFT = {"sdft": {"num_generations": 2, "num_iterations": 2, "teacher_model_kind": "base"}}
AVERAGED = {"sdft": {"num_generations": 2, "minibatches": 2, "teacher_update_rate": 0.3}}
LIVE = {"sdft": {"num_generations": 2, "teacher_model_kind": "live", "distillation_mode": "topk_logits"}}
METHODS: dict[str, list[Any]] = {
    "gkd": ["gkd"],
    "gkd with the teacher's answers": [{"gkd": {"seq_kd": True, "lmbda": 0.3}}],
    "on-policy distillation": [{"on_policy_distillation": {"num_generations": 2, "minibatches": 2}}],
    "asft, then sdft": ["asft", SDFT],
    "sdft of itself": [LIVE],
    "sdft of an average, then asft": [AVERAGED, "asft"],
}


class Killed(Exception):
    """What stops a run in these tests."""


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe(world, *METHODS[name])
    teacher = any("asft" not in str(m) and "sdft" not in str(m) for m in METHODS[name])
    content = content if teacher else {k: v for k, v in content.items() if k != "teacher"}
    whole = crosstrain.train(content, tmp_path / "whole")
    saved, last = checkpoint.save, len(METHODS[name]) * 3 - 2

    def stops(folder: Path, step: int, *more: Any, **settings: Any) -> Path:
        place = saved(folder, step, *more, **settings)
        if step == last:
            raise Killed
        return place

    monkeypatch.setattr(checkpoint, "save", stops)
    with pytest.raises(Killed):
        crosstrain.train(content, tmp_path / "killed")
    monkeypatch.setattr(checkpoint, "save", saved)
    again = crosstrain.train(content, tmp_path / "killed")
    one, other = (
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_lines(r.folder / "metrics.jsonl")]
        for r in (whole, again)
    )
    assert one == other and len(one) == 3 * len(METHODS[name])
    assert "reward" not in one[-1], "nothing was scored"
    weights = [load_file(r.folder / "model" / "model.safetensors") for r in (whole, again)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    start = load_file(world / "model" / "model.safetensors")
    assert any(not torch.equal(weights[0][k], start[k]) for k in start), "the run trained nothing"
    record = json.loads((whole.folder / "record.json").read_text())
    assert record["teacher"] == (str(world / "teacher") if teacher else None) and not record["warnings"]
    assert record["predicted"]["steps"] == 3 * len(METHODS[name])


@pytest.mark.parametrize(("whose", "method"), [("teacher", "gkd"), ("model", "asft")])
def test_a_run_whose_teacher_or_reference_changed_under_its_name_does_not_go_on(
    world: Path, tmp_path: Path, whose: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / whose
    shutil.copytree(world / whose, mine)
    content = recipe(world, method, **{whose: str(mine)})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(run._Run, "_keep_best", _killed_at_2)
        crosstrain.train(content, tmp_path / "run")
    save_tiny_model(mine, seed=6)
    with pytest.raises(UserError, match=f"the weights of the {whose}, {mine}, have changed since this run began"):
        crosstrain.train(content, tmp_path / "run")
    shutil.rmtree(mine)
    shutil.copytree(world / whose, mine)
    crosstrain.train(content, tmp_path / "run")
    crosstrain.train(content, tmp_path / "anew")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "anew"))
    assert equal(one, other)


def _killed_at_2(self: Any, line: dict[str, Any]) -> None:
    if line["step"] == 2:
        raise Killed


@pytest.mark.parametrize("method", [SDFT, LIVE, AVERAGED, "asft", "gkd"], ids=str)
def test_adapters_are_distilled_too(world: Path, tmp_path: Path, method: Any) -> None:
    model = {"name": str(world / "model"), "lora": {"r": 2}}
    result = crosstrain.train(recipe(world, method, model=model), tmp_path / "run")
    assert result.metrics["grad_norm"] > 0


@pytest.mark.parametrize("method", [AVERAGED, "gkd"], ids=str)
def test_mixed_precision_and_recomputed_activations(world: Path, tmp_path: Path, method: Any) -> None:
    """Recomputing activations changes nothing but rounding, and bf16 little."""
    plain = crosstrain.train(recipe(world, method), tmp_path / "plain").metrics
    again = crosstrain.train(recipe(world, method, gradient_checkpointing=True), tmp_path / "recomputed").metrics
    mixed = crosstrain.train(recipe(world, method, precision="mixed"), tmp_path / "mixed").metrics
    assert again["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    assert 0 < mixed["grad_norm"] < 10 * plain["grad_norm"]


def weights_after(world: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    content = recipe(world, {"sdft": {"num_generations": 2, **settings}})
    del content["teacher"]
    return load_file(crosstrain.train(content, folder).folder / "model" / "model.safetensors")


def test_an_average_that_follows_at_once_is_the_policy_and_one_that_never_does_its_start(world: Path, tmp_path: Path) -> None:
    found = {
        "live": weights_after(world, tmp_path / "live", teacher_model_kind="live"),
        "at once": weights_after(world, tmp_path / "at-once", teacher_update_rate=1.0),
        "base": weights_after(world, tmp_path / "base", teacher_model_kind="base"),
        "never": weights_after(world, tmp_path / "never", teacher_update_rate=1e-30),
        "between": weights_after(world, tmp_path / "between", teacher_update_rate=0.5),
    }

    def same(one: str, other: str) -> bool:
        return equal(found[one], found[other])

    assert same("live", "at once") and same("base", "never")
    assert not same("live", "base") and not same("between", "live") and not same("between", "base")


def test_what_a_run_costs(world: Path, tmp_path: Path) -> None:
    """Every token once to sample, once through the model's forward and backward, once through the teacher's forward; and FLOPs
    by the parameters of each."""
    content = recipe(world, {"gkd": {"lmbda": 1.0}})
    content["stages"][0]["max_steps"] = 1
    result = crosstrain.train(content, tmp_path / "run")
    n = sum(p.numel() for p in tiny_model(dtype=torch.float32, vocab_size=len(tiny_tokenizer())).parameters())
    tokens = result.cost.processed_tokens
    assert tokens % 3 == 0 and result.cost.flops == 10 * n * tokens / 3
    told = recipe(world, {"on_policy_distillation": {"num_generations": 2}})
    told["stages"][0]["max_steps"] = 1
    plan = run.plan(run.as_recipe(told))
    found = crosstrain.train(told, tmp_path / "other")
    assert plan.stages[0].cost.processed_tokens == found.cost.processed_tokens
    assert plan.stages[0].cost.flops == pytest.approx(found.cost.flops)


def test_a_demonstration_that_is_shown_is_used(world: Path, tmp_path: Path) -> None:
    content = recipe(world, LIVE, budget={"unit": "demonstrations", "amount": 6})
    del content["stages"][0]["max_steps"], content["teacher"]
    result = crosstrain.train(content, tmp_path / "run")
    assert result.cost.demonstrations == 6 and len(read_lines(result.folder / "metrics.jsonl")) == 2


def test_a_reward_is_recorded_where_there_is_one(world: Path, tmp_path: Path) -> None:
    """Of every prompt four answers, which a function is given together."""
    (tmp_path / "reward.py").write_text(
        "def many(completions, **kwargs):\n    return [float(len(completions))] * len(completions)\n"
    )
    content = recipe(world, "on_policy_distillation", rewards=[f"{tmp_path}/reward.py:many"])
    assert crosstrain.train(content, tmp_path / "run").metrics["reward"] == 4.0


def test_a_dry_run_says_what_it_will_do(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(world, "gkd", "sft")))
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "stage 0: gkd, about 3 steps" in done.output and "D_beta(teacher, pi) over the vocabulary" in done.output


def test_a_teacher_nobody_learns_from_is_said_to_be_unused_and_not_loaded(world: Path) -> None:
    content = recipe(world, "sft", teacher="no/such-model")
    assert "teacher: no stage learns from it" in run.plan(run.as_recipe(content)).warnings


def test_what_is_wrong_with_a_teacher_is_said_before_step_1(world: Path, tmp_path: Path) -> None:
    def refused(content: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            run.plan(run.as_recipe(content))

    content = recipe(world, "gkd")
    refused({k: v for k, v in content.items() if k != "teacher"}, "method gkd learns from a teacher, and the recipe names none")
    refused({**content, "teacher": {"name": str(world / "teacher"), "lora": {"r": 2}}}, "'teacher.lora' has no effect")
    refused({**content, "teacher": {"name": str(world / "teacher"), "lr": 2}}, "teacher.lr")
    refused({**content, "teacher": str(tmp_path / "absent")}, "no such folder")
    tokenizer = tiny_tokenizer()
    model = tiny_model(5, torch.float32, vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<more>"])
    model.save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    refused(
        {**content, "teacher": str(tmp_path / "more")},
        r"1 tokens differ, e.g. token '<more>' is absent in .*/model', .* 259 in",
    )
    tiny_model(5, torch.float32, vocab_size=300).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    refused({**content, "teacher": str(tmp_path / "wide")}, r"gives 300 logits and .*/model' 259")


def test_a_whole_distribution_cannot_be_computed_beforehand(world: Path, tmp_path: Path) -> None:
    content = recipe(world, "asft")
    content["stages"][0]["precompute_ref_log_probs"] = True
    with pytest.raises(UserError, match="asft compares with the reference's whole distribution; leave it out"):
        crosstrain.train(content, tmp_path / "run")


def test_rows_without_a_demonstration_cannot_be_shown(world: Path, tmp_path: Path) -> None:
    content = recipe(world, SDFT, data=str(world / "prompts.jsonl"))
    with pytest.raises(UserError, match="method sdft needs a demonstration"):
        crosstrain.train(content, tmp_path / "run")


def test_a_penalty_that_nobody_learns_from_is_said_to_be_unused(world: Path) -> None:
    sampling = {"max_completion_length": 5, "truncated": "penalise", "truncation_penalty": 0.5}
    warnings = run.plan(run.as_recipe(recipe(world, "gkd", sampling=sampling))).warnings
    assert any("sampling.truncated: no stage learns from rewards" in text for text in warnings)
