"""REINFORCE, RLOO and RAFT: policy gradients without critic and ratio."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worked import Line, agrees, answer, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method

LN2 = math.log(2)
ROLLOUTS = [group(answer("OOO", 1.0), answer("O", 0.0))]
LOGP = -LN2 * torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])


def tensor(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_reinforce_by_hand() -> None:
    """Two completions with rewards 1 and 0: loss (1 + 2 + 3) ln 2 / 2 = 3 ln 2, weight 1/2 on the right one's tokens."""
    method = load_method("reinforce")
    found = weights_of(method, prepared(method, ROLLOUTS), LOGP)
    assert found.logged == pytest.approx(3 * LN2)
    assert torch.equal(found.weights, tensor([[0.5, 0.5, 0.5], [0, 0, 0]]))


def test_rloo_by_hand() -> None:
    """Each reward minus the other: A = 1 and -1. Loss (6 - 1) ln 2 / 2, weights +1/2 and -1/2."""
    method = load_method("rloo")
    found = weights_of(method, prepared(method, ROLLOUTS), LOGP)
    assert found.logged == pytest.approx(5 / 2 * LN2)
    assert torch.equal(found.weights, tensor([[0.5, 0.5, 0.5], [-0.5, 0, 0]]))


def test_raft_by_hand() -> None:
    """The wrong completion is thrown away; the right one's three tokens are imitated: 6/3 ln 2, weight 1/3."""
    method = load_method("raft")
    batch = prepared(method, ROLLOUTS)
    assert len(batch) == 1
    found = weights_of(method, batch, LOGP[:1])
    assert found.logged == pytest.approx(2 * LN2)
    torch.testing.assert_close(found.weights, tensor([[1 / 3, 1 / 3, 1 / 3]]))


def test_raft_pp_by_hand() -> None:
    """A = 1 and 0; ratios 1, 1.5 (clipped to 1.2, no gradient) and 0.5, over four tokens."""
    method = load_method("raft_pp")
    ratios = tensor([[1.0, 1.5, 0.5], [2.0, 1.0, 1.0]])
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - ratios.log()), LOGP)
    assert found.logged == pytest.approx(-(1 + 1.2 + 0.5) / 4)
    torch.testing.assert_close(found.weights, tensor([[1 / 4, 0, 1 / 8], [0, 0, 0]]))


def test_reinforce_rej_by_hand() -> None:
    """Rewards 1 and -1 stay as they are, over the four tokens of the group; a group of equal rewards is dropped."""
    method = load_method("reinforce_rej")
    mixed = group(answer("OOO", 1.0), answer("O", -1.0))
    batch = prepared(method, [mixed, group(answer("O", 1.0), answer("O", 1.0)), group(answer("O", -1.0), answer("O", -1.0))])
    assert len(batch) == 2
    found = weights_of(method, batch, LOGP)
    assert found.logged == pytest.approx((6 - 1) * LN2 / 4)
    torch.testing.assert_close(found.weights, tensor([[1 / 4, 1 / 4, 1 / 4], [-1 / 4, 0, 0]]))


def reinforce_paper(groups: list[list[Line]]) -> Tensor:
    """Williams 1992, averaged over completions."""
    lines = [line for g in groups for line in g]
    return sum(-line.reward * sum(line.logp) for line in lines) / len(lines)


def rloo_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2402.14740 eq. 8: the others' mean reward as baseline, log-prob of the whole completion."""
    total, n = torch.zeros(()), 0
    for g in groups:
        for i, line in enumerate(g):
            others = [other.reward for j, other in enumerate(g) if j != i]
            total = total - (line.reward - sum(others) / len(others)) * sum(line.logp)
            n += 1
    return total / n


def raft_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2504.11343: -log p of right completions, averaged over their tokens."""
    right = [logp for g in groups for line in g if line.reward > 0 for logp in line.logp]
    return -sum(right) / len(right)


def raft_pp_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2504.11343: PPO's clipped loss with max(R, 0) for an advantage, over all tokens."""
    lines = [line for g in groups for line in g]
    tokens = [((x - o).exp(), max(line.reward, 0.0)) for line in lines for x, o in zip(line.logp, line.old, strict=True)]
    return sum(-torch.minimum(a * r, a * r.clamp(0.8, 1.2)) for r, a in tokens) / len(tokens)


def reinforce_rej_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2504.11343: -R log p over the tokens of prompts whose rewards differ."""
    kept = [g for g in groups if len({line.reward for line in g}) > 1]
    tokens = [-line.reward * x for g in kept for line in g for x in line.logp]
    return sum(tokens) / len(tokens)


@pytest.mark.parametrize("seed", range(3))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, own=4)
    agrees(load_method("raft_pp"), raft_pp_paper, groups, seed)
    agrees(load_method("reinforce_rej"), reinforce_rej_paper, groups, seed)
    agrees(load_method("reinforce"), reinforce_paper, groups, seed)
    agrees(load_method("rloo"), rloo_paper, groups, seed)
    agrees(load_method("raft"), raft_paper, groups, seed)


def test_rloo_advantage_is_the_centred_reward_times_n_over_n_minus_1() -> None:
    rloo, dr_grpo = load_method("rloo"), load_method("dr_grpo")
    groups = random_groups(3, own=5)
    ours, centred = (prepared(m, groups).advantage for m in (rloo, dr_grpo))
    torch.testing.assert_close(ours, 5 / 4 * centred)


def test_raft_threshold_decides_what_is_right_and_a_group_without_any_is_dropped() -> None:
    groups = [group(answer("OO", 0.5), answer("O", 1.0)), group(answer("O", 0.5), answer("O", 0.0), name="b")]
    strict = load_method("raft", threshold=0.5)
    assert [t.reward for t in strict.select(groups[0], {}).trajectories] == [1.0]
    assert strict.select(groups[1], {}) is None


def test_raft_on_right_completions_alone_is_reinforce_up_to_the_denominator() -> None:
    """With reward 1, log-likelihood and policy gradient are one thing; only what they are divided by differs."""
    raft, reinforce = load_method("raft"), load_method("reinforce")
    groups = [group(answer("OOO", 1.0), answer("O", 1.0))]
    logp, batch = random_logps(raft, groups, 0)
    by_token = weights_of(raft, batch, logp).weights
    by_sequence = weights_of(reinforce, prepared(reinforce, groups), logp).weights
    torch.testing.assert_close(by_token * 4, by_sequence * 2)


def test_leaving_one_out_needs_two() -> None:
    with pytest.raises(UserError, match="at least 2"):
        load_method("rloo", num_generations=1)
