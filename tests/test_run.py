"""Whole runs on a tiny model: what they leave, how stages follow each other, and what stops them before step 1."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

import crosstrain
from crosstrain import run
from crosstrain.errors import UserError
from crosstrain.models import load_model
from crosstrain.rewards.load import find_function
from crosstrain.rollout import torch_sampler
from crosstrain.testing import save_tiny_model
from crosstrain.training import checkpoint
from crosstrain.training.record import read_lines

OFF = {"forgetting": False, "divergence": False}
GRPO = {"grpo": {"num_generations": 3}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}", "answer": str(i)} for i in range(6)]
    pairs = [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(6)]
    for name, content in (("rows", rows), ("pairs", pairs), ("prompts", [{"prompt": r["prompt"]} for r in rows])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    return folder


DEVICE = os.environ.get("CROSSTRAIN_TEST_DEVICE", "cpu")
"""Where these runs compute: `CROSSTRAIN_TEST_DEVICE=cuda` on a machine that has a card."""

ABSENT = "mps" if torch.cuda.is_available() else "cuda"


def recipe(world: Path, *stages: Any, **more: Any) -> dict[str, Any]:
    """A recipe in which a stage is a method, or a method with settings of the stage."""
    full = [
        {
            "max_steps": 2,
            "batch_size": 3,
            "learning_rate": 1e-2,
            **(s if isinstance(s, dict) and "method" in s else {"method": s}),
        }
        for s in stages
    ]
    return {
        "model": str(world / "model"),
        "data": str(world / "rows.jsonl"),
        "rewards": [f"{world}/reward.py:length"],
        "sampling": {"max_completion_length": 5},
        "evaluation": OFF,
        "stages": full,
        "device": DEVICE,
        "precision": "fp32",
        **more,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(str(folder))[0].named_parameters())


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def test_a_run_leaves_a_model_its_metrics_and_its_record(world: Path, tmp_path: Path) -> None:
    result = crosstrain.train(recipe(world, "sft"), tmp_path / "run")
    assert sorted(p.name for p in result.folder.iterdir()) == ["metrics.jsonl", "model", "recipe.json", "record.json"]
    model, tokenizer = load_model(str(tmp_path / "run" / "model"))
    assert tokenizer.chat_template
    assert not torch.equal(model.model.norm.weight, weights(world / "model")["model.norm.weight"])
    assert [line["step"] for line in lines(result.folder)] == [1, 2]
    assert {"loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "epoch", "step_time"} <= set(result.metrics)
    found = record(result.folder)
    assert (found["status"], found["steps"], found["precision"], found["sampler"]) == ("finished", 2, "fp32", None)
    assert {"recipe_hash", "template_hash", "versions", "hardware", "data"} <= set(found)
    card = (result.folder / "model" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert found["data"]["train"]["hash"] in card
    assert "learning_rate: 0.01" in card


def test_a_finished_run_is_returned_and_another_recipe_refused(world: Path, tmp_path: Path) -> None:
    first = crosstrain.train(recipe(world, "sft"), tmp_path / "run")
    before = (first.folder / "record.json").read_bytes()
    assert crosstrain.train(recipe(world, "sft"), tmp_path / "run") == first
    assert (first.folder / "record.json").read_bytes() == before
    with pytest.raises(UserError, match=r"holds a run of another recipe: .*method.*sft.*dft.*; set it back .* another --out"):
        crosstrain.train(recipe(world, "dft"), tmp_path / "run")
    (tmp_path / "file").write_text("")
    for where, why in (("file", "is a file"), ("file/inside", "cannot be made")):
        with pytest.raises(UserError, match=f"{why}.*; choose another --out"):
            crosstrain.train(recipe(world, "sft"), tmp_path / where)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no run of crosstrain"):
        crosstrain.train(recipe(world, "sft"), tmp_path / "mine")
    with pytest.raises(UserError, match="a run needs a folder"):
        crosstrain.train(recipe(world, "sft"))


@pytest.mark.parametrize("changed", ["reward.py", "method.py"])
def test_a_run_whose_reward_or_method_file_changed_does_not_go_on(
    world: Path, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(world / "reward.py", tmp_path / "reward.py")
    (tmp_path / "method.py").write_text(
        "from crosstrain.methods import load_method\n\ndef mine(n: int = 2):\n    return load_method('grpo', num_generations=n)\n"
    )
    made = recipe(world, f"{tmp_path}/method.py:mine", rewards=[f"{tmp_path}/reward.py:length"], save={"save_steps": 1})

    def stopping(self: Any, line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run._Run, "_keep_best", stopping)
        crosstrain.train(made, tmp_path / "run")
    file = tmp_path / changed
    before = file.read_text()
    file.write_text(f"{before}\n# better\n")
    with pytest.raises(UserError, match=rf"{file} has changed since this run began .* put it back, or start anew"):
        crosstrain.train(made, tmp_path / "run")
    file.write_text(before)
    kept = (tmp_path / "run" / "record.json").read_text()
    earlier = json.loads(kept)
    earlier["methods"][0]["settings"]["num_generations"] = 4  # as if another version had another default
    (tmp_path / "run" / "record.json").write_text(json.dumps(earlier))
    with pytest.raises(UserError, match=r"stage 0: num_generations of its method has changed .*\(then 4, now 2\)"):
        crosstrain.train(made, tmp_path / "run")
    (tmp_path / "run" / "record.json").write_text(kept)
    assert crosstrain.train(made, tmp_path / "run").metrics["step"] == 2
    assert record(tmp_path / "run")["code"].keys() == {str(tmp_path / "reward.py"), str(tmp_path / "method.py")}


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_dpo_compares_with_the_model_it_started_from(world: Path, tmp_path: Path, lora: Any) -> None:
    data, model = str(world / "pairs.jsonl"), {"name": str(world / "model"), "lora": lora}
    result = crosstrain.train(recipe(world, "dpo", data=data, model=model, rewards=None), tmp_path / "run")
    first, second = lines(result.folder)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert second["loss"] < first["loss"]
    names = weights(result.folder / "model").keys()
    assert names == weights(world / "model").keys(), "adapters must be merged"
    assert (result.folder / "model" / "adapter").is_dir() == (lora is not None)


@pytest.mark.parametrize(("stages", "lora"), [(1, None), (2, None), (1, {"r": 2}), (2, {"r": 2})])
def test_a_reference_that_is_computed_beforehand_gives_the_same_run(
    world: Path, tmp_path: Path, stages: int, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base, and of where a second stage starts."""
    monkeypatch.setenv("CROSSTRAIN_CACHE", str(tmp_path / "cache"))
    more = {"data": str(world / "pairs.jsonl"), "model": {"name": str(world / "model"), "lora": lora}, "rewards": None}
    asked, plain = (
        lines(crosstrain.train(recipe(world, *[stage] * stages, **more), tmp_path / f"{flag}").folder)
        for flag in (True, False)
        for stage in [{"method": "dpo", "precompute_ref_log_probs": flag}]
    )
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == stages
    for one, other in zip(asked, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=1e-5)
        assert one["cost/flops"] == other["cost/flops"]
    assert asked[1]["rewards/margins"] != 0


