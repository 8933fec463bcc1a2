"""REINFORCE, RLOO and RAFT: policy gradients without critic and ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, selected, weights_of

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


def test_over_all_tokens_raft_and_reinforce_rej_by_hand() -> None:
    """The authors' code: four tokens of the group of unequal rewards and two of one that is always right count, not four alone."""
    mixed, solved = group(answer("OOO", 1.0), answer("O", -1.0)), group(answer("O", 1.0), answer("O", 1.0), name="b")
    logp = torch.cat([LOGP, LOGP[1:], LOGP[1:]])
    for name, expected, loss in (
        ("raft", [[1 / 6] * 3, [0, 0, 0], [1 / 6, 0, 0], [1 / 6, 0, 0]], (6 + 1 + 1) * LN2 / 6),
        ("reinforce_rej", [[1 / 6] * 3, [-1 / 6, 0, 0], [0, 0, 0], [0, 0, 0]], (6 - 1) * LN2 / 6),
    ):
        method = load_method(name, average="all")
        batch = prepared(method, [mixed, solved])
        found = weights_of(method, batch, logp)
        assert len(batch) == 4 and found.logged == pytest.approx(loss)
        torch.testing.assert_close(found.weights, tensor(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["raft", "reinforce_rej"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_averaged_over_changes_the_size_of_a_step_and_not_its_direction(name: str, seed: int) -> None:
    groups = [*random_groups(seed, own=4), group(answer("OO", 0.0), answer("O", 0.0), name="wrong")]
    over_all, over_kept = load_method(name, average="all"), load_method(name)
    logp, batch = random_logps(over_all, groups, seed)
    remaining = selected(over_kept, groups)
    stays = {id(t) for g in remaining for t in g.trajectories}
    rows = [id(t) in stays for g in groups for t in g.trajectories]
    assert 0 < sum(rows) < len(rows)
    found = weights_of(over_all, batch, logp).weights
    kept = prepared(over_kept, groups)
    expected = weights_of(over_kept, kept, logp[rows][:, : kept.tokens.shape[1] - 1]).weights
    assert float(found[[not row for row in rows]].abs().max()) == 0
    tokens = [sum(len(t.response) for g in gs for t in g.trajectories) for gs in (remaining, groups)]
    torch.testing.assert_close(found[rows][:, : expected.shape[1]], expected * tokens[0] / tokens[1], rtol=0, atol=1e-12)


def test_raft_over_all_tokens_is_raft_pp_with_one_update_and_rewards_of_1_and_0() -> None:
    groups = [group(answer("OO", 1.0), answer("OOO", 0.0)), group(answer("O", 0.0), answer("OO", 0.0), name="b")]
    methods = (load_method("raft", average="all"), load_method("raft_pp", minibatches=1))
    logp, _ = random_logps(methods[0], groups, 0)
    found, expected = (weights_of(m, prepared(m, groups), logp).weights for m in methods)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_remax_by_hand() -> None:
    """The greedy answer got 0.25: A is 0.75 and -0.25 over two completions; it is not trained on itself."""
    method = load_method("remax", num_generations=2)
    greedy = replace(answer("OO", 0.25), greedy=True)
    batch = prepared(method, [group(answer("OOO", 1.0), answer("O", 0.0), greedy)])
    logp = torch.cat([LOGP, LOGP[:1]])
    found = weights_of(method, batch, logp)
    assert found.logged == pytest.approx((0.75 * 6 - 0.25) * LN2 / 2)
    torch.testing.assert_close(found.weights, tensor([[0.375] * 3, [-0.125, 0, 0], [0, 0, 0]]))
    by_token = load_method("remax", average="tokens")
    torch.testing.assert_close(weights_of(by_token, batch, logp).weights, found.weights * 2 / 4)
    assert [(r.n, r.greedy) for r in method.plan.next(group(), {})] == [(2, False), (1, True)]
    assert selected(method, [group(answer("O", 1.0)), group(greedy)]) == [], "no baseline, or nothing to compare with it"


def test_reinforce_pp_by_hand() -> None:
    """Rewards 1 on three tokens and 0 on one: mean 3/4, variance (3/16 x 1 + 9/16) / 3 = 1/4, so A is 1/2 and -3/2."""
    method = load_method("reinforce_pp", kl_coef=0.0, num_iterations=2)
    ratios = tensor([[1.0, 1.5, 0.5], [1.0, 1.0, 1.0]])
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - ratios.log()), LOGP)
    torch.testing.assert_close(found.weights, tensor([[1 / 8, 0, 1 / 16], [-3 / 8, 0, 0]]), rtol=0, atol=1e-7)


def test_reinforce_pp_baseline_centres_each_group_first() -> None:
    """One group's rewards are 1 and 0, the other's 10 and 9: after centring both are +-1/2, and the std over four tokens
    sqrt(1/3)."""
    method = load_method("reinforce_pp_baseline")
    groups = [group(answer("O", a), answer("O", b), name=str(a)) for a, b in ((1.0, 0.0), (10.0, 9.0))]
    a = 0.5 / math.sqrt(1 / 3)
    expected = torch.tensor([a, -a, a, -a], dtype=torch.float64)
    batch = prepared(method, groups)
    torch.testing.assert_close(batch.advantage[:, 1], expected, rtol=0, atol=1e-7)
    found = weights_of(method, batch, torch.full((4, 1), -1.0))
    torch.testing.assert_close(found.weights[:, 0], expected / 4, rtol=0, atol=1e-7)


def test_the_kl_of_reinforce_pp_baseline_by_hand() -> None:
    """Equal rewards, so A is 0. d = 1 and -2 over two tokens at beta 1/2: loss (1/2 + 2) / 4, weights -beta d / 2."""
    method = load_method("reinforce_pp_baseline", beta=0.5)
    logp = tensor([[-1.0], [-1.0]])
    batch = prepared(method, [group(answer("O", 1.0), answer("O", 1.0))], ref_logp=logp - tensor([[1.0], [-2.0]]))
    found = weights_of(method, batch, logp)
    assert found.logged == pytest.approx(2.5 / 4)
    torch.testing.assert_close(found.weights, tensor([[-0.25], [0.5]]))


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


def reinforce_pp_paper(centre: bool) -> Paper:
    """arXiv:2501.03262 eq. 7 and 10: PPO's clipped loss with advantages normalised over all tokens of the step."""

    def loss(groups: list[list[Line]]) -> Tensor:
        tokens: list[tuple[Tensor, float, float]] = []
        for g in groups:
            mean = statistics.fmean(line.reward for line in g) if centre else 0.0
            tokens += [(x, o, line.reward - mean) for line in g for x, o in zip(line.logp, line.old, strict=True)]
        values = [b for _, _, b in tokens]
        mean, std = statistics.fmean(values), statistics.stdev(values) + 1e-8
        losses = []
        for x, o, b in tokens:
            r, a = (x - o).exp(), (b - mean) / std
            losses.append(-torch.minimum(a * r, a * r.clamp(0.8, 1.2)))
        return sum(losses) / len(losses)

    return loss


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


def over_all_paper(kept: Callable[[list[Line], Line], float]) -> Paper:
    """RLHFlow/Minimal-RL as a fork has it, `compute_raft_outcome_advantage` and `compute_reinforce_rej_outcome_advantage` under a
    mean over all tokens: -A log p."""

    def loss(groups: list[list[Line]]) -> Tensor:
        tokens = [-kept(g, line) * x for g in groups for line in g for x in line.logp]
        return sum(tokens) / len(tokens)

    return loss


@pytest.mark.parametrize("seed", range(3))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, own=4)
    agrees(load_method("raft_pp"), raft_pp_paper, groups, seed)
    agrees(load_method("reinforce_pp", kl_coef=0.0, num_iterations=2), reinforce_pp_paper(centre=False), groups, seed)
    agrees(load_method("reinforce_pp_baseline", num_iterations=2), reinforce_pp_paper(centre=True), groups, seed)
    agrees(load_method("reinforce_rej"), reinforce_rej_paper, groups, seed)
    agrees(load_method("reinforce"), reinforce_paper, groups, seed)
    agrees(load_method("raft", average="all"), over_all_paper(lambda g, line: float(line.reward > 0)), groups, seed)
    differs = over_all_paper(lambda g, line: line.reward if len({other.reward for other in g}) > 1 else 0.0)
    agrees(load_method("reinforce_rej", average="all"), differs, groups, seed)
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
