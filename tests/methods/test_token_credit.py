"""Credit that differs by token without a critic: a KL in the reward of ReMax and REINFORCE++, and entropy-shaped advantages."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from bandit import Bandit, learn, model_for
from test_ppo import credited
from torch import Tensor
from valued import outcome
from worked import Line, Paper, answer, gradient_of, group, prepared, random_groups, selected, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.testing import check_method
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.types import Batch, Group, Method

F64 = torch.float64


def random_numbers(method: Method, groups: list[Group], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [B, T - 1], and old and reference ones off them."""
    shape = to_batch(selected(method, groups)).tokens[:, 1:].shape
    generator = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(shape, generator=generator, dtype=F64)
    return logp, {n: logp + 0.4 * torch.randn(shape, generator=generator, dtype=F64) for n in ("old_logp", "ref_logp")}


def test_reinforce_pp_by_hand() -> None:
    """Reward 1, kl_coef 1/2, d = 1 and -1: G = 1 - 1/2 (1 - 1) = 1 and 1 + 1/2 = 3/2; whitened A = -+ 1/sqrt 2, over two tokens."""
    method = load_method("reinforce_pp", kl_coef=0.5)
    logp, ref = torch.tensor([[-1.0, -3.0]], dtype=F64), torch.tensor([[-2.0, -2.0]], dtype=F64)
    batch = credited(method, [group(answer("OO", 1.0))], logp, ref_logp=ref)
    found = weights_of(method, batch, logp)
    a = 1 / math.sqrt(2)
    torch.testing.assert_close(found.weights, torch.tensor([[-a / 2, a / 2]], dtype=F64), rtol=0, atol=1e-7)


def reinforce_pp_paper(beta: float) -> Paper:
    """arXiv:2501.03262 eq. 8 to 10: R - beta sum over s >= t of KL(s), normalised over the step, in PPO's loss."""

    def loss(groups: list[list[Line]]) -> Tensor:
        tokens: list[tuple[Tensor, float, float]] = []
        for line in (line for g in groups for line in g):
            d = [o - r for o, r in zip(line.old, line.ref, strict=True)]
            tokens += [(line.logp[t], line.old[t], line.reward - beta * sum(d[t:])) for t in range(len(d))]
        values = [b for _, _, b in tokens]
        mean, std = statistics.fmean(values), statistics.stdev(values) + 1e-8
        ratios = [((x - o).exp(), (b - mean) / std) for x, o, b in tokens]
        return sum(-torch.minimum(a * r, a * r.clamp(0.8, 1.2)) for r, a in ratios) / len(tokens)

    return loss


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_pp_second_implementation(seed: int) -> None:
    method = load_method("reinforce_pp", kl_coef=0.2, num_iterations=2)
    groups = random_groups(seed, own=2)
    logp, columns = random_numbers(method, groups, seed)
    batch = credited(method, groups, logp, **columns)
    ours = weights_of(method, batch, logp)
    loss, weights = gradient_of(reinforce_pp_paper(0.2), batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-8)
    assert ours.logged == pytest.approx(loss, abs=1e-8)


def test_remax_by_hand() -> None:
    """R - R_greedy = 3/4, gamma 1/2: 3/16 and 3/8 on two tokens; d = 1 and -2 at kl_coef 0.1 take off 0.1 and give 0.2."""
    method = load_method("remax", kl_coef=0.1, gamma=0.5)
    greedy = replace(answer("OO", 0.25), greedy=True)
    logp = torch.tensor([[-1.0, -3.0], [-1.0, -1.0]], dtype=F64)
    ref = torch.tensor([[-2.0, -1.0], [-5.0, -5.0]], dtype=F64)
    batch = credited(method, [group(answer("OO", 1.0), greedy)], logp, ref_logp=ref)
    found = weights_of(method, batch, logp)
    expected = torch.tensor([[3 / 16 - 0.1, 3 / 8 + 0.2], [0, 0]], dtype=F64)
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gamma": 0.5}, [3 / 16, 3 / 8]),
        ({"kl_coef": 0.1}, [3 / 4 - 0.1, 3 / 4 + 0.2]),  # d = 1 and -2
    ],
    ids=str,
)
def test_remax_with_a_discount_or_a_kl_alone(settings: dict[str, float], expected: list[float]) -> None:
    """R - R_greedy = 3/4. What is not asked for needs no column."""
    method = load_method("remax", **settings)
    groups = [group(answer("OO", 1.0), replace(answer("OO", 0.25), greedy=True))]
    logp = torch.tensor([[-1.0, -3.0], [-1.0, -1.0]], dtype=F64)
    ref = {"ref_logp": torch.tensor([[-2.0, -1.0], [-5.0, -5.0]], dtype=F64)} if "kl_coef" in settings else {}
    found = weights_of(method, credited(method, groups, logp, **ref), logp)
    torch.testing.assert_close(found.weights, torch.tensor([expected, [0, 0]], dtype=F64), rtol=0, atol=1e-7)
    assert bool(method.needs) == bool(method.columns) == bool(ref)


def test_a_column_of_ones_own_stands_beside_the_old_policy() -> None:
    assert load_method("reinforce_pp").needs == {"old_logp", "ref_logp", "kl_penalty"}
    assert load_method("reinforce_pp", kl_coef=0.0).needs == {"old_logp"}
    assert load_method("entropy_advantage").needs == {"old_logp", "sampled_entropy"}


