"""Online DPO and SPIN: pairs that are made in training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bandit import Bandit, learn, model_for
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, selected, weights_of

import crosstrain
from crosstrain import checks, run
from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.describe import record
from crosstrain.methods.online_dpo import best_and_worst, worse_than_the_demonstration
from crosstrain.models import load_model
from crosstrain.objective.reduce import count
from crosstrain.rollout.sampler import Sampling
from crosstrain.testing import save_tiny_model
from crosstrain.training.batching import to_batch
from crosstrain.training.collect import with_known_rewards
from crosstrain.training.engine import Engine, temperature_of
from crosstrain.training.record import read_lines
from crosstrain.types import Group, Method, Source, Trajectory

LN2 = math.log(2)
PAIR = [group(answer("OOO", 1.0), answer("O", 0.0))]
LOGP = -LN2 * torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
REF = -LN2 * torch.tensor([[2.0, 2.0, 4.0], [2.0, 0.0, 0.0]])


def demonstration_is_better(groups: list[Group]) -> list[Group]:
    """Groups as a step of SPIN scores them."""

    def scored(t: Trajectory) -> Trajectory:
        return replace(t, reward=worse_than_the_demonstration(groups[0], t, lambda tokens: "")) if t.wrote(Source.POLICY) else t

    made = [replace(g, trajectories=tuple(map(scored, g.trajectories))) for g in groups]
    return [known for g in made if (known := with_known_rewards(g)) is not None]


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_online_dpo_by_hand() -> None:
    """Moved by 2 ln 2 and ln 2: at beta 1 the margin is ln 2, sigmoid 2/3, loss ln 1.5, weights +-1/3. As IPO, 1 / (2 beta) = 1/2:
    (ln 2 - 1/2)^2 and weights -+2 (ln 2 - 1/2)."""
    method = load_method("online_dpo", beta=1.0)
    found = weights_of(method, prepared(method, PAIR, ref_logp=REF), LOGP)
    assert found.loss == pytest.approx(math.log(1.5))
    torch.testing.assert_close(found.weights, of([[1 / 3] * 3, [-1 / 3, 0, 0]]))
    method = load_method("online_dpo", beta=1.0, loss_type="ipo")
    found = weights_of(method, prepared(method, PAIR, ref_logp=REF), LOGP)
    assert found.loss == pytest.approx((LN2 - 0.5) ** 2)
    w = 2 * (0.5 - LN2)
    torch.testing.assert_close(found.weights, of([[w] * 3, [-w, 0, 0]]))


def test_spin_by_hand() -> None:
    """The same numbers, the demonstration being the better answer."""
    method = load_method("spin", beta=1.0)
    pair = demonstration_is_better([group(answer("EEE"), answer("O"))])
    found = weights_of(method, prepared(method, pair, ref_logp=REF), LOGP)
    assert found.loss == pytest.approx(math.log(1.5))
    torch.testing.assert_close(found.weights, of([[1 / 3] * 3, [-1 / 3, 0, 0]]))


@pytest.mark.parametrize("name", ["online_dpo", "spin"])
def test_with_the_policy_as_its_own_reference_every_pair_weighs_half_of_beta(name: str) -> None:
    method = load_method(name, beta=0.4)
    pair = [group(answer("OOO" if name == "online_dpo" else "EEE", 1.0), answer("O", 0.0))]
    found = weights_of(method, prepared(method, pair, ref_logp=LOGP), LOGP)
    assert found.loss == pytest.approx(LN2)
    torch.testing.assert_close(found.weights, of([[0.2] * 3, [-0.2, 0, 0]]))


# --- second implementations and identities --------------------------------------------------------------------------


def pairs(loss: Callable[[Tensor], Tensor]) -> Paper:
    """arXiv:2402.04792 eq. 1 and 2, arXiv:2401.01335 eq. 4.7: best against worst of each group, groups without a difference left
    out."""

    def paper(groups: list[list[Line]]) -> Tensor:
        losses = []
        for g in groups:
            best, worst = max(g, key=lambda line: line.reward), min(g, key=lambda line: line.reward)
            moved = [sum(x - r for x, r in zip(line.logp, line.ref, strict=True)) for line in (best, worst)]
            losses.append(loss(moved[0] - moved[1]))
        return sum(losses) / len(losses)

    return paper


@pytest.mark.parametrize("seed", range(3))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, own=4)
    assert any(selected(load_method("online_dpo"), [g]) for g in groups)
    agrees(load_method("online_dpo", beta=0.3), pairs(lambda d: torch.log(1 + torch.exp(-0.3 * d))), groups, seed)
    agrees(load_method("online_dpo", beta=0.3, loss_type="ipo"), pairs(lambda d: (d - 1 / 0.6) ** 2), groups, seed)
    demonstrated = demonstration_is_better(random_groups(seed, own=1, demonstration=True))
    agrees(load_method("spin", beta=0.3), pairs(lambda d: torch.log(1 + torch.exp(-0.3 * d))), demonstrated, seed)


def written_by(letters: Source, g: Group) -> Group:
    """The same answers by an expert, or by the policy."""
    return replace(
        g,
        trajectories=tuple(
            replace(t, source=tuple(letters if s != Source.PROMPT else s for s in t.source)) for t in g.trajectories
        ),
    )


@pytest.mark.parametrize(
    ("online", "offline"),
    [
        (load_method("online_dpo", beta=0.3), load_method("dpo", beta=0.3)),
        (load_method("online_dpo", beta=0.3, loss_type="ipo"), load_method("ipo", tau=0.3)),
        (load_method("spin", beta=0.3), load_method("dpo", beta=0.3)),
    ],
    ids=["online dpo", "online ipo", "spin"],
)
def test_on_the_same_pairs_each_is_its_offline_form(online: Method, offline: Method) -> None:
    pair = [written_by(Source.POLICY, g) for g in random_groups(5, pair=True)]
    generator = torch.Generator().manual_seed(0)
    shape = to_batch(pair).tokens[:, 1:].shape
    logp, ref = (-3 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    one = weights_of(online, prepared(online, pair, ref_logp=ref), logp)
    expert = [written_by(Source.EXPERT, g) for g in pair]
    other = weights_of(offline, prepared(offline, expert, ref_logp=ref), logp)
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)
    assert one.loss == other.loss


# --- the pairs ------------------------------------------------------------------------------------------------------


def test_best_and_worst_are_the_pair() -> None:
    four = group(answer("O", 0.5), answer("OO", 2.0), answer("OOO", 2.0), answer("OOOO", -1.0), answer("OOOOO", None))
    kept = best_and_worst(four, {})
    assert kept is not None and [t.reward for t in kept.trajectories] == [2.0, -1.0]
    assert len(kept.trajectories[0].response) == 2, "of equal rewards the first"
    assert best_and_worst(group(answer("O", 1.0), answer("OO", 1.0)), {}) is None
    assert best_and_worst(group(answer("O", None)), {}) is None


def test_an_answer_that_is_masked_makes_no_pair() -> None:
    """A truncated answer that is not trained on has no log-prob to compare: nothing could be said of the other one either."""
    cut = group(answer("OO", 1.0), answer("OOO", 0.0, finished=False), name="cut")
    whole = group(answer("OO", 1.0), answer("OOO", 0.0), name="whole")
    method = load_method("online_dpo")
    batch = to_batch([cut, whole], mask_truncated=True)
    assert [x.tolist() for x in batch.pairs()] == [[2], [3]]
    assert count(method.terms, batch, groups=2) == {"dpo": 1.0}
    assert count(method.terms, to_batch([cut], mask_truncated=True), groups=1) == {"dpo": 0.0}


def test_it_samples_at_one_temperature_and_trains_at_1() -> None:
    engine = Engine(None, 1, "plain", torch.device("cpu"), {}, sampling=Sampling(temperature=0.9))
    assert [temperature_of(engine, load_method(name)) for name in ("online_dpo", "spin", "grpo", "sft")] == [1.0, 1.0, 0.9, 1.0]


def test_what_they_ask_of_a_run() -> None:
    found = {name: (record(name)["data"], record(name)["needs"]) for name in ("online_dpo", "spin")}
    assert found["online_dpo"] == ("online", ["verifier", "reference model"])
    assert found["spin"] == ("offline + online", ["demonstrations"]), (
        "SPIN's opponent is the model itself, and no reward is asked"
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("online_dpo", {"num_generations": 1}, "a pair has two answers, so it must be at least 2"),
        ("online_dpo", {"beta": 0.0}, "must be positive"),
        ("online_dpo", {"loss_type": "hinge"}, "allowed: sigmoid, ipo"),
        ("online_dpo", {"dynamic_sampling": 0}, "at least 1"),
        ("spin", {"beta": -1.0}, "must be positive"),
        ("spin", {"epochs": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"loss_type": "ipo", "beta": 0.02}], ids=["sigmoid", "ipo"])
def test_online_dpo_finds_and_prefers_the_rewarded_answer(settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    assert max(bandit.success(model)) < 0.2
    metrics = learn(load_method("online_dpo", num_generations=8, **settings), model, bandit, steps=60)
    assert min(bandit.success(model)) > 0.8
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.5


def test_spin_comes_to_say_what_is_demonstrated() -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    metrics = learn(load_method("spin", epochs=3), model, bandit, steps=60)
    assert min(bandit.success(model)) > 0.8
    assert metrics[0]["rewards/margins"] > 0 and "logps/expert" in metrics[0]


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "reward.py").write_text("def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(world: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": str(world / "model"),
        "data": str(world / "rows.jsonl"),
        "sampling": {"max_completion_length": 4},
        "evaluation": {"forgetting": False, "divergence": False},
        "stages": [{"batch_size": 6, "learning_rate": 1e-3, **stage} for stage in stages],
        "device": "cpu",
        "precision": "fp32",
        **more,
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_an_iteration_of_spin_is_a_step_or_a_stage_of_one(world: Path, tmp_path: Path, lora: Any) -> None:
    """No reward in the recipe. With one update per iteration the policy is its own opponent at every step: the loss is ln 2, which
    it would not be against where the stage or the run started."""
    model = {"name": str(world / "model"), "lora": lora}
    steps = crosstrain.train(
        recipe(world, {"method": {"spin": {"epochs": 1}}, "max_steps": 2}, model=model), tmp_path / "steps"
    )
    assert [line["loss"] for line in lines(steps.folder)] == pytest.approx([LN2, LN2], abs=1e-6)
    one = {"method": "spin", "max_steps": 1}
    stages = recipe(world, one, {**one, "method": {"spin": {"beta": 5.0, "epochs": 2}}, "learning_rate": 1e-4}, model=model)
    found = lines(crosstrain.train(stages, tmp_path / "stages").folder)
    assert [line["stage"] for line in found] == [0, 1]
    assert all(line["loss"] < LN2 and line["rewards/margins"] > 0 for line in found), "each against its own start"


def test_a_rewards_key_has_no_use_beside_spin_alone(world: Path) -> None:
    content = recipe(world, {"method": "spin", "max_steps": 1}, rewards=[f"{world}/reward.py:length"])
    spin, grpo = load_method("spin"), load_method("grpo")
    parsed = run.as_recipe(content)
    assert checks.unused_settings(parsed, [spin]) == [
        "rewards: no stage has completions for them, so nothing is scored with them"
    ]
    assert checks.unused_settings(parsed, [spin, grpo]) == []


@pytest.mark.parametrize("name", ["spin", "online_dpo"])
def test_a_run_that_is_stopped_goes_on_to_the_same_end(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = [f"{world}/reward.py:length"] if name == "online_dpo" else None
    stage = {"method": name, "max_steps": 3, "batch_size": 3}
    content = recipe(world, stage, rewards=rewards, save={"save_steps": 1})
    whole = crosstrain.train(content, tmp_path / "whole").folder
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run._Run, "_look_at_rewards", stop_at_2)
        crosstrain.train(content, tmp_path / "stopped")
    stopped = crosstrain.train(content, tmp_path / "stopped").folder
    timed = ("time", "seconds")
    cleaned = [
        [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines(f)] for f in (whole, stopped)
    ]
    assert cleaned[0] == cleaned[1]
    weights = [dict(load_model(str(folder / "model"))[0].named_parameters()) for folder in (whole, stopped)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def stop_at_2(run: Any, line: dict[str, Any]) -> None:
    if line["step"] == 2:
        raise KeyboardInterrupt
