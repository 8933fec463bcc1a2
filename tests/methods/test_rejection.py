"""RFT, STaR and ReST-EM: what is kept, what a hint is for, and what it is to start every iteration from the base model."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bandit import PROMPTS, VOCABULARY, Bandit, learn, model_for, probability
from torch import Tensor
from worked import Line, agrees, answer, group, prepared, random_groups, selected, weights_of

import crosstrain
from crosstrain import run
from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.plans import right_answers
from crosstrain.models import load_model
from crosstrain.rollout.sampler import Completion, Prompt, Sampling
from crosstrain.testing import ScriptedSampler, made_up_examples, made_up_rewards, save_tiny_model, tiny_model
from crosstrain.training.collect import Truncation, collect
from crosstrain.training.engine import Engine, temperature_of
from crosstrain.training.loop import Progress, StageSettings, train_stage
from crosstrain.training.metrics import rollout_metrics
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.record import read_lines
from crosstrain.types import Example, Group, Method, Request, Source, Trajectory
from tensors import equal

MIXED = [group(answer("EE"), answer("O", 1.0), answer("OOO", 0.0), answer("OO", 0.5))]
LOGP = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0], [-4.0, -5.0, -6.0], [-7.0, -8.0, 0.0]])


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_rft_by_hand() -> None:
    """Two tokens of the demonstration, one of a right answer, two of the other: a mean over five, and nothing of the wrong one."""
    method = load_method("rft")
    found = weights_of(method, prepared(method, MIXED), LOGP[[0, 1, 3], :2])
    assert found.loss == pytest.approx((1 + 2 + 3 + 7 + 8) / 5)
    torch.testing.assert_close(found.weights, of([[0.2, 0.2], [0.2, 0], [0.2, 0.2]]))


def test_rest_em_by_hand() -> None:
    """One answer per prompt, the first right one."""
    method = load_method("rest_em", max_per_prompt=1)
    own = [group(*MIXED[0].trajectories[1:])]
    found = weights_of(method, prepared(method, own), LOGP[[1], :1])
    assert found.loss == pytest.approx(3.0)
    torch.testing.assert_close(found.weights, of([[1.0]]))


def text(*tokens: int, reward: float = 1.0) -> Trajectory:
    return Trajectory((1, *tokens), (Source.PROMPT,) + (Source.POLICY,) * len(tokens), reward=reward)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [(5,), (6,), (5,), (7, 8)]),
        ({"distinct": True}, [(5,), (6,), (7, 8)]),
        ({"most": 2}, [(5,), (6,)]),
        ({"distinct": True, "most": 3}, [(5,), (6,), (7, 8)]),
        ({"threshold": 1.0}, [(7, 8)]),
    ],
    ids=str,
)
def test_right_answers(settings: dict[str, Any], kept: list[tuple[int, ...]]) -> None:
    given = group(text(5), text(9, reward=0.0), text(6), text(5), text(7, 8, reward=1.5))
    found = right_answers(**settings)(given, {})
    assert found is not None and [t.response for t in found.trajectories] == kept
    assert right_answers(2.0)(given, {}) is None


def test_a_demonstration_is_kept_whatever_was_sampled() -> None:
    found = right_answers(2.0)(MIXED[0], {})
    assert found is not None and [t.wrote(Source.EXPERT) for t in found.trajectories] == [True]


# --- a second implementation, and identities ------------------------------------------------------------------------


def imitation(groups: list[list[Line]]) -> Tensor:
    """The mean negative log-likelihood of a demonstration and of what is right (arXiv:2308.01825 section 3.3, arXiv:2312.06585 eq.
    3 with rewards of 0 and 1)."""
    kept = [line for g in groups for line in g if line.expert or line.reward > 0]
    return -sum(sum(line.logp) for line in kept) / sum(len(line) for line in kept)


@pytest.mark.parametrize("seed", range(3))
def test_second_implementation(seed: int) -> None:
    agrees(load_method("rft", distinct=False), imitation, random_groups(seed, own=4, demonstration=True), seed)
    agrees(load_method("rest_em", max_per_prompt=None), imitation, random_groups(seed, own=4), seed)
    agrees(load_method("star"), imitation, random_groups(seed, own=2), seed)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rft", {"distinct": False, "with_demonstration": False}),
        ("rest_em", {"max_per_prompt": None}),
        ("star", {"hint": None, "num_generations": 4}),
    ],
)
def test_without_its_own_part_each_is_raft(name: str, settings: dict[str, Any]) -> None:
    """The same groups, the same weights; from the current model, with one update, the same trained model too."""
    method, raft = load_method(name, **settings), load_method("raft")
    groups = random_groups(3, own=4)
    logp = -3 * torch.rand((sum(len(g.trajectories) for g in selected(raft, groups)), 5), dtype=torch.float64)
    assert [len(g.trajectories) for g in selected(method, groups)] == [len(g.trajectories) for g in selected(raft, groups)]
    one, other = (prepared(m, groups) for m in (method, raft))
    width = one.tokens.shape[1] - 1
    torch.testing.assert_close(
        weights_of(method, one, logp[:, :width]).weights, weights_of(raft, other, logp[:, :width]).weights
    )
    settings = {**settings, "start_from": "current", "epochs": 1, "num_generations": 4}
    ended = []
    for m in (load_method(name, **settings), raft):
        model = model_for()
        learn(m, model, Bandit.reachable(model), steps=3)
        ended.append(model)
    assert same(*ended)


# --- STaR's hint ----------------------------------------------------------------------------------------------------


class Noting:
    """A sampler that notes its prompts, and answers 7 to whatever ends in 8, which is the hint, else 6."""

    def __init__(self) -> None:
        self.calls: list[list[Prompt]] = []

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        self.calls.append(list(prompts))
        return [[Completion((7 if p.tokens[-1] == 8 else 6, 2), (-0.5, -0.1), True)] * p.n for p in prompts]


def test_the_hints_words_are_what_a_context_is_made_of() -> None:
    assert load_method("star", hint="{prompt} ({answer})").contexts == {"hint": "{prompt} ({answer})"}
    assert load_method("star", hint=None).contexts == {}


class Two:
    """The prompts (1, 9) and (2, 9), each with a hint."""

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        made = [Example(f"train:{i}", "", (i + 1, 9), contexts={"hint": (i + 1, 9, 8)}) for i in range(position, position + n)]
        return made, position + n


def collected(method: Method, sampler: Any, right: dict[int, int]) -> Any:
    """What `method` collects where the answer to prompt i is the token right[i]."""

    def rewards(groups: list[Group]) -> list[Group]:
        return [
            replace(
                g,
                trajectories=tuple(
                    replace(t, reward=float(t.response[0] == right[g.example.prompt_tokens[0]])) if t.reward is None else t
                    for t in g.trajectories
                ),
            )
            for g in groups
        ]

    return collect(
        method,
        {},
        {"train": Two()},  # type: ignore[dict-item]
        {},
        batch_size=2,
        sampler=sampler,
        sampling=Sampling(),
        rewards=rewards,
        truncation=Truncation(),
        seed=0,
        step=4,
    )


def test_a_prompt_that_is_not_solved_is_asked_again_with_the_hint_and_trained_without() -> None:
    sampler = Noting()
    found = collected(load_method("star"), sampler, {1: 6, 2: 7})
    assert [[p.tokens for p in call] for call in sampler.calls] == [[(1, 9), (2, 9)], [(2, 9, 8)]]
    assert len({p.key for call in sampler.calls for p in call}) == 3
    first, second = (g.trajectories for g in found.groups)
    assert [t.tokens for t in (*first, *second)] == [(1, 9, 6, 2), (2, 9, 7, 2)], "the hint is in no prompt that is trained"
    assert (first[0].sampled_from, second[0].sampled_from) == ("", "hint")
    assert first[0].behaviour_logp[2:] == (-0.5, -0.1) and second[0].behaviour_logp == ()
    assert second[0].source == (Source.PROMPT,) * 2 + (Source.POLICY,) * 2
    assert found.usage.prefill_tokens == 2 + 2 + 3
    metrics = rollout_metrics(found.rewarded)
    assert metrics["reward"] == 0.5, "of answers to the prompts themselves"
    assert metrics["reward/hint"] == 1.0 and metrics["completions/mean_length"] == 2.0


def test_without_a_hint_or_where_it_does_not_help_a_prompt_is_left_out() -> None:
    for settings in ({"hint": None}, {}):
        found = collected(load_method("star", **settings), Noting(), {1: 6, 2: 5})
        assert [g.example.prompt_tokens for g in found.groups] == [(1, 9)]


def test_a_context_that_nobody_wrote_is_an_error() -> None:
    method = replace(
        load_method("star"), plan=replace(load_method("star").plan, next=lambda g, s: (Request(1, context="clue"),))
    )
    with pytest.raises(UserError, match="train:0@0: there is no context 'clue' to sample from"):
        collected(method, Noting(), {1: 6, 2: 6})


# --- starting from the base -----------------------------------------------------------------------------------------


def scripted(model: Any, base: Any, method: Method) -> Engine:
    """An engine whose samples follow from their keys alone, so that any model trains on the same."""

    class Rows:
        examples = made_up_examples(method)

        def draw(self, position: int, n: int) -> tuple[list[Example], int]:
            return [self.examples[(position + i) % len(self.examples)] for i in range(n)], position + n

    return Engine(
        model,
        1,
        "plain",
        torch.device("cpu"),
        {"train": Rows()},  # type: ignore[dict-item]
        sampler=ScriptedSampler(),
        rewards=made_up_rewards,
        base=None if base is None else lambda: dict(base.named_parameters()),
    )


def trained(method: Method, *, first: int = 0, steps: int, seed: int = 0, kind: str = "constant", warmup: int = 0) -> Any:
    """A model trained from step `first` on, and the steps' metrics."""
    model = tiny_model(seed, torch.float32)
    settings = StageSettings(batch_size=4, learning_rate=1e-2, lr_scheduler_type=kind, warmup_steps=warmup, max_steps=steps)
    progress = Progress(step=first, state=method.init(), positions={"train": 4 * first})
    engine = scripted(model, tiny_model(0, torch.float32), method)
    return model, [dict(s.metrics) for s in train_stage(engine, method, settings, Optimizer(model, "fp32"), progress)]


