"""AMFT and SASR: what mixes imitation and reinforcement learning, and how what was measured changes it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bandit import Bandit, learn, model_for
from test_hybrid_family import A, clipped, own_and_demonstrations
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.explain import GivenBatch, explain
from crosstrain.methods import load_method
from crosstrain.methods.amft import reward_derivative
from crosstrain.methods.sasr import imitates_at
from crosstrain.testing import check_method
from crosstrain.types import Example, Group, Method

LN2 = math.log(2)
MIXED = [group(answer("EE", 1.0), answer("O", 1.0), answer("O", 0.0))]
HALVES = -LN2 * torch.tensor([[1, 2], [1, 0], [1, 0]], dtype=torch.float64)
MAIN = {"step": 99, "mu": 0.8, "target": 1.0}


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixing(mu: float = 0.8, **settings: Any) -> Method:
    """AMFT as it is in its main phase."""
    return load_method("amft", **settings).at({**MAIN, "mu": mu})


# --- AMFT -------------------------------------------------------------------------------------------------------------


def test_amft_by_hand() -> None:
    """mu is 0.8: 0.8 / 2 on each demonstration token, 0.2 +-A / 2 on own ones; the demonstration's loss is 3/2 ln 2 per token."""
    found = weights_of(mixing(), prepared(mixing(), MIXED), HALVES)
    assert found.logged == pytest.approx(0.8 * 1.5 * LN2)
    torch.testing.assert_close(found.weights, of([[0.4, 0.4], [0.2 * A / 2, 0], [-0.2 * A / 2, 0]]))


def amft_paper(mu: float) -> Paper:
    """(1 - mu) RL + mu SFT, both averaged over their tokens."""

    def loss(groups: list[list[Line]]) -> Tensor:
        own, demo = own_and_demonstrations(groups)
        rl = sum(clipped(*token) for token in own) / len(own)
        return (1 - mu) * rl + mu * -sum(demo) / len(demo)  # type: ignore[arg-type]

    return loss


@pytest.mark.parametrize("mu", [0.05, 0.3, 0.95])
def test_a_second_implementation_of_amft(mu: float) -> None:
    agrees(mixing(mu), amft_paper(mu), random_groups(7, own=3, demonstration=True), 7)


def test_amft_at_chords_coefficient_is_chord() -> None:
    chord = load_method("chord_mu", mu=0.8, mu_valley=0.8)
    groups = random_groups(3, own=3, demonstration=True)
    logp, batch = random_logps(chord, groups, 3)
    batch = replace(batch, columns={})  # one update: the old policy is the current one
    torch.testing.assert_close(weights_of(mixing(), batch, logp).weights, weights_of(chord, batch, logp).weights)


def test_warm_up_imitates_alone() -> None:
    method = load_method("amft", warmup_steps=2, demonstration_share=0.25)
    start = method.init()
    assert method.coefs is not None
    assert method.coefs(start) == {"rl": 0.0, "demo": 1.0}
    assert method.plan.streams(start) == {"rl": 0.0, "demos": 1.0}
    after = method.update(method.update(start, {"entropy": 3.0}), {"entropy": 2.0})
    assert after == {"step": 2, "mu": 0.8, "target": None}
    assert method.plan.streams(after) == {"rl": 0.75, "demos": 0.25}
    assert method.coefs(after) == pytest.approx({"rl": 0.2, "demo": 0.8})
    one = load_method("amft", warmup_steps=2, rollouts_from="train", demonstrations_from="train")
    asked = Group(Example("a", "", (1,)), (), "train")
    assert one.plan.streams(start) == {"train": 1.0}
    assert not one.plan.next(asked, start)
    assert [r.n for r in one.plan.next(asked, after)] == [8]


