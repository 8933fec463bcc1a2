"""DPO: prefer the chosen answer to the rejected one, measured against a frozen reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method

LN2 = math.log(2)
PAIR = [group(answer("EEE", 1.0), answer("E", 0.0))]
LOGP = -LN2 * torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
REF = -LN2 * torch.tensor([[2.0, 2.0, 4.0], [2.0, 0.0, 0.0]])


def test_dpo_by_hand() -> None:
    """The chosen answer moved by 2 ln 2, the rejected one by ln 2: margin ln 2, sigmoid 2/3 at beta 1.

    Loss -ln(2/3) = ln 1.5; every chosen token weighs sigmoid(-ln 2) = 1/3, every rejected one -1/3.
    """
    method = load_method("dpo", beta=1.0)
    found = weights_of(method, prepared(method, PAIR, ref_logp=REF), LOGP)
    assert found.loss == found.logged == pytest.approx(math.log(1.5))
    torch.testing.assert_close(found.weights, torch.tensor([[1, 1, 1], [-1, 0, 0]], dtype=torch.float64) / 3)


def test_conservative_dpo_by_hand() -> None:
    """Smoothing 0.1: loss 0.9 ln 1.5 + 0.1 ln 3, weight 0.9/3 - 0.1 * 2/3 = 7/30."""
    method = load_method("dpo", beta=1.0, label_smoothing=0.1)
    found = weights_of(method, prepared(method, PAIR, ref_logp=REF), LOGP)
    assert found.loss == pytest.approx(0.9 * math.log(1.5) + 0.1 * math.log(3))
    torch.testing.assert_close(found.weights, torch.tensor([[7, 7, 7], [-7, 0, 0]], dtype=torch.float64) / 30)


def dpo_paper(beta: float, smoothing: float) -> Paper:
    """arXiv:2305.18290 eq. 7 with the smoothing of its section on noisy labels (conservative DPO)."""

    def loss(groups: list[list[Line]]) -> Tensor:
        losses = []
        for g in groups:
            chosen, rejected = sorted(g, key=lambda line: -line.reward)
            margin = beta * ((sum(chosen.logp) - sum(chosen.ref)) - (sum(rejected.logp) - sum(rejected.ref)))
            losses.append(-(1 - smoothing) * torch.sigmoid(margin).log() - smoothing * torch.sigmoid(-margin).log())
        return sum(losses) / len(losses)

    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_second_implementation(seed: int, smoothing: float) -> None:
    method = load_method("dpo", beta=0.3, label_smoothing=smoothing)
    agrees(method, dpo_paper(0.3, smoothing), random_groups(seed, pair=True), seed)


def test_published_weight_of_a_token() -> None:
    """+-beta sigmoid(-beta D) over the number of pairs, the same on every token of an answer."""
    method = load_method("dpo", beta=0.3)
    logp, batch = random_logps(method, random_groups(9, pair=True), 9)
    moved = torch.where(batch.trained[:, 1:], logp - batch.columns["ref_logp"][:, 1:], 0.0).sum(dim=1)
    margin = (moved[::2] - moved[1::2]).repeat_interleave(2)
    sign = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    expected = torch.where(batch.trained[:, 1:], (sign * 0.3 * torch.sigmoid(-0.3 * margin) / 4)[:, None], 0.0)
    torch.testing.assert_close(weights_of(method, batch, logp).weights, expected, rtol=0, atol=1e-12)


def test_at_the_reference_the_loss_is_ln_2_and_the_weight_half_of_beta() -> None:
    method = load_method("dpo", beta=0.1)
    found = weights_of(method, prepared(method, PAIR, ref_logp=LOGP), LOGP)
    assert found.loss == pytest.approx(LN2)
    torch.testing.assert_close(found.weights[0], torch.full((3,), 0.05, dtype=torch.float64))


def test_pairs_are_found_by_reward_whatever_their_order() -> None:
    method = load_method("dpo", beta=1.0)
    swapped = [group(PAIR[0].trajectories[1], PAIR[0].trajectories[0])]
    one = weights_of(method, prepared(method, PAIR, ref_logp=REF), LOGP)
    other = weights_of(method, prepared(method, swapped, ref_logp=REF.flip(0)), LOGP.flip(0))
    assert one.loss == pytest.approx(other.loss, rel=1e-15)
    torch.testing.assert_close(one.weights, other.weights.flip(0))


def test_a_pair_of_equal_labels_is_no_pair() -> None:
    method = load_method("dpo")
    batch = prepared(method, [*PAIR, group(answer("EEE", 1.0), answer("E", 1.0), name="tie")], ref_logp=REF.repeat(2, 1))
    found = weights_of(method, batch, LOGP.repeat(2, 1))
    alone = weights_of(method, prepared(method, PAIR, ref_logp=REF), LOGP)
    assert found.loss == alone.loss and float(found.weights[2:].abs().max()) == 0


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        load_method("dpo", **settings)