REST = {"num_generations": 4, "epochs": 2, "minibatches": 2}


def same(one: Any, other: Any) -> bool:
    return equal(dict(one.named_parameters()), dict(other.named_parameters()))


def test_an_iteration_leaves_nothing_of_the_ones_before_but_their_answers() -> None:
    """With answers that depend on no weights, three iterations are the third alone, to the last bit: weights and moments."""
    method = load_method("rest_em", **REST)
    whole, _ = trained(method, steps=3)
    last, _ = trained(method, first=2, steps=1)
    assert same(whole, last)
    assert same(trained(method, first=2, steps=1, seed=5)[0], last), "nor of the weights it was sampled with"
    going_on = load_method("rest_em", **REST, start_from="current")
    assert not same(trained(going_on, steps=3)[0], trained(going_on, first=2, steps=1)[0])
    assert same(trained(going_on, first=2, steps=1)[0], last), "the first step from the base is one from the current weights"


def test_what_answers_were_sampled_with_is_not_compared_with_the_base() -> None:
    """The sampler's log-probs are those of other weights: no measure of a mismatch."""
    mismatch = "sampling/sampling_logp_difference/mean"
    assert mismatch not in trained(load_method("rest_em", **REST), steps=1)[1][0]
    assert mismatch in trained(load_method("rest_em", **REST, start_from="current"), steps=1)[1][0]
    hot = replace(load_method("raft"), temperature=0.5)
    assert mismatch in trained(load_method("raft"), steps=1)[1][0] and mismatch not in trained(hot, steps=1)[1][0]


