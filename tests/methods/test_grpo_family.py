"""GRPO and its named settings Dr. GRPO and DAPO: clipped ratios, group advantages, three ways to average."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, selected, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.training.batching import to_batch
from crosstrain.types import Scores

LN2 = math.log(2)
ROLLOUTS = [group(answer("OOO", 1.0), answer("O", 0.0))]
A = 0.5 / (math.sqrt(0.5) + 1e-6)
"""Rewards 1 and 0: mean 1/2, std with n - 1 sqrt(1/2), so the advantages are +-0.7071."""
RATIOS = torch.tensor([[1.0, 1.5, 0.5], [1.1, 1.0, 1.0]], dtype=torch.float64)
LOGP = torch.full((2, 3), -1.0, dtype=torch.float64)


def tensor(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_grpo_by_hand() -> None:
    """Ratios 1, 1.5, 0.5 in the right answer (A = 0.7071), 1.1 in the wrong one (A = -0.7071).

    Right: 1.5 is clipped to 1.2 and its gradient stops. Loss -(1 + 1.2 + 0.5)/3 A, weights A/6 (1, 0, 0.5).
    Wrong: 1.1 is within the bounds. Loss +1.1 A, weight -1.1 A/2. Mean of the two: A (1.1 - 0.9)/2 = A/10.
    """
    method = load_method("grpo", beta=0.0)
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - RATIOS.log()), LOGP)
    assert found.logged == pytest.approx(A / 10)
    torch.testing.assert_close(found.weights, tensor([[A / 6, 0, A / 12], [-1.1 * A / 2, 0, 0]]))


def test_grpo_kl_by_hand() -> None:
    """pi = 2 ref on every token: k3 = 1/2 - 1 + ln 2, its weight -(1 - 1/2) = -1/2 before beta / (T N)."""
    method = load_method("grpo", beta=0.04)
    batch = prepared(method, ROLLOUTS, ref_logp=LOGP - LN2)
    found = weights_of(method, batch, LOGP)
    plain = weights_of(load_method("grpo", beta=0.0), batch, LOGP)
    assert found.logged - plain.logged == pytest.approx(0.04 * (LN2 - 1 / 2))
    expected = tensor([[-0.02 / 6, -0.02 / 6, -0.02 / 6], [-0.02 / 2, 0, 0]])
    torch.testing.assert_close(found.weights - plain.weights, expected)


def test_dr_grpo_by_hand() -> None:
    """A = +-1/2, nothing divided by the answer's own length: weights r A / (2 sequences x 10)."""
    method = load_method("dr_grpo", max_completion_length=10)
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - RATIOS.log()), LOGP)
    assert found.logged == pytest.approx((-0.5 * (1 + 1.2 + 0.5) + 0.5 * 1.1) / 20)
    torch.testing.assert_close(found.weights, tensor([[0.5 / 20, 0, 0.25 / 20], [-0.55 / 20, 0, 0]]))


def test_dapo_by_hand() -> None:
    """The upper bound is 1.28, all four tokens count alike: weights r A / 4, and a ratio of 1.25 stays open."""
    method = load_method("dapo")
    ratios = tensor([[1.0, 1.25, 1.5], [0.7, 1.0, 1.0]])
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - ratios.log()), LOGP)
    assert found.logged == pytest.approx((-(1 + 1.25 + 1.28) * A + 0.8 * A) / 4)
    torch.testing.assert_close(found.weights, tensor([[A / 4, 1.25 * A / 4, 0], [0, 0, 0]]))


def grpo_paper(*, beta: float, low: float, high: float, std: bool, average: str, limit: float = 1.0) -> Paper:
    """arXiv:2402.03300 eq. 3, as loops; `std`, `average`, `high` as in Dr. GRPO (2503.20783) and DAPO (2503.14476)."""

    def token(logp: Tensor, old: float, ref: float, advantage: float) -> Tensor:
        ratio = (logp - old).exp()
        clipped = min(max(float(ratio.detach()), 1 - low), 1 + high)
        surrogate = min(
            ratio * advantage, torch.tensor(clipped * advantage, dtype=torch.float64), key=lambda x: float(x.detach())
        )
        if beta == 0:
            return -surrogate
        away = ref - logp
        return -surrogate + beta * (away.exp() - away - 1)

    def loss(groups: list[list[Line]]) -> Tensor:
        sums, lengths = [], []
        for g in groups:
            rewards = [line.reward for line in g]
            scale = statistics.stdev(rewards) + 1e-6 if std else 1.0
            for line in g:
                advantage = (line.reward - statistics.fmean(rewards)) / scale
                refs = line.ref or [0.0] * len(line)
                sums.append(sum(token(*x, advantage) for x in zip(line.logp, line.old, refs, strict=True)))
                lengths.append(len(line))
        if average == "sequences":
            return sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
        return sum(sums) / (sum(lengths) if average == "tokens" else len(sums) * limit)

    return loss


