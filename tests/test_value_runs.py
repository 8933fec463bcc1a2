"""Whole runs with a value head: a critic that is trained and left behind, a reward model that is saved and used as a reward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, CohereConfig, CohereForCausalLM, GPT2Config

import crosstrain
from crosstrain import run
from crosstrain.checks import unused_settings
from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.models import load_model
from crosstrain.reward_models import _padding, check_classifier, save_reward_model
from crosstrain.rewards import RewardPool, load_reward
from crosstrain.rewards.model import ModelReward
from crosstrain.run import as_recipe
from crosstrain.testing import made_up_value_head, save_tiny_model, tiny_model, tiny_tokenizer
from crosstrain.training import checkpoint
from crosstrain.training.record import read_lines
from crosstrain.types import Example, Group, Source, Trajectory

PPO = {"ppo": {"num_generations": 2, "num_ppo_epochs": 2, "num_mini_batches": 2}}
TIMES = ("time/", "step_time", "cost/seconds")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    texts = [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no" * i + "!", "margin": 0.5} for i in range(6)]
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
        }
        for row in texts
    ]
    prompts = [{"prompt": row["prompt"]} for row in texts]
    for name, content in (("texts", texts), ("chats", chats), ("prompts", prompts), ("chat_prompts", chats)):
        only = [{"prompt": r["prompt"]} for r in content] if "prompts" in name else content
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in only))
    return folder


def recipe(world: Path, *stages: dict[str, Any], data: str = "prompts", **more: Any) -> dict[str, Any]:
    return {
        "model": str(world / "model"),
        "data": str(world / f"{data}.jsonl"),
        "rewards": [f"{world}/reward.py:length"] if "prompts" in data else None,
        "sampling": {"max_completion_length": 5},
        "evaluation": {"forgetting": False, "divergence": False},
        "stages": [{"max_steps": 3, "batch_size": 3, "learning_rate": 1e-2, **stage} for stage in stages],
        "device": "cpu",
        "precision": "fp32",
        **more,
    }


def preferences(world: Path, data: str = "texts", steps: int = 3, **more: Any) -> dict[str, Any]:
    return recipe(world, {"method": "reward_model", "max_steps": steps, "batch_size": 6}, data=data, **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in found]


# --- a critic ---------------------------------------------------------------------------------------------------------


def test_the_critic_is_trained_and_checkpointed_and_stays_out_of_the_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[checkpoint.Checkpoint] = []
    save = checkpoint.save

    def remember(folder: Path, step: int, found: checkpoint.Checkpoint, **more: Any) -> Path:
        weights = {n: w.clone() for n, w in found.weights.items()}
        kept.append(checkpoint.Checkpoint(weights, {n: m.clone() for n, m in found.moments.items()}, found.state))
        return save(folder, step, found, **more)

    monkeypatch.setattr(checkpoint, "save", remember)
    result = crosstrain.train(recipe(world, {"method": PPO}, save={"save_steps": 1}), tmp_path / "run")
    assert {"loss/rl", "loss/value", "values/mean", "kl"} <= set(result.metrics)
    heads = [c.weights["value_head.weight"] for c in kept]
    assert bool(heads[0].any()) and not torch.equal(heads[0], heads[1])
    assert bool(kept[0].moments["value_head.weight/exp_avg"].any())
    saved, base = (load_file(f / "model" / "model.safetensors") for f in (result.folder, world))
    assert saved.keys() == base.keys()
    assert not torch.equal(saved["model.norm.weight"], base["model.norm.weight"])


class Stopped(Exception):
    """Instead of a kill."""


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ({"method": PPO, "value_learning_rate": 0.1}, {"method": PPO, "restart_optimizer": False, "max_steps": 2})
    wanted = recipe(world, *stages, save={"save_steps": 1}, precision=precision)
    whole = crosstrain.train(wanted, tmp_path / "whole")
    for stop_at in (2, 4):
        save = run._Run._save

        def stopping(self: Any, save: Any = save, stop_at: int = stop_at) -> None:
            save(self)
            if self.progress.step == stop_at:
                raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(run._Run, "_save", stopping)
            with pytest.raises(Stopped):
                crosstrain.train(wanted, tmp_path / "stopped")
    again = crosstrain.train(wanted, tmp_path / "stopped")
    assert lines(again.folder) == lines(whole.folder)
    one, other = (load_file(r.folder / "model" / "model.safetensors") for r in (whole, again))
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_a_stage_from_the_base_starts_with_a_new_head(world: Path, tmp_path: Path) -> None:
    one = {"method": {"ppo": {"num_generations": 2, "num_ppo_epochs": 1}}}
    result = crosstrain.train(recipe(world, one, {**one, "init_from": "base"}, one), tmp_path / "run")
    means = [line["values/mean"] for line in lines(result.folder)]
    assert means[0] == means[3] == 0.0 and 0.0 not in (means[2], means[4], means[6])


def test_a_stage_that_reads_no_values_leaves_the_head_as_it_was(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay and moments that are kept would move it."""
    heads: list[tuple[torch.Tensor, torch.Tensor]] = []
    save = checkpoint.save

    def remember(folder: Path, step: int, found: checkpoint.Checkpoint, **more: Any) -> Path:
        if found.moments:
            heads.append((found.weights["value_head.weight"].clone(), found.moments["value_head.weight/exp_avg"].clone()))
        return save(folder, step, found, **more)

    monkeypatch.setattr(checkpoint, "save", remember)
    rloo = {"method": {"rloo": {"num_generations": 2}}, "restart_optimizer": False, "weight_decay": 0.1}
    crosstrain.train(recipe(world, {"method": PPO}, rloo, {"method": PPO}, save={"save_steps": 1}), tmp_path / "run")
    # at steps 1 to 3 and the first stage's end, at steps 4 to 6 and the second's, and then steps 7 to 9
    assert len(heads) == 11 and not torch.equal(heads[2][0], heads[8][0])
    assert all(torch.equal(one, other) for before in heads[4:8] for one, other in zip(heads[3], before, strict=True))


