"""Every method learns, each where it should: an easy task with a known answer, a tiny model, a handful of steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bandit import Bandit, first_token_probabilities, learn, model_for

from crosstrain.methods import load_method

REINFORCED: list[tuple[str, dict[str, Any]]] = [
    ("reinforce", {"num_generations": 8}),
    ("rloo", {"num_generations": 8}),
    ("raft", {"num_generations": 8}),
    ("grpo", {}),
    ("grpo", {"num_iterations": 2, "minibatches": 2}),
    ("dr_grpo", {"max_completion_length": 1}),
    ("dapo", {"num_generations": 8, "minibatches": 2, "dynamic_sampling": 2}),
]


@pytest.mark.parametrize(("name", "settings"), REINFORCED, ids=lambda x: str(x))
def test_rewards_alone_teach_what_sampling_can_find(name: str, settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    assert max(bandit.success(model)) < 0.2, "the task must not be solved at the start"
    metrics = learn(load_method(name, **settings), model, bandit, steps=40)
    assert min(bandit.success(model)) > 0.9
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.5


@pytest.mark.parametrize(("name", "settings"), [("sft", {}), ("sft", {"average": "sequences"}), ("dft", {})], ids=str)
def test_imitation_reaches_the_demonstration(name: str, settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    metrics = learn(load_method(name, **settings), model, bandit, steps=30)
    assert min(bandit.success(model)) > 0.9
    assert metrics[-1]["mean_token_accuracy"] == 1.0


def test_dpo_widens_the_margin_and_prefers_the_chosen_answer() -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    before = first_token_probabilities(model)
    assert all(float(p[r]) < float(p[w]) for p, r, w in zip(before, bandit.right, bandit.wrong, strict=True))
    metrics = learn(load_method("dpo"), model, bandit, steps=30)
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert metrics[-1]["rewards/margins"] > 0.3 and metrics[-1]["rewards/accuracies"] == 1.0
    after = first_token_probabilities(model)
    assert all(float(p[r]) > float(p[w]) for p, r, w in zip(after, bandit.right, bandit.wrong, strict=True))


FAR = 3.5
"""How sharp the model is where the right answer has a chance of 1 in 1,000 or less."""


def test_grpo_stays_at_zero_where_sampling_never_finds_the_answer() -> None:
    """No reward, no advantage, no gradient: the weights do not move at all."""
    model = model_for(FAR)
    bandit = Bandit.out_of_reach(model)
    assert max(bandit.success(model)) < 2e-3
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = learn(load_method("grpo", beta=0.0), model, bandit, steps=15, learning_rate=5e-3)
    assert {m["reward"] for m in metrics} == {0.0}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "settings", "sharpness"),
    [
        ("luffy", {}, FAR),
        # with this baseline nothing pushes the wrong answers down, and p / (p + 0.1) is flat where p is tiny
        ("luffy", {"baseline": "code"}, 3.0),
        ("hpt", {}, FAR),
        ("sft", {}, FAR),
    ],
    ids=["luffy", "luffy code", "hpt", "sft"],
)
def test_demonstrations_teach_what_sampling_never_finds(name: str, settings: dict[str, Any], sharpness: float) -> None:
    """The task on which GRPO stays at zero."""
    model = model_for(sharpness)
    bandit = Bandit.out_of_reach(model)
    metrics = learn(load_method(name, **settings), model, bandit, steps=80, learning_rate=5e-3)
    assert min(bandit.success(model)) > 0.9
    if name != "sft":
        assert metrics[0]["reward"] == 0.0


def test_hpt_imitates_first_and_reinforces_once_groups_are_solved() -> None:
    model = model_for(FAR)
    metrics = learn(load_method("hpt"), model, Bandit.out_of_reach(model), steps=60, learning_rate=5e-3)
    assert metrics[0]["weight_share/demo/expert"] == 1.0
    assert any(m.get("weight_share/rl/policy", 0.0) > 0 for m in metrics)
    assert "weight_share/demo/expert" not in metrics[-1]