@pytest.mark.parametrize(("method", "why"), [("sft", "compares with no reference"), (GRPO, "do not exist yet")])
def test_a_reference_that_cannot_be_computed_beforehand_is_refused(world: Path, tmp_path: Path, method: Any, why: str) -> None:
    with pytest.raises(UserError, match=f"stage 0: precompute_ref_log_probs is true, but .*{why}"):
        crosstrain.train(recipe(world, {"method": method, "precompute_ref_log_probs": True}), tmp_path / "run")


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_the_second_stages_reference_is_where_it_started(world: Path, tmp_path: Path, lora: Any) -> None:
    model = {"name": str(world / "model"), "lora": lora}
    crosstrain.train(recipe(world, {"method": "sft", "learning_rate": 1e-3}, GRPO, model=model), tmp_path / "run")
    # at the first step of GRPO the policy is its reference; from the base it is two steps away
    assert lines(tmp_path / "run")[2]["kl"] == pytest.approx(0, abs=1e-9)
    assert lines(tmp_path / "run")[3]["kl"] > 0


def test_stages_start_from_the_base_or_go_on(world: Path, tmp_path: Path) -> None:
    once = crosstrain.train(recipe(world, {"method": "sft", "max_steps": 4}), tmp_path / "once")
    twice = crosstrain.train(recipe(world, "sft", {"method": "sft", "restart_optimizer": False}), tmp_path / "twice")
    for name, weight in weights(once.folder / "model").items():
        assert torch.equal(weight, weights(twice.folder / "model")[name]), f"{name}: two stages are not one that went on"
    fresh = crosstrain.train(recipe(world, "sft", {"method": "sft", "init_from": "base"}), tmp_path / "fresh")
    restarted = crosstrain.train(recipe(world, "sft", "sft"), tmp_path / "restarted")
    ends = [lines(r.folder)[3]["loss"] for r in (twice, fresh, restarted)]
    assert len(set(ends)) == 3, ends