def test_the_head_may_learn_faster_than_the_model(world: Path, tmp_path: Path) -> None:
    one = {"method": {"ppo": {"num_generations": 2, "num_ppo_epochs": 1}}, "max_steps": 2, "learning_rate": 1e-5}
    slow = crosstrain.train(recipe(world, one), tmp_path / "slow", save_weights=False)
    fast = crosstrain.train(recipe(world, {**one, "value_learning_rate": 0.1}), tmp_path / "fast", save_weights=False)
    assert abs(lines(fast.folder)[1]["values/mean"]) > 100 * abs(lines(slow.folder)[1]["values/mean"]) > 0
    with pytest.raises(UserError, match="stage 0: value_learning_rate has no effect, since rloo has no value head"):
        crosstrain.train(recipe(world, {"method": "rloo", "value_learning_rate": 0.1}), tmp_path / "other")


def test_adapters_and_a_head_are_trained_together(world: Path, tmp_path: Path) -> None:
    model = {"name": str(world / "model"), "lora": {"r": 2}}
    result = crosstrain.train(recipe(world, {"method": PPO}, model=model), tmp_path / "run")
    assert result.metrics["values/mean"] != 0
    assert not any("value" in name for name in load_file(result.folder / "model" / "model.safetensors"))


# --- a reward model ---------------------------------------------------------------------------------------------------


def texts_of(world: Path, data: str, answer: str) -> tuple[list[Any], list[Any]]:
    rows = read_lines(world / f"{data}.jsonl")
    return [row["prompt"] for row in rows], [row[answer] for row in rows]


