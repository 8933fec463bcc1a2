"""What a method is at its limits: the core that a named setting is, and what is left where one part of an objective has no say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_hybrid_family import seven, srft_weights
from test_reward_model import on_values
from test_token_weights import from_prefixes, replace_first, seen
from torch import Tensor
from worked import answer, group, prepared, random_groups, random_logps, selected, weights_of

from crosstrain.methods import load_method
from crosstrain.training.batching import with_advantage
from crosstrain.types import Batch, Group, Method, Source

F64 = torch.float64
OPEN: dict[str, Any] = {"epsilon": 0.999999, "epsilon_high": 1e9}
"""Bounds that no ratio here reaches."""


def assert_same(one: Method, other: Method, batch: Batch, logp: Tensor, *, scale: float = 1.0) -> None:
    """The second method, its own advantage and all, weighs the batch as the first does, times `scale`."""
    again = with_advantage(batch, other.advantage(batch))
    found, expected = weights_of(one, batch, logp).weights, weights_of(other, again, logp).weights
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, scale * expected, rtol=0, atol=1e-8)  # rewards come in fp32


def mixed_groups(seed: int, own: int = 4) -> list[Group]:
    """Groups whose rewards differ."""
    return [g for g in random_groups(seed, own=own, n=6) if len({t.reward for t in g.trajectories}) > 1]


# --- named settings -----------------------------------------------------------------------------------------------------

NAMED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "dr_grpo",
        {"max_completion_length": 7},
        {"beta": 0.0, "scale_rewards": "none", "average": "constant", "max_completion_length": 7},
    ),
    ("dapo", {}, {"beta": 0.0, "epsilon_high": 0.28, "average": "tokens"}),
    ("drop_dead", {}, {"beta": 0.0}),
    ("srl", {}, {"beta": 0.0}),
    ("bread", {}, {"beta": 0.0}),
    ("sasr", {"beta": 0.1}, {"beta": 0.1}),
]


@pytest.mark.parametrize(("name", "settings", "of_grpo"), NAMED, ids=lambda x: x if isinstance(x, str) else "")
def test_on_groups_that_it_keeps_a_setting_of_grpo_is_grpo(
    name: str, settings: dict[str, Any], of_grpo: dict[str, Any]
) -> None:
    method, grpo = load_method(name, **settings), load_method("grpo", **of_grpo)
    groups = mixed_groups(2)
    assert selected(method, groups) == groups
    found = seen(grpo, groups, 2)
    once = {column: values for column, values in found.batch.columns.items() if column != "old_logp"}
    batch = replace(found.batch, columns=once) if name == "sasr" else found.batch  # which uses a batch once
    assert_same(method, grpo, batch, found.logp)


@pytest.mark.parametrize("name", ["raft_pp", "reinforce_rej"])
def test_with_one_update_on_right_and_wrong_answers_it_has_rafts_direction(name: str) -> None:
    """Rewards 1 and 0: only right answers have a weight, 1 over the tokens of all answers where RAFT has 1 over theirs."""
    method, raft = load_method(name), load_method("raft")
    groups = [group(answer("OO", 1.0), answer("OOO", 0.0)), group(answer("O", 1.0), answer("OO", 0.0), name="b")]
    batch, kept = prepared(method, groups), prepared(raft, groups)
    logp = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    found, expected = weights_of(method, batch, logp).weights, weights_of(raft, kept, logp[::2, :2]).weights
    torch.testing.assert_close(found[::2, :2], expected * 3 / 8, rtol=0, atol=1e-12)
    assert float(found[1::2].abs().max()) == 0


def test_against_a_greedy_answer_without_reward_remax_is_reinforce_on_the_sampled_answers() -> None:
    groups = random_groups(3, own=3)
    greedy = [replace_first(group(answer("OO", 0.0), *g.trajectories, name=g.example.id)) for g in groups]
    remax, core = load_method("remax", num_generations=3), load_method("reinforce")
    found = seen(remax, greedy, 3)
    sampled = torch.tensor([not t.greedy for g in greedy for t in g.trajectories])
    part = found.batch.rows(torch.nonzero(sampled).flatten())
    expected = weights_of(core, with_advantage(part, core.advantage(part)), found.logp[sampled]).weights
    ours = weights_of(remax, found.batch, found.logp).weights
    torch.testing.assert_close(ours[sampled], expected, rtol=0, atol=1e-12)
    assert float(ours[~sampled].abs().max()) == 0 < float(expected.abs().max())


def test_where_groups_have_a_mean_of_0_reinforce_pp_baseline_is_reinforce_pp() -> None:
    groups = [group(answer("OO", r), answer("O", -r), name=str(r)) for r in (1.0, 0.25, 2.0)]
    method, core = load_method("reinforce_pp_baseline"), load_method("reinforce_pp", kl_coef=0.0)
    found = seen(core, groups, 0)
    assert_same(method, core, found.batch, found.logp)


# --- without the clip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_with_nothing_held_back_it_is_an_unclipped_grpo_over_tokens(name: str) -> None:
    bounds = {"epsilon": 0.999999, "epsilon_high": 1.0} if name == "clip_cov" else OPEN
    method, grpo = load_method(name), load_method("grpo", beta=0.0, average="tokens", **bounds)
    found = seen(method, mixed_groups(1), 1)
    batch = found.batch.with_columns(covariant=torch.zeros_like(found.batch.columns["covariant"]))
    assert_same(method, grpo, batch, found.logp)


@pytest.mark.parametrize("name", ["rl_plus", "trapo", "replay"])
def test_without_demonstrations_it_is_an_unclipped_dr_grpo_over_tokens(name: str) -> None:
    method = load_method(name, num_iterations=2)
    grpo = load_method("grpo", beta=0.0, average="tokens", scale_rewards="none", **OPEN)
    found = seen(method, random_groups(1, own=4), 1)
    assert_same(method, grpo, found.batch, found.logp)


# --- hybrids ----------------------------------------------------------------------------------------------------------


def test_chord_at_its_ends_is_sft_or_grpo_over_tokens() -> None:
    groups = random_groups(4, own=4, demonstration=True)
    sft, grpo = load_method("sft"), load_method("grpo", beta=0.0, average="tokens", num_iterations=2)
    for mu, core, source in ((1.0, sft, Source.EXPERT), (0.0, grpo, Source.POLICY)):
        method = load_method("chord_mu", mu=mu, mu_valley=mu, num_iterations=2)
        found = seen(load_method("luffy"), groups, 4)
        batch = with_advantage(found.batch, method.advantage(found.batch))
        ours = weights_of(method, batch, found.logp).weights
        rows = (batch.source == int(source)).any(dim=1)
        part = batch.rows(torch.nonzero(rows).flatten())
        expected = weights_of(core, with_advantage(part, core.advantage(part)), found.logp[rows]).weights
        torch.testing.assert_close(ours[rows], expected, rtol=0, atol=1e-8)
        assert float(ours[~rows].abs().max()) == 0 < float(expected.abs().max())


def test_chord_phi_is_chord_mu_with_demonstrations_weighted_by_p_1_minus_p() -> None:
    phi, mu = (load_method(name, mu=0.4, num_iterations=2) for name in ("chord_phi", "chord_mu"))
    found = seen(phi, random_groups(4, own=4, demonstration=True), 4)
    ours, core = (weights_of(m, found.batch, found.logp).weights for m in (phi, mu))
    torch.testing.assert_close(ours, torch.where(found.expert, found.p * (1 - found.p) * core, core), rtol=0, atol=1e-10)


@pytest.mark.parametrize("solved", [0, 4, 7])
def test_hpt_soft_is_hpt_where_its_table_is_0_and_1(solved: int) -> None:
    """None solved: the demonstration alone, as HPT; four and more: the rollouts alone."""
    soft, hpt = load_method("hpt_soft"), load_method("hpt")
    whole = [seven(solved)]
    kept = selected(hpt, whole)
    demonstrated = solved == 0
    logp = torch.full((8, 2), -1.0, dtype=F64)
    rows = slice(0, 1) if demonstrated else slice(1, 8)
    expected = weights_of(hpt, prepared(hpt, kept), logp[rows, : 2 if demonstrated else 1]).weights
    found = weights_of(soft, prepared(soft, whole), logp).weights
    torch.testing.assert_close(found[rows, : expected.shape[1]], expected, rtol=0, atol=1e-12)
    assert float(found.abs().sum()) == pytest.approx(float(expected.abs().sum()))


@pytest.mark.parametrize("name", ["superrl", "hpt"])
def test_where_all_failed_it_is_sft_by_sequences(name: str) -> None:
    groups = [group(answer("E" * n, 1.0), answer("OO", 0.0), answer("O", 0.0), name=str(n)) for n in (1, 3, 4)]
    method, sft = load_method(name), load_method("sft", average="sequences")
    found = seen(method, groups, 0)
    assert_same(method, sft, found.batch, found.logp)


def test_srft_without_entropy_and_difference_is_half_of_sft_and_a_tenth_of_raft() -> None:
    """Rewards all 1: no group advantage; entropies 0: half on the demonstration, a tenth on own answers, each over its tokens."""
    groups = [group(answer("E" * n, 1.0), answer("O" * n, 1.0), answer("O", 1.0), name=str(n)) for n in (1, 3)]
    batch = prepared(load_method("srft"), groups)
    logp = -torch.rand(batch.tokens[:, 1:].shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = srft_weights(logp, torch.zeros_like(logp), groups)
    for source, core, share in ((Source.EXPERT, "sft", 0.5), (Source.POLICY, "raft", 0.1)):
        rows = torch.nonzero((batch.source == int(source)).any(dim=1)).flatten()
        part, method = batch.rows(rows), load_method(core)
        expected = weights_of(method, with_advantage(part, method.advantage(part)), logp[rows]).weights
        torch.testing.assert_close(found[rows], share * expected, rtol=0, atol=1e-8)


def test_uft_without_hints_is_grpo_over_tokens_and_its_hints_are_sft() -> None:
    method = load_method("uft", hint_coef=0.1, beta=0.2, num_iterations=2)
    grpo = load_method("grpo", beta=0.2, average="tokens", num_iterations=2)
    found = seen(grpo, random_groups(1, own=4), 1)
    assert_same(method, grpo, found.batch, found.logp)
    hinted, sft = seen(method, from_prefixes(0), 0), load_method("sft")
    ours, demo = (weights_of(m, hinted.batch, hinted.logp).weights for m in (method, sft))
    torch.testing.assert_close(ours[hinted.expert], 0.1 * demo[hinted.expert], rtol=0, atol=1e-8)


def test_prefix_rft_without_prefixes_is_dr_grpo() -> None:
    method = load_method("prefix_rft", max_completion_length=7)
    found = seen(method, random_groups(1, own=4), 1)
    assert_same(method, load_method("dr_grpo", max_completion_length=7), found.batch, found.logp)


def test_trapo_imitates_a_likely_prefix_as_sft_does_and_an_unlikely_one_as_dft_ten_times() -> None:
    groups = [group(answer("EEEO", 1.0), answer("O", 1.0))]  # equal rewards: nothing but the prefix has a weight
    method = load_method("trapo")
    for low, high, core, scale in ((0.2, 0.9, "sft", 1.0), (0.01, 0.09, "dft", 10.0)):
        p = low + (high - low) * torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
        batch = prepared(method, groups)
        batch = batch.with_columns(taught=method.columns["taught"](lambda b: pytest.fail("nothing has to be scored"), batch))
        other = load_method(core)
        expected = weights_of(other, with_advantage(batch, other.advantage(batch)), p.log()).weights
        torch.testing.assert_close(weights_of(method, batch, p.log()).weights * 5 / 3, scale * expected, rtol=0, atol=1e-12)


# --- preferences --------------------------------------------------------------------------------------------------------


def test_ipo_is_still_where_its_margin_is_reached_and_pulls_alike_on_either_side() -> None:
    """tau 1/4: the margin is 2. At 2 nothing; at 1 and 3 weights of +-2 on either side."""
    method = load_method("ipo", tau=0.25)
    pair = [group(answer("E", 1.0), answer("E", 0.0))]
    ref = torch.full((2, 1), -4.0, dtype=F64)
    for margin, weight in ((2.0, 0.0), (1.0, 2.0), (3.0, -2.0)):
        logp = ref + torch.tensor([[margin], [0.0]], dtype=F64)
        found = weights_of(method, prepared(method, pair, ref_logp=ref), logp).weights
        torch.testing.assert_close(found, torch.tensor([[weight], [-weight]], dtype=F64))


def test_ipo_is_dpos_direction_at_the_reference() -> None:
    """There DPO weighs beta / 2 and IPO 1 / tau, whatever the answers."""
    groups = random_groups(3, pair=True)
    ipo, dpo = load_method("ipo", tau=0.2), load_method("dpo", beta=0.1)
    logp, batch = random_logps(dpo, groups, 3)
    same = prepared(dpo, groups, ref_logp=logp)
    one, other = weights_of(ipo, same, logp), weights_of(dpo, same, logp)
    torch.testing.assert_close(one.weights / (1 / 0.2), other.weights / 0.05, rtol=0, atol=1e-12)
    assert not torch.equal(weights_of(ipo, batch, logp).weights, one.weights)


def test_dpo_nll_is_dpo_and_the_likelihood_of_better_answers() -> None:
    groups = random_groups(3, pair=True)
    both, dpo = load_method("dpo_nll", beta=0.3, nll_coef=0.7), load_method("dpo", beta=0.3)
    sft = load_method("sft", average="sequences")
    logp, batch = random_logps(dpo, groups, 3)
    better = batch.rows(torch.arange(0, len(batch), 2))
    likelihood = torch.zeros_like(logp)
    likelihood[::2] = weights_of(sft, with_advantage(better, sft.advantage(better)), logp[::2]).weights
    expected = weights_of(dpo, batch, logp).weights + 0.7 * likelihood
    torch.testing.assert_close(weights_of(both, batch, logp).weights, expected, rtol=0, atol=1e-7)  # a mean's weight is in fp32


def test_simpo_without_margin_is_cpo_on_answers_of_one_length() -> None:
    """Means of three tokens at beta are sums at beta / 3."""
    pairs = [group(answer("EEE", 1.0), answer("EEE", 0.0), name=str(i)) for i in range(3)]
    simpo, cpo = load_method("simpo", beta=1.5, gamma=0.0), load_method("cpo", beta=0.5, nll_coef=0.0)
    found = seen(simpo, pairs, 0)
    assert_same(simpo, cpo, found.batch, found.logp)


def test_orpo_with_a_faint_odds_ratio_is_sft_of_better_answers() -> None:
    orpo, sft = load_method("orpo", beta=1e-12), load_method("sft", average="sequences")
    found = seen(orpo, random_groups(3, pair=True), 3)
    better = found.batch.rows(torch.arange(0, found.rows, 2))
    expected = weights_of(sft, with_advantage(better, sft.advantage(better)), found.logp[::2]).weights
    ours = weights_of(orpo, found.batch, found.logp).weights
    torch.testing.assert_close(ours[::2], expected, rtol=0, atol=1e-7)  # a mean's weight is in fp32
    assert float(ours[1::2].abs().max()) < 1e-10


def test_a_reward_model_sees_differences_alone_unless_it_is_centred() -> None:
    """Adding 5 to both rewards of a pair changes nothing; equal rewards cost ln 2 and pull with 1/2 on either side; a centring
    coefficient is what says where 0 is."""
    plain, centring = load_method("reward_model"), load_method("reward_model", center_rewards_coefficient=0.01)
    here, there = ([[0.0, 0, 2.0 + c], [0, 1.0 + c, 0]] for c in (0.0, 5.0))
    one, other = (on_values(plain, values, 1.0, 0.0) for values in (here, there))
    assert one.loss == pytest.approx(other.loss) and torch.allclose(one.value_weights, other.value_weights)
    assert on_values(centring, there, 1.0, 0.0).loss > on_values(centring, here, 1.0, 0.0).loss + 1
    equal = on_values(plain, [[0.0, 0, 3.0], [0, 3.0, 0]], 1.0, 0.0)
    assert equal.loss == pytest.approx(math.log(2))
    torch.testing.assert_close(equal.value_weights, torch.tensor([[0, 0, 0.5], [0, -0.5, 0]], dtype=F64))