def test_a_learning_rate_schedule_runs_over_each_iteration() -> None:
    """Four updates: factors 1, 3/4, 1/2 and 1/4, and 1/2 of the first with a warmup of two, in every step the same."""
    rates = [m["learning_rate"] for m in trained(load_method("rest_em", **REST), steps=3, kind="linear", warmup=2)[1]]
    assert rates == pytest.approx([1e-2 * (0.5 + 0.75 + 0.5 + 0.25) / 4] * 3)


def test_an_iteration_that_keeps_nothing_trains_nothing() -> None:
    """The model stays what it was, and does not become the base."""
    method = replace(load_method("rest_em", **REST), select=lambda group, state: None)
    model, metrics = trained(method, steps=2, seed=5)
    assert same(model, tiny_model(5, torch.float32)) and metrics[-1]["skipped_steps"] == 2


def test_without_a_base_it_says_so() -> None:
    method = load_method("rest_em", **REST)
    model = tiny_model(0, torch.float32)
    steps = train_stage(
        scripted(model, None, method), method, StageSettings(4, 1e-2, max_steps=1), Optimizer(model, "fp32"), Progress()
    )
    with pytest.raises(UserError, match="method rest_em starts every step from the base model, and none was set up"):
        next(steps)


def test_it_is_trained_at_temperature_1() -> None:
    engine = Engine(None, 1, "plain", torch.device("cpu"), {}, sampling=Sampling(temperature=0.7))
    assert [temperature_of(engine, load_method(n)) for n in ("rft", "star", "rest_em", "raft")] == [1.0, 1.0, 1.0, 0.7]


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rft", "rest_em"])
def test_iterations_from_the_base_teach_what_sampling_can_find(name: str) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    assert max(bandit.success(model)) < 0.2
    settings = {"with_demonstration": False} if name == "rft" else {}
    metrics = learn(load_method(name, num_generations=32, epochs=30, **settings), model, bandit, steps=3)
    assert min(bandit.success(model)) > 0.8
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.3


