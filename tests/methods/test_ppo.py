"""PPO with a critic: numbers by hand, the paper's loops, and what it is at its limits."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from bandit import Bandit, learn, model_for
from torch import Tensor
from valued import outcome
from worked import answer, group, prepared, random_groups, rectangle, selected, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.testing import check_method
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.types import Batch, Group, Look, Method, Scores

F64 = torch.float64


def credited(method: Method, groups: list[Group], logp: Tensor, **columns: Tensor) -> Batch:
    """The batch with given columns [B, T - 1], and with what the method builds of them."""
    batch = prepared(load_method("reinforce"), groups, **columns)

    def look(other: Batch, *, of: str = "current") -> Scores:
        assert of == "current" and other.tokens is batch.tokens
        return Scores(rectangle(logp, batch))

    seen: Look = look  # type: ignore[assignment]
    for name, build in method.columns.items():
        batch = batch.with_columns(**{name: build(seen, batch)})
    return with_advantage(batch, method.advantage(batch))


def test_by_hand() -> None:
    """Reward 1 on two tokens, V_old = 1/2 and 1/4, lam = 1/2: d = -1/4 and 3/4, G = 1/8 and 3/4, R = 5/8 and 1, A = -+ 1/sqrt 2.

    The policy: ratio 1 on the first, 1.5 (clipped) on the second. The critic: V = 0.8 (clipped to 0.7, nearer to R: the plain
    loss counts) and 0.65 (clipped to 0.45, further away: no gradient).
    """
    method = load_method("ppo", kl_coef=0.0, lam=0.5)
    logp = torch.tensor([[-1.0, -1.0]], dtype=F64)
    old = logp - torch.tensor([[1.0, 1.5]], dtype=F64).log()
    old_value = torch.tensor([[0.5, 0.25]], dtype=F64)
    batch = credited(method, [group(answer("OO", 1.0))], logp, old_logp=old, old_value=old_value)
    assert batch.columns["returns"][0, 1:].tolist() == [0.625, 1.0]
    a = 1 / math.sqrt(2)
    assert batch.advantage[0, 1:].tolist() == pytest.approx([-a, a], abs=1e-7)
    found = outcome(method, batch, logp, torch.tensor([[0.8, 0.65]], dtype=F64))
    assert found.logged["value"] == pytest.approx(0.1 / 2 * (0.175**2 + 0.55**2) / 2)
    assert found.logged["rl"] == pytest.approx((a - 1.2 * a) / 2, abs=1e-7)
    assert found.weights[0].tolist() == pytest.approx([-a / 2, 0.0], abs=1e-7)
    assert found.value_weights[0].tolist() == pytest.approx([0.1 * (0.625 - 0.8) / 2, 0.0])


def test_a_kl_in_the_reward_by_hand() -> None:
    """log pi_old - log ref is 1 and -2, kl_coef 0.1: rewards -0.1 and 1 + 0.2. With V = 0 and lam = 1 returns are 1.1 and 1.2; k3
    takes off 0.1 e^-1 and 0.1 (e^2 - 3)."""
    logp = torch.tensor([[-1.0, -3.0]], dtype=F64)
    columns = {"ref_logp": torch.tensor([[-2.0, -1.0]], dtype=F64), "old_value": torch.zeros(1, 2, dtype=F64)}
    groups = [group(answer("OO", 1.0))]
    for named in ({}, {"old_logp": logp}):  # without it the policy that sampled is the current one
        batch = credited(load_method("ppo", kl_coef=0.1, lam=1.0), groups, logp, **columns, **named)
        assert batch.columns["returns"][0, 1:].tolist() == pytest.approx([1.1, 1.2])
    batch = credited(load_method("ppo", kl_coef=0.1, lam=1.0, kl_estimator="k3"), groups, logp, **columns)
    last = 1 - 0.1 * (math.e**2 - 3)
    assert batch.columns["returns"][0, 1:].tolist() == pytest.approx([last - 0.1 * math.exp(-1), last])


def test_an_entropy_bonus_by_hand() -> None:
    """Entropies 1 and 3 over two tokens at entropy_coef 0.1: -0.1 (1 + 3) / 2. Nothing reads a reference without a KL."""
    method = load_method("ppo", kl_coef=0.0, entropy_coef=0.1)
    logp, zero = torch.tensor([[-1.0, -1.0]], dtype=F64), torch.zeros(1, 2, dtype=F64)
    batch = credited(method, [group(answer("OO", 1.0))], logp, old_logp=logp, old_value=zero)
    found = outcome(method, batch, logp, zero, torch.tensor([[1.0, 3.0]], dtype=F64))
    assert found.logged["entropy"] == pytest.approx(-0.2)
    assert "ref_logp" not in method.needs and "ref_logp" in load_method("ppo").needs


def paper(batch: Batch, logp: Tensor, values: Tensor, s: dict[str, Any]) -> Tensor:
    """arXiv:1707.06347 eq. 7 to 12 and TRL's conventions, in loops over sequences and tokens."""
    rows = [[t - 1 for t in range(batch.tokens.shape[1]) if bool(batch.trained[r, t])] for r in range(len(batch))]
    column = {k: c[:, 1:] for k, c in batch.columns.items()} if batch.columns else {}
    rewards: dict[tuple[int, int], float] = {}
    for r, at in enumerate(rows):
        for t in at:
            d = float(column["old_logp"][r, t] - column["ref_logp"][r, t]) if s["kl_coef"] else 0.0
            estimate = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[s["kl_estimator"]]
            rewards[r, t] = -s["kl_coef"] * estimate if s["kl_in_reward"] else 0.0
        rewards[r, at[-1]] += float(batch.reward[r])
    if s["whiten_rewards"]:
        mean, std = statistics.fmean(rewards.values()), statistics.stdev(rewards.values())
        rewards = {k: (x - mean) / (std + 1e-8) + mean for k, x in rewards.items()}
    raw: dict[tuple[int, int], float] = {}
    for r, at in enumerate(rows):
        v = [float(column["old_value"][r, t]) for t in at] + [0.0]
        delta = [rewards[r, t] + s["gamma"] * v[k + 1] - v[k] for k, t in enumerate(at)]
        for k, t in enumerate(at):
            raw[r, t] = sum((s["gamma"] * s["lam"]) ** (j - k) * delta[j] for j in range(k, len(at)))
    mean, std = statistics.fmean(raw.values()), statistics.stdev(raw.values()) + 1e-8
    total = torch.zeros((), dtype=F64)
    for (r, t), g in raw.items():
        a, old_value = (g - mean) / std, float(column["old_value"][r, t])
        ratio = (logp[r, t] - float(column["old_logp"][r, t])).exp()
        policy = -torch.minimum(a * ratio, a * ratio.clamp(1 - s["cliprange"], 1 + s["cliprange"]))
        if s["dual_clip"] and a < 0:
            policy = torch.minimum(policy, torch.tensor(-s["dual_clip"] * a, dtype=F64))
        target, v = g + old_value, values[r, t]
        critic = (v - target) ** 2
        if s["cliprange_value"]:
            kept = v.clamp(old_value - s["cliprange_value"], old_value + s["cliprange_value"])
            critic = torch.maximum(critic, (kept - target) ** 2)
        total = total + policy + s["vf_coef"] * critic / 2
        if s["kl_coef"] and not s["kl_in_reward"]:
            d = logp[r, t] - float(column["ref_logp"][r, t])
            total = total + s["kl_coef"] * {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[s["kl_estimator"]]
    return total / len(raw)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"kl_coef": 0.0, "gamma": 0.9, "lam": 0.7},
    {"kl_estimator": "k3", "kl_in_reward": False, "cliprange_value": 0.0},
    {"kl_estimator": "k2", "whiten_rewards": True, "vf_coef": 0.5},
    {"dual_clip": 1.5, "cliprange": 0.1, "cliprange_value": 0.05},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_second_implementation(settings: dict[str, Any], seed: int) -> None:
    """Gradients on log-probs and on values, and the loss, with a tool's words in one response."""
    method = load_method("ppo", **settings)
    groups = [*random_groups(seed, own=2), group(answer("OTTO", 1.0), name="tool")]
    shape = to_batch(selected(method, groups)).tokens[:, 1:].shape
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i), dtype=F64) for i in range(4)]
    logp, values = -3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64), made[0]
    columns = {"old_logp": logp + 0.3 * made[1], "ref_logp": logp + 0.5 * made[2], "old_value": values + 0.3 * made[3]}
    batch = credited(method, groups, logp, **columns)
    own = batch.trained & (batch.source != 3)
    ours = outcome(method, batch, logp, values)
    leaf, value = logp.clone().requires_grad_(), values.clone().requires_grad_()
    # the paper knows own tokens only
    theirs = paper(replace(batch, trained=own), leaf, value, dict(method.settings))
    of_logp, of_value = torch.autograd.grad(theirs, [leaf, value])
    torch.testing.assert_close(ours.weights, -of_logp, rtol=0, atol=1e-8)
    torch.testing.assert_close(ours.value_weights, -of_value, rtol=0, atol=1e-8)
    assert sum(ours.logged.values()) == pytest.approx(float(theirs.detach()), abs=1e-8)


