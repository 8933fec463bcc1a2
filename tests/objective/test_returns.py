"""Returns and the generalised advantage estimate, against the sums that define them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from crosstrain.objective.returns import (
    Estimator,
    gae,
    kl_penalty,
    own_tokens,
    returns_to_go,
    shaped_by_entropy,
    token_rewards,
    whitened_tokens,
)
from crosstrain.training.batching import to_batch
from crosstrain.types import Batch, Example, Group, Scores, Source, Trajectory

LETTERS = {"P": Source.PROMPT, "O": Source.POLICY, "T": Source.TOOL}


def batch_of(*rows: str) -> Batch:
    """Rows of one prompt token and what the letters say: O own, T tool, P a user's words."""
    sources = [tuple(LETTERS[x] for x in "P" + row) for row in rows]
    trajectories = tuple(Trajectory(tuple(range(len(s))), s, reward=float(i + 1)) for i, s in enumerate(sources))
    return to_batch([Group(Example("a", "", (0,)), trajectories)])


def noise(batch: Batch, seed: int) -> Tensor:
    return torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """sum over k of (gamma lam)^k d_{t+k}, every sum written out."""
    n = len(rewards)
    ahead = [*values[1:], 0.0]
    d = [rewards[t] + gamma * ahead[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * d[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_sum_that_defines_it_over_own_tokens(seed: int, gamma: float, lam: float) -> None:
    rng = random.Random(seed)
    batch = batch_of(*("".join(rng.choice("OOTP") for _ in range(rng.randint(2, 9))) + "O" for _ in range(4)), "TT")
    rewards, values = noise(batch, seed), noise(batch, seed + 10)
    found = gae(batch, rewards, values, gamma=gamma, lam=lam)
    own = own_tokens(batch)
    for r in range(len(batch)):
        expected = by_definition(rewards[r][own[r]].tolist(), values[r][own[r]].tolist(), gamma, lam)
        assert found[r][own[r]].tolist() == pytest.approx(expected, abs=1e-12)
    assert bool(torch.isnan(found[~own]).all())


def test_what_others_wrote_inside_a_response_is_as_if_it_were_not_there() -> None:
    plain, mixed = batch_of("OOO"), batch_of("OTTOPO")
    values = torch.tensor([[9.0, 0.5, 0.25, 1.0]])
    spread = torch.tensor([[9.0, 0.5, 7.0, -7.0, 0.25, float("nan"), 1.0]])
    one = gae(plain, token_rewards(plain), values, gamma=0.9, lam=0.8)
    other = gae(mixed, token_rewards(mixed), spread, gamma=0.9, lam=0.8)
    assert one[own_tokens(plain)].tolist() == other[own_tokens(mixed)].tolist()


def test_the_reward_is_on_the_last_own_token_and_every_token_pays() -> None:
    batch = batch_of("OTO", "O")
    penalty = torch.tensor([[9.0, 0.5, 9.0, 0.25], [9.0, 0.125, 9.0, 9.0]])
    found = token_rewards(batch, penalty=penalty)
    assert found[own_tokens(batch)].tolist() == [-0.5, 0.75, 1.875]
    assert token_rewards(batch, credit=torch.tensor([3.0, 4.0]))[own_tokens(batch)].tolist() == [0.0, 3.0, 4.0]


def test_returns_to_go_are_discounted_sums() -> None:
    batch = batch_of("OOO")
    found = returns_to_go(batch, torch.tensor([[9.0, 1.0, 2.0, 4.0]]), gamma=0.5)
    assert found[0, 1:].tolist() == [1 + 1 + 1, 2 + 2, 4]


def test_whitening_is_over_all_own_tokens_of_the_step() -> None:
    batch = batch_of("OOTO", "O", "TT")
    values = noise(batch, 0)
    own = own_tokens(batch)
    found = whitened_tokens(batch, values)
    assert float(found[own].mean()) == pytest.approx(0, abs=1e-12) and float(found[own].std()) == pytest.approx(1, abs=1e-6)
    kept = whitened_tokens(batch, values, shift_mean=False)
    assert float(kept[own].mean()) == pytest.approx(float(values[own].mean()))
    alone = batch_of("O")
    assert whitened_tokens(alone, torch.tensor([[9.0, 5.0]]))[0, 1] == 0


def test_two_tokens_are_whitened_by_hand() -> None:
    """1 and 3: mean 2, std sqrt(2), to which eps is added."""
    batch, values = batch_of("OO"), torch.tensor([[9.0, 1.0, 3.0]])
    expected = 1 / (2**0.5 + 0.5)
    assert whitened_tokens(batch, values, eps=0.5)[0, 1:].tolist() == pytest.approx([-expected, expected])
    shifted = whitened_tokens(batch, values, shift_mean=False, eps=0.5)
    assert shifted[0, 1:].tolist() == pytest.approx([2 - expected, 2 + expected])


@pytest.mark.parametrize("row", ["OTO", "TOT"])
def test_what_others_wrote_holds_nan_in_every_result(row: str) -> None:
    batch = batch_of(row)
    values = noise(batch, 0)
    for found in (token_rewards(batch, penalty=values), returns_to_go(batch, values), whitened_tokens(batch, values)):
        assert torch.isnan(found).tolist() == (~own_tokens(batch)).tolist()


def test_no_result_has_a_gradient() -> None:
    batch = batch_of("OTO")
    values = noise(batch, 0).requires_grad_()
    results = [
        token_rewards(batch, penalty=values),
        gae(batch, values, values, gamma=0.9, lam=0.8),
        whitened_tokens(batch, values),
    ]
    assert not any(found.requires_grad for found in results)


def never(batch: Batch, **asked: Any) -> Scores:
    raise AssertionError("the log-probs are known, and were computed again")


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 1.0), ("k2", 0.25)])
def test_a_kl_in_the_reward_by_hand(estimator: Estimator, expected: float) -> None:
    """log pi_old - log ref = -1 + 1.5 = 0.5, times a coefficient of 2: 2 0.5, and 2 0.5^2 / 2."""
    batch = batch_of("O").with_columns(old_logp=torch.full((1, 2), -1.0), ref_logp=torch.full((1, 2), -1.5))
    assert kl_penalty(never, batch, 2.0, estimator)[0, 1].item() == expected


def test_a_kl_in_the_reward_of_a_batch_that_is_used_once_is_of_the_current_policy() -> None:
    """log pi - log ref = -1.25 + 1.5 = 0.25, times 2."""

    def look(batch: Batch, **asked: Any) -> Scores:
        return Scores(torch.full(batch.tokens.shape, -1.25))

    assert kl_penalty(look, batch_of("O").with_columns(ref_logp=torch.full((1, 2), -1.5)), 2.0)[0, 1].item() == 0.5


def test_credit_shaped_by_entropy_by_hand() -> None:
    """A + min(H / 4, |A| / 2): 1 + 1/4, 1 + 1/2 at the bound, -1 + 1/2 at the bound, -4 + 1/4, 0."""
    advantage, entropy = torch.tensor([1.0, 1.0, -1.0, -4.0, 0.0]), torch.tensor([1.0, 8.0, 8.0, 1.0, 1.0])
    assert shaped_by_entropy(advantage, entropy, alpha=0.25, kappa=2.0).tolist() == [1.25, 1.5, -0.5, -3.75, 0.0]