def repeating() -> Any:
    """A model that says the last token of its prompt again."""
    model = model_for()
    lines = [*PROMPTS, *((*p, v) for p in PROMPTS for v in range(3, VOCABULARY))]
    by_length = [torch.tensor([x for x in lines if len(x) == n]) for n in sorted({len(x) for x in lines})]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        said = [model(x).logits[:, -1].log_softmax(-1).gather(1, x[:, -1:]) for x in by_length]
        loss = -torch.cat(said).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_hint_teaches_what_sampling_hardly_ever_finds() -> None:
    """The model repeats its last token, which is wrong, unless it is the answer that the hint gives away: what it says then, it
    learns to say to the prompt alone. Without the hint it learns next to nothing."""
    model = repeating()
    bandit = Bandit(tuple(((p[-1] + 1 - 3) % 9 + 3,) for p in PROMPTS), tuple((p[-1],) for p in PROMPTS))
    hints = [(*p, *a) for p, a in zip(PROMPTS, bandit.right, strict=True)]
    assert min(probability(model, h, a) for h, a in zip(hints, bandit.right, strict=True)) > 0.5
    assert max(bandit.success(model)) < 0.03

    class Hinted(Bandit):
        def examples(self, needs: str | None) -> list[Example]:
            return [replace(e, contexts={"hint": h}) for e, h in zip(super().examples(needs), hints, strict=True)]

    for hint, low, high in (("{prompt}", 0.8, 1.0), (None, 0.0, 0.1)):
        pupil = copy.deepcopy(model)
        method = load_method("star", num_generations=2, hint=hint, epochs=20)
        metrics = learn(method, pupil, Hinted(bandit.right, bandit.wrong), steps=2)
        assert low <= min(bandit.success(pupil)) <= high
        assert ("reward/hint" in metrics[0]) == (hint is not None) and metrics[0]["reward"] < 0.3


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text(
        "def even(completions, **kwargs):\n    return [float(len(c) % 2 == 0) for c in completions]\n"
    )
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}", "answer": str(i)} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(world: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": str(world / "model"),
        "data": str(world / "rows.jsonl"),
        "rewards": [f"{world}/reward.py:even"],
        "sampling": {"max_completion_length": 4},
        "evaluation": {"forgetting": False, "divergence": False},
        "stages": [{"batch_size": 6, "learning_rate": 1e-2, **stage} for stage in stages],
        "device": "cpu",
        "precision": "fp32",
        **more,
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("time", "seconds")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in read_lines(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(str(folder / "model"))[0].named_parameters())


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("name", ["star", "rest_em"])
def test_a_run_that_is_stopped_between_iterations_goes_on_to_the_same_end(
    world: Path, tmp_path: Path, name: str, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_generations": 2, "epochs": 2, "minibatches": 2}
    stage = {"method": {name: settings}, "max_steps": 3, "lr_scheduler_type": "linear"}
    content = recipe(world, stage, model={"name": str(world / "model"), "lora": lora}, save={"save_steps": 1})
    whole = crosstrain.train(content, tmp_path / "whole").folder
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run._Run, "_look_at_rewards", stop_at_2)
        crosstrain.train(content, tmp_path / "stopped")
    stopped = crosstrain.train(content, tmp_path / "stopped").folder
    assert lines(whole) == lines(stopped) and len(lines(whole)) == 3
    one, other = weights(whole), weights(stopped)
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    found = json.loads((whole / "record.json").read_text())
    assert found["methods"][0]["start_from"] == "base" and not any("starts from the base" in w for w in found["warnings"])