def test_the_controller_by_hand() -> None:
    """The first step after warm-up sets the entropy that is aimed at. Below it, mu rises; the other part comes in every second
    step, and is lr (g_SFT . g_RL - |g_RL|^2)."""
    method = load_method("amft", mu=0.5, warmup_steps=0, entropy_lr=0.1, meta_lr=2.0, meta_every=2)
    orthogonal = {"grad_norm/rl": 0.5 * 3.0, "grad_norm/demo": 0.5 * 4.0, "grad_norm": 0.5 * 5.0, "learning_rate": 0.01}
    first = method.update(method.init(), {"entropy": 2.0, "reward": 0.0, **orthogonal})
    assert first == {"step": 1, "mu": pytest.approx(0.5 + 2.0 * 0.01 * (0 - 9.0)), "target": 2.0}
    second = method.update(first, {"entropy": 1.0, "reward": 0.0, **orthogonal})
    assert second["mu"] == pytest.approx(first["mu"] + 0.1 * (2.0 - 1.0))
    assert second["target"] == 2.0
    low = method.update({**second, "mu": 0.06}, {"entropy": 9.0})
    high = method.update({**second, "mu": 0.94}, {"entropy": -9.0})
    assert (low["mu"], high["mu"]) == (0.05, 0.95)
    assert method.update(second, {}) == {**second, "step": 3}, "a step that trained on nothing"


def test_meta_gradients_are_counted_from_the_end_of_warm_up() -> None:
    """Three steps of warm-up, then every fourth: steps 3, 7 and 11."""
    method = load_method("amft", warmup_steps=3, meta_every=4)
    assert [s for s in range(12) if method.probing({"step": s})] == [3, 7, 11]


def test_the_meta_gradient_is_the_derivative_of_the_reward_after_a_step() -> None:
    """On a quadratic reward, by finite differences: U(theta - lr (mu g_SFT + (1 - mu) g_RL)) by mu, to first order in lr."""
    generator = torch.Generator().manual_seed(0)
    theta, target, demo = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    rate, mu = 1e-4, 0.3
    g_rl, g_sft = 2 * (theta - target), 2 * (theta - demo)  # reward -|theta - target|^2, imitation |theta - demo|^2

    def reward(at: float) -> float:
        return float(-((theta - rate * (at * g_sft + (1 - at) * g_rl) - target) ** 2).sum())

    numeric = (reward(mu + 1e-3) - reward(mu - 1e-3)) / 2e-3
    norms = {
        "grad_norm/rl": float(((1 - mu) * g_rl).norm()),
        "grad_norm/demo": float((mu * g_sft).norm()),
        "grad_norm": float((mu * g_sft + (1 - mu) * g_rl).norm()),
        "learning_rate": rate,
        "reward": 0.0,
    }
    assert reward_derivative(norms, mu) == pytest.approx(numeric, rel=1e-3)
    assert reward_derivative({**norms, "reward": 0.0}, mu) != 0
    assert reward_derivative({k: v for k, v in norms.items() if k != "reward"}, mu) == 0.0


def test_amft_keeps_the_contract_after_warm_up_too() -> None:
    check_method(replace(load_method("amft"), init=lambda: dict(MAIN)))
    check_method(replace(load_method("amft", rollouts_from="train", demonstrations_from="train"), init=lambda: dict(MAIN)))


def test_explain_shows_the_weights_of_a_state() -> None:
    demo = {"source": ["prompt", "expert"], "logp": [0, -1.0]}
    own = [{"source": ["prompt", "policy"], "logp": [0, -1.0], "reward": r} for r in (1.0, 0.0)]
    groups = [{"stream": "demos", "trajectories": [demo]}, {"stream": "rl", "trajectories": own}]
    shown = explain(load_method("amft"), GivenBatch(groups=groups, state=MAIN))
    assert shown["groups"][0]["trajectories"][0]["weights"] == pytest.approx([0, 0.8])
    assert shown["groups"][1]["trajectories"][0]["weights"] == pytest.approx([0, 0.2 * A / 2])
    warm = explain(load_method("amft"), GivenBatch(groups=groups))
    assert warm["groups"][0]["trajectories"][0]["weights"] == pytest.approx([0, 1.0])