def test_without_a_critic_it_is_reinforce_plus_plus() -> None:
    """V = 0 and lam = 1: the returns of REINFORCE++, whitened alike; the policy's weights are its."""
    ppo = load_method("ppo", kl_coef=0.01, lam=1.0)
    other = load_method("reinforce_pp", num_iterations=2)
    groups = random_groups(5, own=3)
    shape = to_batch(selected(ppo, groups)).tokens[:, 1:].shape
    generator = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(shape, generator=generator, dtype=F64)
    columns = {n: logp + 0.4 * torch.randn(shape, generator=generator, dtype=F64) for n in ("old_logp", "ref_logp")}
    zero = torch.zeros(shape, dtype=F64)
    ours = outcome(ppo, credited(ppo, groups, logp, old_value=zero, **columns), logp, zero)
    theirs = weights_of(other, credited(other, groups, logp, **columns), logp)
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-12)


def test_a_perfect_critic_leaves_only_noise_to_be_credited() -> None:
    """gamma = lam = 1: A + V is the return, whatever V says; with V the return, G is 0 before it is normalised."""
    method = load_method("ppo", kl_coef=0.0, lam=1.0)
    groups = [group(answer("OOO", 2.0), answer("O", -1.0))]
    logp = -torch.ones(2, 3, dtype=F64)
    for values in (torch.zeros(2, 3, dtype=F64), torch.tensor([[2.0] * 3, [-1.0] * 3], dtype=F64)):
        batch = credited(method, groups, logp, old_logp=logp, old_value=values)
        assert batch.columns["returns"][batch.trained].tolist() == pytest.approx([2.0, 2.0, 2.0, -1.0])
    assert bool((batch.advantage[batch.trained] == 0).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_coef": 0.0, "kl_estimator": "k3"}, "have no effect"),
        ({"kl_coef": 0.0, "kl_in_reward": False}, "have no effect"),
        ({"kl_coef": -0.1}, "must be 0 or positive"),
        ({"vf_coef": 0.0}, "would never learn"),
        ({"lam": 1.5}, "lam in"),
        ({"cliprange_value": -0.1}, "0 for no clip"),
        ({"kl_estimator": "k4"}, "allowed: k1, k2, k3"),
    ],
    ids=str,
)
def test_settings_without_effect_or_out_of_range_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method("ppo", **settings)


def test_other_settings_keep_the_contract() -> None:
    check_method(load_method("ppo", num_generations=3, kl_in_reward=False, kl_estimator="k3", entropy_coef=0.01, dual_clip=3.0))


def test_it_learns_and_so_does_its_critic() -> None:
    """Values start at 0 and end near the reward of what is sampled by then."""
    model = model_for()
    bandit = Bandit.reachable(model)
    assert max(bandit.success(model)) < 0.2
    metrics = learn(
        load_method("ppo", num_generations=8, kl_coef=0.001, vf_coef=0.5, num_ppo_epochs=2), model, bandit, steps=50
    )
    assert min(bandit.success(model)) > 0.9
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.5
    assert abs(metrics[0]["values/mean"]) < 0.1 and metrics[-1]["values/mean"] == pytest.approx(1.0, abs=0.25)
