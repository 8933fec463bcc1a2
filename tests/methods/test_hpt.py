"""HPT: imitate the demonstration where the group failed, reinforce the rollouts where it did not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worked import Line, agrees, answer, group, prepared, random_groups, random_logps, selected, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.types import Source

LN2 = math.log(2)
FAILED = group(answer("EEE", 1.0), answer("O", 0.0), answer("O", 0.0), name="failed")
MIXED = group(answer("E", 1.0), answer("OOO", 1.0), answer("O", 0.0), name="mixed")


def test_hpt_by_hand() -> None:
    """Kept are the failed group's demonstration and the mixed group's two rollouts, each token p = 1/2, 1/4, 1/8 or 1/2.

    Demonstration: (1 + 2 + 3)/3 ln 2 = 2 ln 2, weight 1/3 per token. Rollouts, A = +-1/2 over 4 tokens: (6/2 - 1/2)/4 ln 2
    = 5/8 ln 2, weights +-1/8. Both are halved, for two groups: 21/16 ln 2, weights 1/6 and +-1/16.
    """
    method = load_method("hpt")
    logp = -LN2 * torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
    found = weights_of(method, prepared(method, [FAILED, MIXED]), logp)
    assert found.logged == pytest.approx(21 / 16 * LN2)
    expected = torch.tensor([[1 / 6] * 3, [1 / 16] * 3, [-1 / 16, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found.weights, expected)


def test_how_much_imitation_counts_is_a_setting() -> None:
    """The failed group alone: a quarter of 2 ln 2, and of 1/3 per token."""
    method = load_method("hpt", sft_coef=0.25)
    found = weights_of(method, prepared(method, [FAILED]), -LN2 * torch.tensor([[1.0, 2.0, 3.0]]))
    assert found.logged == pytest.approx(LN2 / 2)
    torch.testing.assert_close(found.weights, torch.full((1, 3), 1 / 12, dtype=torch.float64))


def test_demonstrations_of_one_prompt_are_averaged_over_their_tokens() -> None:
    """Three tokens and one: 1/4 each."""
    method = load_method("hpt")
    failed = group(answer("EEE", 1.0), answer("E", 1.0), answer("O", 0.0), answer("O", 0.0))
    found = weights_of(method, prepared(method, [failed]), torch.full((2, 3), -1.0))
    torch.testing.assert_close(found.weights, torch.tensor([[1 / 4] * 3, [1 / 4, 0, 0]], dtype=torch.float64))


def hpt_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2509.04419: a demonstration where the gate fired, Dr. GRPO's advantage elsewhere; each group counts once."""
    losses = []
    for g in groups:
        if any(line.expert for line in g):
            (demonstration,) = g
            losses.append(-sum(demonstration.logp) / len(demonstration))
        else:
            mean = sum(line.reward for line in g) / len(g)
            tokens = sum(len(line) for line in g)
            losses.append(sum(-(line.reward - mean) * logp for line in g for logp in line.logp) / tokens)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gate", [0, 2])
def test_second_implementation(seed: int, gate: int) -> None:
    groups = [*random_groups(seed, own=4, demonstration=True), FAILED]
    agrees(load_method("hpt", gate=gate), hpt_paper, groups, seed)


def test_all_failed_is_sft_with_sequence_mean() -> None:
    hpt, sft = load_method("hpt"), load_method("sft", average="sequences")
    groups = [FAILED, group(answer("E", 1.0), answer("OO", 0.0), name="b")]
    logp, batch = random_logps(hpt, groups, 0)
    demonstrations = [g.only(Source.EXPERT) for g in groups]
    expected = weights_of(sft, prepared(sft, demonstrations), logp)
    found = weights_of(hpt, batch, logp)
    torch.testing.assert_close(found.weights, expected.weights)
    assert found.loss == pytest.approx(expected.loss)


def test_all_solved_and_mixed_is_reinforcement_learning_alone() -> None:
    method = load_method("hpt")
    kept = selected(method, [MIXED, group(answer("E", 1.0), answer("O", 1.0), answer("O", 1.0), name="solved")])
    assert [[t.wrote(Source.POLICY) for t in g.trajectories] for g in kept] == [[True, True], [True, True]]
    batch = prepared(method, kept)
    found = weights_of(method, batch, torch.full((4, 3), -1.0))
    assert float(found.weights[2:].abs().max()) == 0, "an all-solved group has nothing to compare"
    assert float(found.weights[:2].abs().min(dim=1).values.max()) > 0


def test_a_gate_of_two_discards_two_solved_rollouts_for_the_demonstration() -> None:
    g = group(answer("E", 1.0), *(answer("O", float(i < 2)) for i in range(8)))
    assert selected(load_method("hpt", gate=2), [g])[0].trajectories == g.trajectories[:1]
    assert len(selected(load_method("hpt", gate=1), [g])[0].trajectories) == 8


def test_what_counts_as_solved_is_a_setting() -> None:
    g = group(answer("E", 1.0), answer("O", 0.1), answer("O", 0.0))
    assert selected(load_method("hpt", num_generations=2), [g])[0].by(Source.POLICY)
    assert not selected(load_method("hpt", num_generations=2, solved_above=0.5), [g])[0].by(Source.POLICY)


def test_the_sft_share_follows_the_failed_groups_and_not_the_length_of_answers() -> None:
    method = load_method("hpt")

    def share(demonstration: str) -> float:
        failed = group(answer(demonstration, 1.0), answer("O", 0.0), name="failed")
        batch = prepared(method, [failed, MIXED])
        weights = weights_of(method, batch, torch.full(batch.tokens[:, 1:].shape, -1.0)).weights.abs()
        return float(weights[0].sum() / weights.sum())

    assert share("E") == pytest.approx(share("EEEEEEEE"))


@pytest.mark.parametrize("settings", [{"gate": 8}, {"gate": -1}, {"sft_coef": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        load_method("hpt", **settings)