def test_amft_learns_and_its_coefficient_is_on_record() -> None:
    model, bandit = model_for(), Bandit.ending()
    assert max(bandit.success(model)) < 1e-3
    method = load_method("amft", warmup_steps=10, entropy_lr=0.05, meta_lr=1.0, meta_every=2)
    metrics = learn(method, model, bandit, steps=80)
    assert min(bandit.success(model)) > 0.6
    coefs = [m["coef/demo"] for m in metrics]
    assert coefs[:10] == [1.0] * 10 and coefs[10] == 0.8 and len(set(coefs[10:])) > 10
    assert all(m["coef/rl"] == pytest.approx(1 - m["coef/demo"]) for m in metrics)


# --- SASR -------------------------------------------------------------------------------------------------------------


def test_sasr_is_sft_or_grpo() -> None:
    """A step has demonstrations or rollouts, and then the gradient of one of both."""
    sasr = load_method("sasr", beta=0.1)
    for other, groups in (
        (load_method("sft"), random_groups(2, demonstration=True)),
        (load_method("grpo", beta=0.1), random_groups(2, own=3)),
    ):
        logp, batch = random_logps(load_method("grpo", beta=0.1), groups, 2)
        batch = replace(batch, advantage=torch.ones_like(batch.advantage)) if other.name == "sft" else batch
        batch = replace(batch, columns={k: c for k, c in batch.columns.items() if k != "old_logp"})
        ours, theirs = (weights_of(m, batch, logp) for m in (sasr, other))
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-12)
        assert ours.logged == pytest.approx(theirs.logged)


def test_sasr_by_hand() -> None:
    imitating = weights_of(load_method("sasr"), prepared(load_method("sft"), [group(answer("EE"))]), HALVES[:1])
    torch.testing.assert_close(imitating.weights, of([[0.5, 0.5]]))
    two = [group(answer("O", 1.0), answer("O", 0.0))]
    found = weights_of(load_method("sasr", beta=0.0), prepared(load_method("sasr", beta=0.0), two), HALVES[1:, :1])
    torch.testing.assert_close(found.weights, of([[A / 2], [-A / 2]]))


def test_a_second_implementation_of_sasrs_steps() -> None:
    def paper(groups: list[list[Line]]) -> Tensor:
        own, demo = own_and_demonstrations(groups)
        if demo:
            return -sum(demo) / len(demo)  # type: ignore[return-value]
        rows = [line for g in groups for line in g]
        tokens = iter(own)
        return sum(sum(clipped(*next(tokens)) for _ in line.logp) / len(line) for line in rows) / len(rows)  # type: ignore[return-value]

    agrees(load_method("sasr", beta=0.0), paper, random_groups(4, own=3), 4)
    agrees(load_method("sasr", beta=0.0), paper, random_groups(4, demonstration=True), 4)


def test_when_sasr_imitates() -> None:
    settings = {"gamma": 1.0, "warmup_steps": 3}
    assert all(imitates_at({"step": s, "norm": 0.0, "warm": 1.0}, **settings) for s in range(3))
    assert not imitates_at({"step": 3, "norm": 0.0, "warm": 1.0}, **settings), "warm-up is over after three steps"
    for norm, expected in ((0.0, 0.0), (1.0, 0.5), (9.0, 0.9)):
        drawn = [imitates_at({"step": s, "norm": norm, "warm": 1.0, "seed": 5}, **settings) for s in range(3, 2003)]
        assert sum(drawn) / 2000 == pytest.approx(expected, abs=0.03)
    drawn = [imitates_at({"step": s, "norm": 2.0, "warm": 3.0, "seed": 5}, gamma=2.0, warmup_steps=3) for s in range(3, 2003)]
    assert sum(drawn) / 2000 == pytest.approx(2 / (2 + 2 * 3), abs=0.03)
    by_seed = [
        [imitates_at({"step": s, "norm": 1.0, "warm": 1.0, "seed": seed}, **settings) for s in range(3, 60)] for seed in (0, 1)
    ]
    assert by_seed[0] != by_seed[1], "the chance is keyed by the run's seed"


