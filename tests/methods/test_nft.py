"""NFT: right answers up, wrong ones down through the policy that would have given only them."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, answer, gradient_of, group, prepared, random_groups, random_logps, selected, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.nft import solved
from crosstrain.types import Batch, Method

ROLLOUTS = [group(answer("OO", 1.0), answer("O", 0.0), answer("O", 0.0), answer("O", 0.0))]
LOGP = torch.full((4, 2), -1.0, dtype=torch.float64)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def known(batch: Batch) -> Batch:
    return batch.with_columns(solved=solved(lambda b: pytest.fail("nothing has to be scored"), batch))


def made(method: Method, ratios: list[list[float]]) -> Batch:
    return known(prepared(method, ROLLOUTS, old_logp=LOGP - of(ratios).log()))


def test_nft_by_hand() -> None:
    """A quarter is right, w = 3/4. Right: ratios 2 and 1, loss -3/4 ln 2, weights 3/4. Wrong: R = 1 gives 1, weight -3/4 x (1/4) /
    (3/4) = -1/4; R = 2 gives (1 - 1/2) / (3/4) = 2/3, floored to 1 with its gradient, -3/4 x (2/4) / (3/4) = -1/2; R = 1/2 gives
    (7/8) / (3/4) = 7/6, loss -3/4 ln 7/6 and weight -3/4 x (1/8) / (7/8) = -3/28."""
    method = load_method("nft", constant=2.0)
    found = weights_of(method, made(method, [[2, 1], [1, 1], [2, 1], [0.5, 1]]), LOGP)
    assert found.logged == pytest.approx((-0.75 * math.log(2) - 0.75 * math.log(7 / 6)) / 2)
    torch.testing.assert_close(found.weights, of([[3 / 8, 3 / 8], [-1 / 8, 0], [-1 / 4, 0], [-3 / 56, 0]]))


def test_without_its_negative_part_nft_is_rejection_sampling() -> None:
    method = load_method("nft", negative=0.0, weight="none", constant=1.0)
    found = weights_of(method, made(method, [[2, 1], [1, 1], [2, 1], [1, 1]]), LOGP)
    torch.testing.assert_close(found.weights, of([[1, 1], [0, 0], [0, 0], [0, 0]]))


def test_without_its_negative_part_nothing_is_said_of_wrong_answers() -> None:
    assert [t.name for t in load_method("nft", negative=0.0).terms] == ["right"]
    assert [t.name for t in load_method("nft").terms] == ["right", "wrong"]


def test_log_ratios_are_cut_at_10() -> None:
    """A right token that is e^12 times as likely as it was: loss -3/4 x 10, and no gradient. A wrong one, e^800 times: what is left
    stays at the floor."""
    method = load_method("nft", constant=1.0)
    moved = of([[12, 0], [800, 0], [0, 0], [0, 0]])
    found = weights_of(method, known(prepared(method, ROLLOUTS, old_logp=LOGP - moved)), LOGP)
    assert found.logged == pytest.approx(-7.5)
    torch.testing.assert_close(found.weights, of([[0, 3 / 4], [0, 0], [-1 / 4, 0], [-1 / 4, 0]]))


@pytest.mark.parametrize("weight", ["centred", "normalised"])
def test_at_ratio_1_it_has_the_direction_of_dr_grpo_or_grpo(weight: str) -> None:
    """Rewards 0 and 1: 1 - q and -q are Dr. GRPO's advantages; over sqrt(q (1 - q)), GRPO's with the std of n and not n - 1."""
    method = load_method("nft", weight=weight, constant=1.0)
    logp = LOGP
    found = weights_of(method, known(prepared(method, ROLLOUTS)), logp).weights
    share = 1 / 4
    scale = math.sqrt(share * (1 - share)) if weight == "normalised" else 1.0
    torch.testing.assert_close(found[:, 0], torch.tensor([1 - share, -share, -share, -share], dtype=torch.float64) / scale)


def paper(weight: str) -> Paper:
    """arXiv:2505.18116 eq. 10 and 11 with the floor's straight-through gradient, divided by 1000."""

    def loss(groups: list[list[Line]]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for g in groups:
            q = statistics.fmean(float(line.reward > 0) for line in g)
            w = {"centred": 1 - q, "normalised": math.sqrt((1 - q) / q), "none": 1.0}[weight]
            for line in g:
                for x, old in zip(line.logp, line.old, strict=True):
                    if line.reward > 0:
                        total = total - w * (x - old)
                        continue
                    rest = (1 - q * (x - old).exp()) / (1 - q)
                    total = total - w * (rest + max(1.0 - float(rest.detach()), 0.0)).log()
        return total / 1000

    return loss


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight", ["centred", "normalised", "none"])
def test_second_implementation(seed: int, weight: str) -> None:
    method = load_method("nft", weight=weight)
    groups = [g for g in selected(method, random_groups(seed, own=4)) if len({(t.reward or 0) > 0 for t in g.trajectories}) > 1]
    logp, batch = random_logps(load_method("grpo", beta=0.0), groups, seed)
    ours = weights_of(method, known(batch), logp)
    loss, weights = gradient_of(paper(weight), batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-12)
    assert ours.logged == pytest.approx(loss)


def test_shares_stay_away_from_0_and_1() -> None:
    method = load_method("nft")
    batch = prepared(method, [group(*(answer("O", 1.0) for _ in range(99)), answer("O", 0.0))])
    assert known(batch).columns["solved"].unique().tolist() == pytest.approx([0.98])


@pytest.mark.parametrize("settings", [{"negative": -1.0}, {"floor": 0.0}, {"constant": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="the others positive"):
        load_method("nft", **settings)
    with pytest.raises(UserError, match="allowed: centred, normalised, none"):
        load_method("nft", weight="std")