@pytest.mark.parametrize("data", ["texts", "chats"])
def test_what_is_saved_scores_as_in_training(world: Path, tmp_path: Path, data: str) -> None:
    """The fourth step of a run says what the rewards are after three: those of the folder that a run of three leaves."""
    three = crosstrain.train(preferences(world, data), tmp_path / "three")
    four = crosstrain.train(preferences(world, data, steps=4), tmp_path / "four")
    in_training = lines(four.folder)[-1]
    assert in_training["rewards/margins"] > 0.02
    reward = load_reward(str(three.folder / "model"))
    assert isinstance(reward, ModelReward) and reward.name == "model"
    for name, answer in (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")):
        prompts, completions = texts_of(world, data, answer)
        scores = reward(prompts=prompts, completions=completions)
        assert sum(map(float, scores)) / 6 == pytest.approx(in_training[name], abs=1e-5)  # type: ignore[arg-type]


def test_the_folder_is_a_classifier_that_transformers_loads(world: Path, tmp_path: Path) -> None:
    """Its own tokenizer pads a batch so that the classifier's own reading finds the end token, with which this one padded."""
    result = crosstrain.train(preferences(world), tmp_path / "run")
    folder = result.folder / "model"
    classifier, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(classifier).__name__ == "LlamaForSequenceClassification" and classifier.config.num_labels == 1
    assert tokenizer.pad_token_id == classifier.config.pad_token_id != tokenizer.eos_token_id
    prompts, completions = texts_of(world, "texts", "rejected")
    texts = [p + c + tokenizer.eos_token for p, c in zip(prompts, completions, strict=True)]
    with torch.no_grad():
        plain = classifier(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    assert load_reward(str(folder))(prompts=prompts, completions=completions) == pytest.approx(plain, abs=1e-5)
    assert len({round(x, 4) for x in plain}) > 1
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card


@pytest.mark.parametrize("data", ["prompts", "chat_prompts"])
def test_a_trained_reward_model_is_a_reward(world: Path, tmp_path: Path, data: str) -> None:
    """What a run is paid for its completions is what the folder says of their texts, beside a function's weighted score."""
    trained = crosstrain.train(preferences(world, "texts" if data == "prompts" else "chats"), tmp_path / "reward")
    folder, tokenizer = str(trained.folder / "model"), tiny_tokenizer()
    rewards = [folder, {"name": f"{world}/reward.py:length", "weight": 0.5}]
    grpo = {"method": {"grpo": {"num_generations": 3}}}
    result = crosstrain.train(recipe(world, grpo, data=data, rewards=rewards), tmp_path / "run")
    written = read_lines(result.folder / "completions.jsonl")
    assert len(written) >= 3
    rows = {f"train:{i}": row["prompt"] for i, row in enumerate(read_lines(world / f"{data}.jsonl"))}
    for row in written:
        text = row["completion"]
        for special in tokenizer.all_special_tokens:
            text = text.replace(special, "")
        prompt = rows[row["id"].split("@")[0]]
        chat = not isinstance(prompt, str)
        completion: Any = [{"role": "assistant", "content": text}] if chat else text
        [score] = load_reward(folder)(prompts=[prompt], completions=[completion])
        assert score is not None
        assert row["reward"] == pytest.approx(score + 0.5 * len(completion), abs=1e-5)


def test_adapters_are_merged_into_the_classifier(world: Path, tmp_path: Path) -> None:
    model = {"name": str(world / "model"), "lora": {"r": 2}}
    three = crosstrain.train(preferences(world, model=model), tmp_path / "three")
    four = crosstrain.train(preferences(world, steps=4, model=model), tmp_path / "four")
    prompts, completions = texts_of(world, "texts", "chosen")
    scores = load_reward(str(three.folder / "model"))(prompts=prompts, completions=completions)
    assert sum(map(float, scores)) / 6 == pytest.approx(lines(four.folder)[-1]["rewards/chosen"], abs=1e-5)  # type: ignore[arg-type]


def test_an_architecture_without_a_classifier_is_refused_before_step_1() -> None:
    config = CohereConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with pytest.raises(UserError, match=r"CohereForCausalLM \(cohere\): transformers has no sequence classifier"):
        check_classifier(CohereForCausalLM(config))
    check_classifier(tiny_model())


def test_a_reward_model_is_asked_no_questions(world: Path, tmp_path: Path) -> None:
    dev = {"name": "dev", "task": "sums", "size": 2}
    for name, questions in (("in_distribution", [dev]), ("dev", dev)):
        with pytest.raises(UserError, match=f"evaluation.{name}: the run ends in a reward model"):
            crosstrain.train(preferences(world, evaluation={name: questions}), tmp_path / name)
    result = crosstrain.train(preferences(world, evaluation={}), tmp_path / "default")
    assert result.evaluation is None
    assert any("answers nothing" in w for w in json.loads((result.folder / "record.json").read_text())["warnings"])


# --- any classifier as a reward ---------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    model = tiny_model(dtype=torch.float32, vocab_size=len(tiny_tokenizer()))
    save_reward_model(model, made_up_value_head(model), tiny_tokenizer(), tmp_path / "reward")
    return tmp_path / "reward"


def test_a_run_whose_reward_model_changed_under_its_name_does_not_go_on(
    world: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(world, {"method": {"grpo": {"num_generations": 3}}}, rewards=[str(made)], save={"save_steps": 1})

    def stopping(self: Any, line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run._Run, "_keep_best", stopping)
        crosstrain.train(wanted, tmp_path / "run")
    model = tiny_model(seed=3, dtype=torch.float32, vocab_size=len(tiny_tokenizer()))
    shutil.rmtree(made)
    save_reward_model(model, made_up_value_head(model), tiny_tokenizer(), made)
    with pytest.raises(UserError, match=f"the weights of the reward model {made} have changed since this run began"):
        crosstrain.train(wanted, tmp_path / "run")


def test_a_bad_sample_has_no_score_and_ends_nothing(made: Path) -> None:
    reward = load_reward(str(made))
    many = "x" * 600  # more than the model's 512 positions
    chat = [{"role": "user", "content": "hi"}]
    say = [[{"role": "assistant", "content": text}] for text in ("yes", "", " ", many, "<|im_end|>")]
    scores = reward(prompts=[chat] * 5, completions=say)
    assert [s is None for s in scores] == [False, False, False, True, False]
    assert reward(prompts=["hi"] * 3, completions=["", many, "yes"])[1] is None
    source = (Source.PROMPT, Source.POLICY)
    groups = [Group(Example("a", "hi", (5,)), tuple(Trajectory((5, x), source) for x in (60, 61)))]
    with RewardPool([str(made)], on_error="missing") as pool:
        scored, counts = pool.score(groups, lambda tokens: many if tokens[0] == 60 else "yes")
    assert (counts.scored, counts.missing, counts.errors) == (1, 1, 0)
    assert [t.reward is None for t in scored[0].trajectories] == [True, False]


def test_scores_do_not_depend_on_what_is_scored_with_them(made: Path) -> None:
    reward = load_reward(str(made))
    answers = ["a" * (i + 1) for i in range(20)]  # more than go through the model together
    together = reward(prompts=["hi"] * 20, completions=answers)
    alone = [reward(prompts=["hi"], completions=[a])[0] for a in answers]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_score_that_is_no_number_is_a_failure(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [Group(Example("a", "hi", (5,), where="rows.jsonl:3"), (Trajectory((5, 6), (Source.PROMPT, Source.POLICY)),))]
    monkeypatch.setattr(ModelReward, "__call__", lambda self, **columns: [float("nan")])
    with RewardPool([str(made)]) as pool, pytest.raises(UserError, match=r"gave nan; .* on rows.jsonl:3"):
        pool.score(groups, lambda tokens: "yes")


def test_what_is_no_reward_model_is_named(world: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is LlamaForCausalLM; a reward model is a sequence classifier"):
        load_reward(str(world / "model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder has no config.json"):
        load_reward(str(tmp_path / "empty"))
    config = json.loads((made / "config.json").read_text())
    config["id2label"] = {"0": "A", "1": "B"}
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has 2 labels; a reward model has one"):
        load_reward(str(made))
    absent = load_reward("nobody/nothing")  # a hub id is looked up when it is first asked
    with pytest.raises(UserError, match="nobody/nothing: the reward model cannot be loaded"):
        absent(prompts=["hi"], completions=["yes"])
    with pytest.raises(UserError, match="unknown reward"):
        load_reward("no/such/folder")


def test_a_classifier_of_others_reads_its_own_template(tmp_path: Path) -> None:
    """One that pads with its end token, and was not made here: transformers' rendering and reading, whatever they are."""
    config = GPT2Config(vocab_size=len(tiny_tokenizer()), n_positions=128, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    config.pad_token_id = tiny_tokenizer().eos_token_id
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "other")
    chat = [{"role": "user", "content": "hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no, never")]
    found = load_reward(str(tmp_path / "other"))(prompts=[chat, chat], completions=answers)
    for answer, score in zip(answers, found, strict=True):
        ids = tokenizer(tokenizer.apply_chat_template([*chat, *answer], tokenize=False), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert score == pytest.approx(float(classifier(input_ids=ids).logits[0, 0]), abs=1e-5)


def test_a_tokenizer_with_one_special_token_leaves_no_padding() -> None:
    """As GPT-2's: there is nothing else to pad with, so texts are read one by one."""

    class One:
        pad_token_id = unk_token_id = eos_token_id = 7
        all_special_ids = (7,)

    assert _padding(One()) is None
    assert _padding(tiny_tokenizer()) != tiny_tokenizer().eos_token_id


def test_the_model_is_loaded_in_evaluation_and_takes_no_random_numbers(made: Path) -> None:
    reward = load_reward(str(made))
    before = torch.get_rng_state()
    reward(prompts=["hi"], completions=["yes"])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification, which says no words"):
        load_model(str(made))


def test_settings_of_processes_are_of_no_use_to_a_reward_model(world: Path, made: Path) -> None:
    found = as_recipe(recipe(world, {"method": PPO}, rewards={"functions": [str(made)], "workers": 2}))
    assert unused_settings(found, [load_method("ppo")]) == [
        "rewards.workers: reward models are asked in this process, under no time limit"
    ]