def test_sasr_remembers_the_norms_of_imitation_alone() -> None:
    method = load_method("sasr", warmup_steps=1)
    state = method.update(method.init(), {"grad_norm": 4.0})
    assert state == {"step": 1, "norm": 4.0, "warm": 4.0}
    assert method.update(state, {"grad_norm": 9.0}) == {"step": 2, "norm": 9.0, "warm": 4.0}, "the first step after warm-up"
    state = method.update(state, {"grad_norm": 7.0, "reward": 0.5})
    assert state == {"step": 2, "norm": 4.0, "warm": 4.0}, "a step of reinforcement learning"
    state = method.update(state, {"grad_norm": 2.0})
    assert state == {"step": 3, "norm": 2.0, "warm": 4.0}
    assert method.update(state, {}) == {**state, "step": 4}, "a step that trained on nothing"
    assert json.loads(json.dumps(state)) == state
    unwarmed = load_method("sasr", warmup_steps=0)
    assert unwarmed.update(unwarmed.init(), {"grad_norm": 3.0}) == {"step": 1, "norm": 3.0, "warm": 3.0}


REINFORCING = {"step": 9, "norm": 0.0, "warm": 1.0}


def test_sasr_draws_a_whole_step_from_one_stream() -> None:
    method = load_method("sasr", warmup_steps=1)
    demo = answer("E")
    example = Example("a", "", (1,), (demo,))
    assert method.plan.streams(method.init()) == {"rl": 0.0, "demos": 1.0}
    assert method.plan.start(example, method.init()) == (demo,)
    assert not method.plan.next(Group(example, (demo,), "demos"), method.init())
    assert method.plan.streams(REINFORCING) == {"rl": 1.0, "demos": 0.0}
    assert method.plan.start(example, REINFORCING) == ()
    assert [r.n for r in method.plan.next(Group(example, (), "rl"), REINFORCING)] == [8]
    assert not method.plan.next(Group(example, (answer("O"),), "rl"), REINFORCING)
    one = load_method("sasr", rollouts_from="train", demonstrations_from="train")
    assert one.plan.streams(REINFORCING) == one.plan.streams(one.init()) == {"train": 1.0}


def test_sasr_keeps_the_contract_where_it_reinforces() -> None:
    check_method(replace(load_method("sasr"), init=lambda: dict(REINFORCING)))


def test_sasr_learns_by_both() -> None:
    model, bandit = model_for(), Bandit.ending()
    assert max(bandit.success(model)) < 1e-3
    metrics = learn(load_method("sasr", warmup_steps=15, beta=0.0), model, bandit, steps=80)
    assert min(bandit.success(model)) > 0.6
    kinds = ["rl" if "reward" in m else "sft" for m in metrics]
    assert kinds[:15] == ["sft"] * 15 and {"rl", "sft"} == set(kinds[15:])
    assert any("logps/policy" in m for m in metrics) and not any("logps/policy" in m and "logps/expert" in m for m in metrics)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("amft", {"mu": 0.99}, "they must be in .0, 1., and in that order"),
        ("amft", {"meta_every": 0}, "meta_every must be at least 1"),
        ("amft", {"meta_lr": 0.0, "meta_every": 5}, "meta_every has no effect: meta_lr is 0"),
        ("amft", {"demonstration_share": 1.0}, "it must be between 0 and 1"),
        ("sasr", {"gamma": 0.0}, "gamma must be positive"),
        ("sasr", {"num_generations": 0}, "num_generations: got 0; it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)


def test_further_passes_are_made_only_in_the_steps_of_a_meta_gradient() -> None:
    """After two steps of warm-up every third one, whose line has both norms."""
    method = load_method("amft", warmup_steps=2, meta_every=3)
    assert [step for step in range(10) if method.at({**MAIN, "step": step}).probes] == [2, 5, 8]
    assert load_method("amft", meta_lr=0.0).at({**MAIN, "step": 50}).probes == ()
    metrics = learn(method, model_for(), Bandit.ending(), steps=7)
    assert [i for i, line in enumerate(metrics) if "grad_norm/rl" in line] == [2, 5]