SETS = {"dev": {"name": "dev", "task": "sums", "split": "dev", "size": 4}, "eval_steps": 1, **OFF}


def test_a_plateau_ends_a_stage(world: Path, tmp_path: Path) -> None:
    until = {"metric": "eval_accuracy", "mode": "max", "patience": 2}
    stages = [{"method": "sft", "max_steps": 9, "until": until}, "dft"]
    result = crosstrain.train(recipe(world, *stages, evaluation=SETS, max_length=400, max_prompt_length=200), tmp_path / "run")
    ended = record(result.folder)["stages"]
    assert [(s["method"], s["steps"], s["ended_by"]) for s in ended] == [
        ("sft", 3, "plateau of eval_accuracy"),  # 0 at first, and twice no better
        ("dft", 2, "max_steps"),
    ]


def test_what_is_measured_between_logged_steps_is_written_too(world: Path, tmp_path: Path) -> None:
    more = {"evaluation": {**SETS, "eval_steps": 3}, "logging_steps": 2, "max_length": 400, "max_prompt_length": 200}
    result = crosstrain.train(recipe(world, {"method": "sft", "max_steps": 5}, **more), tmp_path / "run")
    assert [(line["step"], "eval_accuracy" in line) for line in lines(result.folder)] == [(2, False), (3, True), (4, False)]


def test_the_best_weights_are_kept_and_put_back(world: Path, tmp_path: Path) -> None:
    def trained(name: str, steps: int, **more: Any) -> run.RunResult:
        stage = {"method": "sft", "max_steps": steps}
        more = {"evaluation": SETS, "max_length": 400, "max_prompt_length": 200, **more}
        return crosstrain.train(recipe(world, stage, **more), tmp_path / name)

    best = trained("best", 4, save={"best_metric": "eval_response_length", "best_mode": "min"})
    lengths = [line["eval_response_length"] for line in lines(best.folder)]
    at = record(best.folder)["best"]
    assert (at["value"], at["step"]) == (min(lengths), lengths.index(min(lengths)) + 1)
    short = trained("short", at["step"])
    for name, weight in weights(best.folder / "model").items():
        assert torch.equal(weight, weights(short.folder / "model")[name])
    with pytest.raises(UserError, match=r"save\.best_metric: got 'eval_acuracy'; measured are eval_accuracy"):
        trained("wrong", 2, save={"best_metric": "eval_acuracy"})


