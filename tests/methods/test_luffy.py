"""LUFFY: own rollouts and one demonstration in the same group, the demonstration's probability shaped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method

GROUP = [group(answer("EE", 1.0), answer("O", 0.0), answer("O", 0.0))]
LOGP = torch.tensor([[0.1, 0.9], [0.5, 1.0], [0.5, 1.0]], dtype=torch.float64).log()
"""The demonstration's tokens have probabilities 0.1 and 0.9."""


def tensor(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_luffy_by_hand() -> None:
    """Rewards 1, 0, 0: A = 2/3 for the demonstration, -1/3 for the rollouts; four tokens in all.

    Demonstration: p / (p + 0.1) is 1/2 and 9/10, its slope times p is 1/4 and 9/100, so it weighs 2/3 * (1/4, 9/100) / 4.
    Rollouts weigh -1/3 / 4. Logged loss (-2/3 (1/2 + 9/10) + 1/3 + 1/3) / 4 = -1/15.
    """
    method = load_method("luffy")
    found = weights_of(method, prepared(method, GROUP), LOGP)
    assert found.logged == pytest.approx(-1 / 15)
    torch.testing.assert_close(found.weights, tensor([[1 / 24, 0.015], [-1 / 12, 0], [-1 / 12, 0]]))


def test_the_rollouts_baseline_by_hand() -> None:
    """Mean over rollouts only: the demonstration's advantage is 1 and failed rollouts are left alone."""
    method = load_method("luffy", baseline="rollouts")
    found = weights_of(method, prepared(method, GROUP), LOGP)
    torch.testing.assert_close(found.weights, tensor([[1 / 16, 0.09 / 4], [0, 0], [0, 0]]))


def luffy_paper(baseline: str, gamma: float) -> Paper:
    """arXiv:2504.14945 eqs. 7 and 9, without std and clip, over all tokens."""

    def loss(groups: list[list[Line]]) -> Tensor:
        total, tokens = torch.zeros(()), 0
        for g in groups:
            rewards = [line.reward for line in g if baseline == "group" or not line.expert]
            for line in g:
                advantage = line.reward - sum(rewards) / len(rewards)
                for logp, old in zip(line.logp, line.old, strict=True):
                    p = logp.exp()
                    total = total - advantage * (p / (p + gamma) if line.expert else p / math.exp(old))
                    tokens += 1
        return total / tokens

    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("baseline", ["group", "rollouts"])
def test_second_implementation(seed: int, baseline: str) -> None:
    method = load_method("luffy", baseline=baseline, gamma=0.2, num_iterations=2)
    agrees(method, luffy_paper(baseline, 0.2), random_groups(seed, own=3, demonstration=True), seed)


def test_published_weight_of_an_expert_token_peaks_at_gamma() -> None:
    """A gamma p / (p + gamma)^2: a quarter of A at p = gamma, less on either side."""
    method = load_method("luffy", gamma=0.1)
    p = torch.tensor([0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.99], dtype=torch.float64)
    batch = prepared(method, [group(answer("E" * len(p), 1.0), answer("O", 0.0))])
    logp = torch.zeros(2, len(p), dtype=torch.float64)
    logp[0] = p.log()
    weights = weights_of(method, batch, logp).weights[0] * int(batch.trained.sum())
    torch.testing.assert_close(weights, 0.5 * 0.1 * p / (p + 0.1) ** 2)
    assert float(p[weights.argmax()]) == 0.1 and float(weights.max()) == pytest.approx(0.5 / 4)


def test_without_a_demonstration_it_is_dr_grpos_advantage_under_a_token_mean() -> None:
    method = load_method("luffy", num_iterations=2)
    logp, batch = random_logps(method, random_groups(1, own=4), 1)
    unclipped = load_method(
        "grpo", beta=0.0, scale_rewards="none", average="tokens", epsilon=0.999999, epsilon_high=1e9, num_iterations=2
    )
    torch.testing.assert_close(weights_of(method, batch, logp).weights, weights_of(unclipped, batch, logp).weights)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="allowed: group, rollouts"):
        load_method("luffy", baseline="repository")
    with pytest.raises(UserError, match="gamma"):
        load_method("luffy", gamma=0.0)