@pytest.mark.parametrize("seed", range(3))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, own=4)
    grpo = grpo_paper(beta=0.04, low=0.2, high=0.2, std=True, average="sequences")
    dr_grpo = grpo_paper(beta=0.0, low=0.2, high=0.2, std=False, average="constant", limit=7.0)
    dapo = grpo_paper(beta=0.0, low=0.2, high=0.28, std=True, average="tokens")
    agrees(load_method("grpo", num_iterations=2), grpo, groups, seed)
    agrees(load_method("dr_grpo", max_completion_length=7, num_iterations=2), dr_grpo, groups, seed)
    agrees(load_method("dapo"), dapo, groups, seed)


def test_published_weight_of_a_token() -> None:
    """gate r A / (T N), with the KL's -beta (1 - ref / pi) / (T N) beside it."""
    method = load_method("grpo", beta=0.1)
    logp, batch = random_logps(method, random_groups(5, own=3), 5)
    ratio, towards = ((logp - batch.columns[n][:, 1:]).exp() for n in ("old_logp", "ref_logp"))
    advantage = batch.advantage[:, 1:]
    closed = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    lengths = batch.trained.sum(dim=1, keepdim=True)
    weight = (torch.where(closed, 0.0, ratio) * advantage - 0.1 * (1 - 1 / towards)) / (lengths * len(batch))
    expected = torch.where(batch.trained[:, 1:], weight, torch.zeros_like(weight))
    assert bool(closed[batch.trained[:, 1:]].any())
    torch.testing.assert_close(weights_of(method, batch, logp).weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_with_one_update_the_ratio_is_one_and_the_clip_inert(name: str) -> None:
    """Without old log-probs the weight is A over the denominator, whatever epsilon is."""
    groups = random_groups(1, own=4)
    narrow, wide = load_method(name, epsilon=1e-6), load_method(name, epsilon=0.9)
    logp = random_logps(load_method("reinforce"), selected(narrow, groups), 1)[0]
    batch = prepared(narrow, groups)
    batch = batch.with_columns(ref_logp=torch.zeros_like(batch.advantage))
    assert "old_logp" not in batch.columns
    found = weights_of(narrow, batch, logp).weights
    assert torch.equal(found, weights_of(wide, batch, logp).weights)
    if name == "dapo":
        live = batch.trained[:, 1:]
        torch.testing.assert_close(found[live], (batch.advantage[:, 1:] / live.sum())[live])


def test_a_wide_clip_is_no_clip() -> None:
    wide = load_method("grpo", beta=0.0, epsilon=0.999999, epsilon_high=1e9)
    logp, batch = random_logps(wide, random_groups(2, own=4), 2, spread=1.0)
    ratio = (logp - batch.columns["old_logp"][:, 1:]).exp()
    lengths = batch.trained.sum(dim=1, keepdim=True)
    expected = torch.where(batch.trained[:, 1:], ratio * batch.advantage[:, 1:] / lengths / len(batch), 0.0)
    torch.testing.assert_close(weights_of(wide, batch, logp).weights, expected)


def test_logged_min_form_and_trained_gate_have_one_gradient() -> None:
    """What is logged is PPO's min form, what is trained its gate on the ratio; both have the same gradient."""
    method = load_method("grpo", beta=0.0)
    logp, batch = random_logps(method, random_groups(6, own=6), 6)
    leaf = torch.nn.functional.pad(logp, (1, 0)).requires_grad_()
    term = method.terms[0]
    assert term.logged is not None
    mask = term.on(batch)
    clean = batch.with_columns(old_logp=torch.nan_to_num(batch.columns["old_logp"]))
    found = [torch.autograd.grad(f(Scores(leaf), clean, mask)[mask].sum(), leaf)[0] for f in (term.value, term.logged)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-15)
    assert float(found[0].abs().sum()) > 0


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"off_policy_correction": "truncate"}, [[2, 0.4, 1], [2, 0, 0]]),
        ({"off_policy_correction": "mask", "correction_cap": 5.0}, [[3, 0, 1], [2, 0, 0]]),
        ({"off_policy_correction": "sequence_mask", "correction_cap": 1.5}, [[1.2, 1.2, 1.2], [0, 0, 0]]),
    ],
    ids=lambda x: str(x.get("off_policy_correction")) if isinstance(x, dict) else "",
)
def test_corrections_of_the_samplers_probabilities_by_hand(settings: dict[str, object], factors: list[list[float]]) -> None:
    """w = old / sampler is 3, 0.4 and 1 in the right answer, 2 in the wrong one; their product is 1.2 and 2."""
    method = load_method("grpo", beta=0.0, **settings)
    w = tensor([[3.0, 0.4, 1.0], [2.0, 1.0, 1.0]])
    batch = prepared(method, ROLLOUTS, old_logp=LOGP, behaviour_logp=LOGP - w.log())
    found = weights_of(method, batch, LOGP)
    plain = weights_of(load_method("grpo", beta=0.0), batch, LOGP)
    torch.testing.assert_close(found.weights, plain.weights * tensor(factors))
    assert found.logged == pytest.approx(-float((plain.weights * tensor(factors)).sum()))
    once = prepared(method, ROLLOUTS, behaviour_logp=LOGP - w.log())
    torch.testing.assert_close(weights_of(method, once, LOGP).weights, found.weights)  # one update: old is the current policy