def test_the_evaluation_compares_with_the_base(world: Path, tmp_path: Path) -> None:
    sets = {"in_distribution": [{"name": "sums", "task": "sums", "size": 4}], "pass_at_k": [1, 2], "samples_per_question": 4}
    limits = {"max_length": 400, "max_prompt_length": 200}
    result = crosstrain.train(recipe(world, "sft", evaluation={**sets, "forgetting": False}, **limits), tmp_path / "run")
    assert result.evaluation is not None
    metrics = result.evaluation["metrics"]
    assert metrics["forward_kl"] > 0
    assert metrics["reverse_kl"] > 0
    assert len(read_lines(result.folder / "samples.jsonl")) == 16
    base = json.loads((result.folder / "base" / "evaluation.json").read_text())["metrics"]
    assert base["forward_kl"] == base["reverse_kl"] == 0
    assert "| sums | sums (version 1) |" in (result.folder / "model" / "README.md").read_text()


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_precision_policies(world: Path, tmp_path: Path, precision: str) -> None:
    result = crosstrain.train(recipe(world, GRPO, precision=precision), tmp_path / "run")
    assert record(result.folder)["precision"] == precision
    assert {w.dtype for w in weights(result.folder / "model").values()} == {torch.float32}  # loaded so; stored in bf16
    moved = weights(result.folder / "model")["model.norm.weight"] - weights(world / "model")["model.norm.weight"]
    assert float(moved.abs().max()) > 1e-3