def stop_at_2(run: Any, line: dict[str, Any]) -> None:
    if line["step"] == 2:
        raise KeyboardInterrupt


def test_rft_after_sft_starts_from_the_recipes_own_model(world: Path, tmp_path: Path) -> None:
    """The paper's order: the first stage only samples for the second. With a reward that nothing gets, the second is SFT of the
    base on the demonstrations, whatever the first did."""
    (world / "none.py").write_text("def never(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    rft = {"method": {"rft": {"num_generations": 2, "epochs": 1}}, "max_steps": 1}
    more = {"rewards": [f"{world}/none.py:never"]}
    after = crosstrain.train(recipe(world, {"method": "sft", "max_steps": 2}, rft, **more), tmp_path / "after").folder
    alone = crosstrain.train(recipe(world, {"method": "sft", "max_steps": 1}), tmp_path / "alone").folder
    second = lines(after)[-1]
    assert second["method"] == "rft" and second["loss"] == pytest.approx(lines(alone)[0]["loss"], abs=1e-6)
    one, other = weights(after), weights(alone)
    assert one
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)  # one AdamW step on the same six rows


def test_iterations_on_a_part_of_the_data_are_warned_of(world: Path, tmp_path: Path) -> None:
    stage = {"method": {"rest_em": {"num_generations": 2}}, "max_steps": 1, "batch_size": 2}
    found = json.loads((crosstrain.train(recipe(world, stage), tmp_path / "run").folder / "record.json").read_text())
    assert any(
        "stage 0: every step of rest_em starts from the base model" in w and "2 of 6 rows" in w for w in found["warnings"]
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("star", {"hint": "the answer is {answer}"}, r"it must contain \{prompt\}"),
        ("star", {"max_per_prompt": 0}, "at least 1, or None for all"),
        ("rft", {"start_from": "best"}, "allowed: base, current"),
        ("rest_em", {"epochs": 0}, "at least 1"),
        ("rest_em", {"num_generations": 0}, "at least 1"),
        ("star", {"num_generations": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)