def test_a_correction_asks_for_what_the_sampler_said() -> None:
    plain, corrected = load_method("grpo", beta=0.0), load_method("grpo", beta=0.0, off_policy_correction="truncate")
    assert plain.needs == {"old_logp"} and corrected.needs == {"old_logp", "behaviour_logp"}


def test_dual_clip_bounds_a_wrong_answers_loss_by_hand() -> None:
    """The wrong answer's ratio is 4: its loss is 3 A in place of 4 A, and its gradient stops."""
    ratios = tensor([[1.0, 1.0, 1.0], [4.0, 1.0, 1.0]])
    outcomes = []
    for dual in (None, 3.0):
        method = load_method("grpo", beta=0.0, dual_clip=dual)
        outcomes.append(weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - ratios.log()), LOGP))
    assert [o.logged for o in outcomes] == pytest.approx([(-A + 4 * A) / 2, (-A + 3 * A) / 2])
    assert outcomes[0].weights[1, 0] == pytest.approx(-4 * A / 2) and outcomes[1].weights[1, 0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"off_policy_correction": "tis"}, "off_policy_correction: got 'tis'; allowed: none, truncate, mask, sequence_mask"),
        ({"off_policy_correction": "mask", "correction_cap": 0.2}, "correction_lowest: got 0.5; .* below correction_cap = 0.2"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0; it must be above .* 1.2"),
    ],
)
def test_corrections_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method("grpo", **settings)


def test_dr_grpo_advantage_is_grpos_times_the_std() -> None:
    groups = random_groups(4, own=5)
    scaled, plain = (prepared(load_method(n), groups) for n in ("grpo", "dr_grpo"))
    for g in range(len(groups)):
        rows = scaled.group == g
        std = scaled.reward[rows].std()
        torch.testing.assert_close(scaled.advantage[rows] * (std + 1e-6), plain.advantage[rows])


def test_a_group_of_one_keeps_its_raw_reward() -> None:
    method = load_method("grpo", num_generations=1)
    assert prepared(method, [group(answer("O", 0.7))]).advantage[0, 1] == pytest.approx(0.7)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "luffy", "rloo"])
def test_equal_rewards_teach_nothing(name: str, reward: float) -> None:
    """Not even rounding: seven times 0.1 must not become an advantage of 1e-8 / 1e-6."""
    method = load_method(name)
    batch = to_batch([group(*(answer("O", reward) for _ in range(7)))])
    assert batch.reward.dtype == torch.float32
    assert method.advantage(batch).tolist() == [0.0] * 7


def test_dynamic_sampling_drops_groups_whose_rewards_are_all_equal() -> None:
    same, mixed = group(answer("O", 1.0), answer("O", 1.0)), group(answer("O", 1.0), answer("O", 0.0), name="b")
    assert selected(load_method("dapo"), [same, mixed]) == [mixed]
    assert selected(load_method("grpo"), [same, mixed]) == [same, mixed]


def test_masked_truncations_are_not_trained_on_but_keep_their_reward_in_the_baseline() -> None:
    """Rewards 1, 0 and a truncated 0: the mean stays 1/3, the truncated answer's tokens get no weight."""
    method = load_method("dr_grpo", max_completion_length=1)
    groups = [group(answer("O", 1.0), answer("O", 0.0), answer("OO", 0.0, finished=False))]
    found = weights_of(method, prepared(method, groups, mask_truncated=True), torch.full((3, 2), -1.0))
    torch.testing.assert_close(found.weights, tensor([[2 / 3 / 2, 0], [-1 / 3 / 2, 0], [0, 0]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, "beta"),
        ({"average": "token"}, "allowed: sequences, tokens, constant"),
        ({"average": "constant"}, "needs it"),
        ({"max_completion_length": 5}, "no other average uses it"),
        ({"scale_rewards": "batch"}, "allowed: group, none"),
        ({"dynamic_sampling": 0}, "at least 1"),
        ({"epsilon": 1.5}, r"epsilon: got 1.5; it must be in \(0, 1\)"),
        ({"num_iterations": 0}, "at least 1"),
        ({"num_generations": 0}, "num_generations"),
        ({"epsilon_hi": 0.3}, "epsilon_high"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method("grpo", **settings)