def test_remax_without_them_is_the_papers() -> None:
    """(R - R_greedy) / 2 on every sampled token, also where a KL is asked for and the policy is its reference; off it, each token
    pays 0.3 d / 2 more."""
    groups = [group(answer("OOO", 1.0), answer("O", 0.0), replace(answer("O", 0.25), greedy=True))]
    plain, asked = load_method("remax", num_generations=2), load_method("remax", num_generations=2, kl_coef=0.3)
    logp, columns = random_numbers(plain, groups, 0)
    papers = torch.tensor([[3 / 8, 3 / 8, 3 / 8], [-1 / 8, 0, 0], [0, 0, 0]], dtype=F64)
    there = weights_of(asked, credited(asked, groups, logp, ref_logp=logp), logp).weights
    for found in (weights_of(plain, prepared(plain, groups), logp).weights, there):
        torch.testing.assert_close(found, papers, rtol=0, atol=1e-12)
    off = weights_of(asked, credited(asked, groups, logp, ref_logp=columns["ref_logp"]), logp).weights
    paid = torch.where(papers != 0, 0.3 * (logp - columns["ref_logp"]) / 2, 0)
    torch.testing.assert_close(off, papers - paid, rtol=0, atol=1e-7)  # a credit is in fp32


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("remax", {"kl_coef": -0.1}, "kl_coef must be 0"),
        ("remax", {"gamma": 0.0}, "gamma in"),
        ("reinforce_pp", {"kl_coef": -0.1}, "must be 0"),
        ("entropy_advantage", {"alpha": 0.0}, "alpha must be positive"),
        ("entropy_advantage", {"kappa": 1.0}, "kappa above 1"),
    ],
)
def test_what_is_out_of_range_is_an_error(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)


@pytest.mark.parametrize(("name", "settings"), [("remax", {"kl_coef": 0.05, "gamma": 0.99, "average": "tokens"})])
def test_settings_keep_the_contract(name: str, settings: dict[str, float]) -> None:
    check_method(load_method(name, **settings))


# --- entropy-shaped advantages ----------------------------------------------------------------------------------------


def shaped(method: Method, groups: list[Group], entropy: Tensor, **columns: Tensor) -> Batch:
    batch = prepared(load_method("grpo"), groups, sampled_entropy=entropy, **columns)
    return with_advantage(batch, method.advantage(batch))


def test_entropy_advantage_by_hand() -> None:
    """A = +-1/sqrt 2. alpha 0.4: an entropy of 0.5 adds 0.2; one of 2 would add 0.8 and adds half of |A|; 0 adds nothing."""
    method = load_method("entropy_advantage")
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    entropy = torch.tensor([[0.5, 2.0, 0.0], [0.5, 2.0, 0.0]], dtype=F64)
    batch = shaped(method, [group(answer("OOO", 1.0), answer("OOO", 0.0))], entropy)
    found = weights_of(method, batch, -torch.ones(2, 3, dtype=F64))
    expected = torch.tensor([[a + 0.2, 1.5 * a, a], [-a + 0.2, -a / 2, -a]], dtype=F64) / 6
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_entropy_advantage_second_implementation(seed: int) -> None:
    """arXiv:2506.14758 eq. 5 and 6 on GRPO with DAPO's bounds and token average."""
    method = load_method("entropy_advantage", alpha=0.3, kappa=1.5, num_iterations=2)
    groups = random_groups(seed, own=4)
    logp, columns = random_numbers(method, groups, seed)
    entropy = 2 * torch.rand(logp.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    batch = shaped(method, groups, entropy, old_logp=columns["old_logp"])
    leaf = logp.clone().requires_grad_()
    total, n = torch.zeros((), dtype=F64), 0
    for g in range(len(groups)):
        rows = torch.nonzero(batch.group == g).flatten().tolist()
        rewards = [float(batch.reward[r]) for r in rows]
        for r in rows:
            a = (float(batch.reward[r]) - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
            for t in range(int(batch.length[r]) - 1):
                b = a + min(0.3 * float(entropy[r, t]), abs(a) / 1.5)
                ratio = (leaf[r, t] - float(columns["old_logp"][r, t])).exp()
                total, n = total - torch.minimum(b * ratio, b * ratio.clamp(0.8, 1.28)), n + 1
    (gradient,) = torch.autograd.grad(total / n, leaf)
    found = outcome(method, batch, logp, torch.zeros_like(logp))
    torch.testing.assert_close(found.weights, -gradient, rtol=0, atol=1e-8)
    assert found.logged["rl"] == pytest.approx(float((total / n).detach()), abs=1e-8)


def test_entropy_advantage_without_entropy_is_grpo_over_tokens() -> None:
    groups = random_groups(1, own=4)
    ours, core = load_method("entropy_advantage", num_iterations=2), load_method("dapo", num_iterations=2)
    logp, columns = random_numbers(ours, groups, 1)
    old = {"old_logp": columns["old_logp"]}
    one = weights_of(ours, shaped(ours, groups, torch.zeros_like(logp), **old), logp)
    every = replace(core, select=ours.select)  # DAPO drops groups of equal rewards, which would count as tokens here
    other = weights_of(every, prepared(every, groups, **old), logp)
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("entropy_advantage", {}),
        ("reinforce_pp", {"num_generations": 8, "kl_coef": 0.01}),
        ("remax", {"num_generations": 8, "kl_coef": 0.05, "gamma": 0.99}),
    ],
)
def test_they_learn(name: str, settings: dict[str, float]) -> None:
    model = model_for()
    bandit = Bandit.reachable(model)
    assert max(bandit.success(model)) < 0.2
    learn(load_method(name, **settings), model, bandit, steps=50)
    assert min(bandit.success(model)) > 0.8
