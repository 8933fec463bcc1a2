"""Every method learns, each where it should: an easy task with a known answer, a tiny model, a handful of steps."""

from __future__ import annotations

from typing import Any

import pytest
from bandit import Bandit, learn, model_for

from crosstrain.methods import load_method
from tensors import equal

REINFORCED: list[tuple[str, dict[str, Any]]] = [
    ("reinforce", {"num_generations": 8}),
    ("rloo", {"num_generations": 8}),
    ("raft", {"num_generations": 8}),
    ("grpo", {}),
    ("grpo", {"num_iterations": 2, "minibatches": 2, "beta": 0.0}),
    ("dr_grpo", {"max_completion_length": 1}),
    ("dapo", {"num_generations": 8, "minibatches": 2, "dynamic_sampling": 2}),
    ("gspo", {"minibatches": 2}),
    ("gmpo", {"minibatches": 2}),
    ("cispo", {"minibatches": 2}),
    ("sapo", {"minibatches": 2}),
    ("raft_pp", {"num_generations": 8, "minibatches": 2}),
    ("reinforce_rej", {"num_generations": 8}),
    ("drop_dead", {}),
    ("clip_cov", {"minibatches": 2}),
    ("kl_cov", {"minibatches": 2, "ratio": 0.05}),
    ("remax", {"num_generations": 8}),
    ("reinforce_pp", {"num_generations": 8}),
    ("reinforce_pp_baseline", {}),
    ("nft", {"num_generations": 8, "minibatches": 2, "constant": 32.0}),
]


@pytest.mark.parametrize(("name", "settings"), REINFORCED, ids=lambda x: str(x))
def test_rewards_alone_teach_what_sampling_can_find(name: str, settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    assert max(bandit.success(model)) < 0.2, "the task must not be solved at the start"
    metrics = learn(load_method(name, **settings), model, bandit, steps=50, until=0.9)
    assert min(bandit.success(model)) > 0.9
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.5


IMITATED: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("sft", {"average": "sequences"}),
    ("dft", {}),
    ("psft", {"minibatches": 2}),
    ("iw_sft", {}),
    ("gem", {}),
    ("otr", {}),
    ("sft", {"label_smoothing": 0.02, "neftune_noise_alpha": 0.1}),
]


@pytest.mark.parametrize(("name", "settings"), IMITATED, ids=str)
def test_imitation_reaches_the_demonstration(name: str, settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    metrics = learn(load_method(name, **settings), model, bandit, steps=40)
    assert min(bandit.success(model)) > 0.9
    assert metrics[-1]["mean_token_accuracy"] == 1.0


def test_dpo_widens_the_margin_and_prefers_the_chosen_answer() -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    flipped = Bandit(bandit.wrong, bandit.right)
    assert max(bandit.success(model)) < min(flipped.success(model)), "at first the wrong answers are the likely ones"
    metrics = learn(load_method("dpo"), model, bandit, steps=40)
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert metrics[-1]["rewards/margins"] > 0.3 and metrics[-1]["rewards/accuracies"] == 1.0
    assert min(bandit.success(model)) > 0.5 > max(flipped.success(model))


PREFERRED: list[tuple[str, dict[str, Any]]] = [
    ("dpo_nll", {}),
    ("ipo", {}),
    ("simpo", {}),
    ("cpo", {}),
    ("orpo", {"beta": 1.0}),
]


@pytest.mark.parametrize(("name", "settings"), PREFERRED, ids=str)
def test_preferences_turn_the_order_of_two_answers(name: str, settings: dict[str, Any]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    flipped = Bandit(bandit.wrong, bandit.right)
    assert max(bandit.success(model)) < min(flipped.success(model))
    metrics = learn(load_method(name, **settings), model, bandit, steps=40)
    assert min(bandit.success(model)) > 2 * max(flipped.success(model))
    assert metrics[-1]["rewards/accuracies"] == 1.0 and metrics[-1]["loss"] < metrics[0]["loss"]


def test_grpo_stays_at_zero_where_sampling_never_finds_the_answer() -> None:
    """No reward, no advantage, no gradient: the weights do not move at all."""
    model = model_for()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = learn(load_method("grpo", beta=0.0), model, Bandit.out_of_reach(), steps=8)
    assert {m["reward"] for m in metrics} == {0.0}
    assert equal(dict(model.named_parameters()), before)


AIDED: list[tuple[str, dict[str, Any]]] = [
    ("chord_mu", {}),
    ("chord_phi", {"mu": 0.5}),
    ("superrl", {}),
    ("superrl", {"trigger": "advantages"}),
    ("rl_plus", {}),
    ("srft", {}),
    ("hpt_soft", {}),
    ("trapo", {}),
    ("uft", {"hint_coef": 0.1, "hint_steps": 60}),
    (
        "prefix_rft",
        {"num_generations": 4, "entropy_share": 1.0, "decay_steps": 200, "max_completion_length": 4, "minibatches": 1},
    ),
]


@pytest.mark.parametrize(("name", "settings"), AIDED, ids=str)
def test_other_hybrids_learn_what_sampling_alone_does_not_find(name: str, settings: dict[str, Any]) -> None:
    model, bandit = model_for(), Bandit.ending()
    assert max(bandit.success(model)) < 1e-3
    learn(load_method(name, **settings), model, bandit, steps=100, until=0.6)
    assert min(bandit.success(model)) > 0.6


def test_dropping_dead_prompts_alone_teaches_nothing_that_is_never_sampled() -> None:
    model = model_for()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(load_method("drop_dead"), model, Bandit.out_of_reach(), steps=4)
    assert equal(dict(model.named_parameters()), before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("luffy", {}), pytest.param("luffy", {"baseline": "rollouts"}, marks=pytest.mark.slow), ("hpt", {})],
    ids=["luffy", "luffy code", "hpt"],
)
def test_demonstrations_beside_rollouts_teach_what_sampling_never_finds(name: str, settings: dict[str, Any]) -> None:
    """The task on which GRPO stays at zero, from a chance of 1 in 10,000 to more than 7 in 10."""
    model, bandit = model_for(), Bandit.out_of_reach()
    assert max(bandit.success(model)) < 1e-4
    metrics = learn(load_method(name, **settings), model, bandit, steps=80, until=0.7)
    assert min(bandit.success(model)) > 0.7
    assert metrics[0]["reward"] == 0.0 and "logps/expert" in metrics[0]


def test_hpt_imitates_first_and_reinforces_where_a_group_is_partly_solved() -> None:
    model = model_for()
    metrics = learn(load_method("hpt", num_generations=4), model, Bandit.reachable(model), steps=40)
    imitated = [m.get("weight_share/demo/expert", 0.0) for m in metrics]
    assert imitated[0] > 0 and max(m.get("weight_share/rl/policy", 0.0) for m in metrics) > 0.5
    assert sum(imitated[-5:]) < sum(imitated[:5]), "imitation fades as groups are solved"