def test_budgets_end_stages(world: Path, tmp_path: Path) -> None:
    stages = [{"method": m, "max_steps": None, "budget_share": share} for m, share in (("sft", 0.25), (GRPO, 0.75))]
    budget = {"unit": "processed_tokens", "amount": 2000}
    result = crosstrain.train(recipe(world, *stages, budget=budget), tmp_path / "run")
    spent = [line["cost/processed_tokens"] for line in lines(result.folder)]
    steps = [s["steps"] for s in record(result.folder)["stages"]]
    assert spent[steps[0] - 1] >= 500 > spent[steps[0] - 2]
    assert spent[-1] - spent[steps[0] - 1] >= 1500 > spent[-2] - spent[steps[0] - 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": "prompts.jsonl"},
            r"method luffy needs a demonstration \(`completion`\), which 6 of 6 rows of 'train' lack: .*:1",
        ),
        ({"rewards": None}, "method luffy samples completions, and nothing scores them"),
        ({"rewards": ["reward.py:size"]}, "has no function 'size'"),
        ({"max_prompt_length": 2}, r"rows\.jsonl:1: the prompt has 5 tokens, more than max_prompt_length 2"),
        ({"max_prompt_length": 5, "max_length": 6}, None),
        ({"model": "nowhere"}, "model 'nowhere': no such folder"),
        ({"device": ABSENT}, f"device: got '{ABSENT}', which this machine does not have"),
    ],
)
def test_mistakes_end_before_step_1(world: Path, tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    at_home = {"prompts.jsonl": str(world / "prompts.jsonl")}
    change = {k: at_home.get(v, v) if isinstance(v, str) else v for k, v in change.items()}
    if change.get("rewards"):
        change["rewards"] = [f"{world}/{name}" for name in change["rewards"]]
    wrong = recipe(world, {"method": "luffy", "max_steps": 1}, **change)
    if message is None:  # cut, with a warning in the record
        warnings = record(crosstrain.train(wrong, tmp_path / "run").folder)["warnings"]
        assert any("6 of 6 answers are cut at max_length" in w for w in warnings)
        return
    with pytest.raises(UserError, match=message):
        crosstrain.train(wrong, tmp_path / "run")
    assert lines(tmp_path / "run") == []


def test_a_gated_method_that_has_no_more_use_for_demonstrations_does_not_train_for_ever(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "IDLE_STEPS", 3)
    solved = {"hpt": {"num_generations": 2, "solved_above": -1.0}}
    budget = {"unit": "demonstrations", "amount": 5}
    endless = crosstrain.train(recipe(world, {"method": solved, "max_steps": None}, budget=budget), tmp_path / "run").folder
    assert [stage["steps"] for stage in record(endless)["stages"]] == [3]
    assert "step 3: hpt ends after 3 steps that spent nothing of its budget in a row" in record(endless)["warnings"][-1]
    look = run._Run._look_at_rewards
    monkeypatch.setattr(run._Run, "_look_at_rewards", _stop_at_2)
    often = {"budget": budget, "save": {"save_steps": 1}}
    with pytest.raises(KeyboardInterrupt):
        crosstrain.train(recipe(world, {"method": solved, "max_steps": None}, **often), tmp_path / "resumed")
    monkeypatch.setattr(run._Run, "_look_at_rewards", look)
    resumed = crosstrain.train(recipe(world, {"method": solved, "max_steps": None}, **often), tmp_path / "resumed").folder
    assert [stage["steps"] for stage in record(resumed)["stages"]] == [3], "as without the interruption"
    ends = crosstrain.train(recipe(world, {"method": solved, "max_steps": 5}, budget=budget), tmp_path / "ends").folder
    assert [stage["steps"] for stage in record(ends)["stages"]] == [5]
    spends = recipe(world, {"method": "sft", "max_steps": None}, budget={"unit": "demonstrations", "amount": 12})
    assert record(crosstrain.train(spends, tmp_path / "spends").folder)["stages"] == [
        {"method": "sft", "steps": 4, "ended_by": "budget"}
    ]


def test_rows_and_rewards_may_be_given_as_they_are_in_python(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}", "answer": str(i)} for i in range(6)]
    reward_of_length = find_function(f"{world}/reward.py:length", {})
    given = crosstrain.train(recipe(world, GRPO, data=rows, rewards=[reward_of_length]), tmp_path / "given").folder
    dataset = datasets.Dataset.from_list(rows)
    of_dataset = crosstrain.train(recipe(world, GRPO, data=dataset, rewards=reward_of_length), tmp_path / "dataset").folder
    named = crosstrain.train(recipe(world, GRPO), tmp_path / "named").folder
    for one in (given, of_dataset):
        assert record(one)["data"] == record(named)["data"]
        torch.testing.assert_close(weights(one / "model"), weights(named / "model"), rtol=0, atol=0)
    assert "it is 3" not in (given / "recipe.json").read_text()
    with pytest.raises(UserError, match=r"jsonl:2: column 'prompt' is missing"):
        crosstrain.train(recipe(world, "sft", data=[rows[0], {"completion": "b"}]), tmp_path / "bad")
    with pytest.raises(UserError, match=r"jsonl: the file has no rows"):
        crosstrain.train(recipe(world, "sft", data=[]), tmp_path / "none")
    with pytest.raises(UserError, match="give a function that stands at the top level of one"):
        crosstrain.train(recipe(world, GRPO, rewards=[lambda completions, **kwargs: [1.0]]), tmp_path / "lambda")


def test_a_script_that_trains_with_a_reward_of_its_own_does_not_start_itself_again(world: Path, tmp_path: Path) -> None:
    settings = {**recipe(world, GRPO), "rewards": None}
    script = tmp_path / "script.py"
    reward = "def right(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
    run_it = f"crosstrain.train({settings!r} | {{'rewards': right}}, {str(tmp_path / 'run')!r})"
    script.write_text(f"import crosstrain\n{reward}{run_it}\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert 'put what starts the training under `if __name__ == "__main__":`' in done.stderr
    script.write_text(f'import crosstrain\n{reward}if __name__ == "__main__":\n    {run_it}\n')
    runpy.run_path(str(script), run_name="__main__")
    assert record(tmp_path / "run")["status"] == "finished"


def test_equal_rewards_are_a_warning(world: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text("def flat(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    result = crosstrain.train(recipe(world, GRPO, rewards=[f"{tmp_path}/flat.py:flat"]), tmp_path / "run")
    assert any("all rewards are equal within every group" in w for w in record(result.folder)["warnings"])


def test_missing_scores_are_a_warning_once(world: Path, tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def none(completions, **kwargs):\n    return [None] * len(completions)\n")
    result = crosstrain.train(recipe(world, GRPO, rewards=[f"{tmp_path}/none.py:none"]), tmp_path / "run")
    assert record(result.folder)["warnings"] == ["step 1: no completion got a score, so the step taught nothing"]
    assert record(result.folder)["skipped_steps"] == 2
    for name, weight in weights(result.folder / "model").items():
        assert torch.equal(weight, weights(world / "model")[name])


def test_a_model_that_cannot_be_sampled_from_with_a_cache_is_a_warning(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_sampler, "_find_path", lambda model: torch_sampler.Found("plain", "it has odd layers", True))
    crosstrain.train(recipe(world, GRPO), tmp_path / "run")
    assert any("slow: it has odd layers" in warning for warning in record(tmp_path / "run")["warnings"])
    crosstrain.train(recipe(world, "sft"), tmp_path / "no sampling")
    assert "slow" not in str(record(tmp_path / "no sampling")["warnings"])


def test_settings_that_no_stage_uses_are_warnings(world: Path, tmp_path: Path) -> None:
    rows = str(world / "rows.jsonl")
    sampling = {"temperature": 0.7, "max_completion_length": 5}
    wasteful = recipe(world, "sft", data={"train": rows, "more": rows}, sampling=sampling)
    expected = [
        "data.more: no stage draws from it",
        "rewards: no stage has completions for them, so nothing is scored with them",
        "sampling.temperature: no stage samples completions",
        "sampling.max_completion_length: no stage samples completions",
    ]
    assert record(crosstrain.train(wasteful, tmp_path / "run").folder)["warnings"] == expected
    assert list(run.plan(run.as_recipe(wasteful)).warnings) == expected
    questions = {**OFF, "in_distribution": [{"name": "sums", "task": "sums", "size": 2}]}
    asking = recipe(world, "sft", rewards=None, evaluation=questions)
    assert run.plan(run.as_recipe(asking)).warnings == (), "its questions are answered with as many tokens"
    assert run.plan(run.as_recipe(recipe(world, "sft", GRPO))).warnings == ()


def test_the_plan_says_what_would_happen_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    planned = run.plan(run.as_recipe(recipe(world, "sft", GRPO, output_dir=str(tmp_path / "run"))))
    assert [(s.method, s.steps) for s in planned.stages] == [("sft", 2), ("grpo", 2)]
    assert 2 * 3 * 3 <= planned.stages[1].cost.generated_tokens <= 2 * 3 * 3 * 5
    shown = str(planned)
    assert "predicted: 4 steps, " in shown
    assert "data: train, 6 rows" in shown
    assert "rl: max(-A r, -A clip(r)), r = pi / old per sequences" in shown
    assert not (tmp_path / "run").exists()


def test_metrics_go_to_trackers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio.py").write_text(
        "def init(**k): pass\ndef finish(): open('ended', 'w').close()\n"
        "def log(line, step): open('steps', 'a').write(f'{step} {line[\"loss\"]}\\n')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    crosstrain.train(recipe(world, "sft", report_to=["trackio"]), tmp_path / "run")
    seen = [int(line.split()[0]) for line in (tmp_path / "steps").read_text().splitlines()]
    assert seen == [1, 2]
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"in_distribution": [{"name": "x", "task": "sumz"}], **OFF}, "unknown task 'sumz'; did you mean 'sums'"),
        ({"in_distribution": [{"name": "x", "task": "sums", "split": "tset"}], **OFF}, "unknown split 'tset'"),
        ({**SETS, "dev": {"name": "dev", "task": "sums", "split": "dve"}}, "unknown split 'dve'"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_told_before_training(
    world: Path, tmp_path: Path, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        crosstrain.train(recipe(world, "sft", evaluation=evaluation), tmp_path / "run")
    assert lines(tmp_path / "run") == []


def test_a_budget_also_ends_a_stage_with_max_steps(world: Path, tmp_path: Path) -> None:
    budget = {"unit": "processed_tokens", "amount": 100}
    result = crosstrain.train(recipe(world, {"method": "sft", "max_steps": 9}, budget=budget), tmp_path / "run")
    assert [line["cost/processed_tokens"] >= 100 for line in lines(result.folder)] == [False, False, True]


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        (["sft", "sft"], {"budget": {"amount": 100}}, "'budget' has no effect: no stage has a 'budget_share'"),
        (
            [{"method": "sft", "init_from": "best"}],
            {"evaluation": SETS, "save": {"best_metric": "x"}},
            "nothing was trained before it",
        ),
        (["sft", {"method": "sft", "restart_schedule": False, "lr_scheduler_type": "linear"}], {}, "'restart_schedule: false'"),
        (
            [{"method": "sft", "until": {"metric": "eval_accuracy", "mode": "max", "patience": 1}}],
            {},
            "needs 'evaluation.eval_steps'",
        ),
        (
            [{"method": "sft", "until": {"metric": "los", "mode": "min", "patience": 1}}],
            {},
            "'los' is not measured; did you mean 'loss'",
        ),
        ([{"method": {"grpo": {"num_generations": "8"}}}], {}, "num_generations must be a whole number; got '8'"),
        ([{"method": {"hpt": {"gate": 0.5}}}], {}, "gate must be a whole number; got 0.5"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(
    world: Path, tmp_path: Path, stages: list[Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        crosstrain.train(recipe(world, *stages, **more), tmp_path / "run")


def test_a_run_whose_data_changed_does_not_go_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((world / "rows.jsonl").read_bytes())
    wanted = recipe(world, {"method": "sft", "max_steps": 3}, data=str(rows), save={"save_steps": 1})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("crosstrain.run._Run._keep_best", _stop_at_2)
        crosstrain.train(wanted, tmp_path / "run")
    before = rows.read_bytes()
    rows.write_bytes(before + b'{"prompt": "more", "completion": "rows"}\n')
    with pytest.raises(UserError, match="data has changed since this run began"):
        crosstrain.train(wanted, tmp_path / "run")
    rows.write_bytes(before)
    assert crosstrain.train(wanted, tmp_path / "run").metrics["step"] == 3


def _stop_at_2(run: Any, line: dict[str, Any]) -> None:
    if line["step"] == 2:
        raise KeyboardInterrupt


def test_a_run_that_stops_while_it_is_evaluated_goes_on_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = crosstrain.train(recipe(world, "sft", "sft"), tmp_path / "whole").folder
    evaluate = run._Run._evaluate
    monkeypatch.setattr(run._Run, "_evaluate", _killed)
    with pytest.raises(KeyboardInterrupt):
        crosstrain.train(recipe(world, "sft", "sft"), tmp_path / "run", save_weights=False)
    monkeypatch.setattr(run._Run, "_evaluate", evaluate)
    monkeypatch.setattr(run, "train_stage", _killed)  # there is nothing left to train
    crosstrain.train(recipe(world, "sft", "sft"), tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 4
    torch.testing.assert_close(weights(tmp_path / "run" / "model"), weights(whole / "model"), rtol=0, atol=0)


def test_model_text_with_odd_line_ends_can_be_read_back(tmp_path: Path) -> None:
    from crosstrain.training.record import append_lines, cut_lines

    odd = [{"step": i, "completion": f"a\u2028b\u0085c\u2029{i}"} for i in range(3)]
    append_lines(tmp_path / "completions.jsonl", odd)
    cut_lines(tmp_path / "completions.jsonl", 1)
    assert read_lines(tmp_path / "completions.jsonl") == odd[:2]


def test_a_replaced_folder_is_deleted_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "model"
    checkpoint.write_folder(place, lambda d: (d / "x").write_text("old"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("crosstrain.training.checkpoint.shutil.rmtree", _killed_at_deleting)
        checkpoint.write_folder(place, lambda d: (d / "x").write_text("new"))
    assert (place / "x").read_text() == "new"


def test_a_kill_while_a_stages_end_is_saved_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(stage: int) -> None:
        checkpoint.save(tmp_path, 10, checkpoint.Checkpoint({"w": torch.ones(1)}, {}, {"stage": stage}), stage=stage)

    saved(0)
    for moment in ("pathlib.Path.rename", "crosstrain.training.checkpoint.shutil.rmtree"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(moment, _killed)
            saved(1)
        latest = checkpoint.latest(tmp_path)
        assert latest is not None and checkpoint.load(latest).state["stage"] == 0
    saved(1)
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and checkpoint.load(latest).state["stage"] == 1
    assert [p.name for p in tmp_path.glob("step-*")] == [latest.name]


def _killed(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def _killed_at_deleting(path: Path, ignore_errors: bool = False) -> None:
    if path.name.endswith(".old"):
        raise KeyboardInterrupt
