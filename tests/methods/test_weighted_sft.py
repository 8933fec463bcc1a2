"""PSFT and iw-SFT: demonstrations within a trust region, or weighted by how far the policy came."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method

LN2 = math.log(2)
DEMONSTRATIONS = [group(answer("EE"), name="long"), group(answer("E"), name="short")]
LOGP = torch.full((2, 2), -1.0, dtype=torch.float64)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_psft_by_hand() -> None:
    """Ratios 1.5 (past 1.28: no gradient), 0.5 (the lower bound never acts) and 1: loss -(1.28 + 0.5 + 1) / 3."""
    method = load_method("psft")
    ratios = of([[1.5, 0.5], [1.0, 1.0]])
    found = weights_of(method, prepared(method, DEMONSTRATIONS, old_logp=LOGP - ratios.log()), LOGP)
    assert found.logged == pytest.approx(-2.78 / 3)
    torch.testing.assert_close(found.weights, of([[0, 0.5 / 3], [1 / 3, 0]]))


def test_psft_with_one_update_is_sft() -> None:
    psft, sft = load_method("psft", minibatches=1), load_method("sft")
    one, other = (weights_of(m, prepared(m, DEMONSTRATIONS), LOGP).weights for m in (psft, sft))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[4, 4], [2, 0]]),
        ({"weight": "mean"}, [[2, 2], [2, 0]]),
        ({"temperature": 2.0}, [[16, 16], [4, 0]]),
        ({"highest": 3.0}, [[3, 3], [2, 0]]),
        ({"weight": "token"}, [[1.8, 1.8], [1.8, 0]]),
        ({"weight": "token", "temperature": 0.5}, [[math.sqrt(2), math.sqrt(2)], [math.sqrt(2), 0]]),
    ],
)
def test_iw_sft_by_hand(settings: dict[str, object], expected: list[list[float]]) -> None:
    """Every token is twice as likely as at the start: ratios of 4 and 2 for the demonstrations, mean ratios of 2."""
    method = load_method("iw_sft", **settings)
    found = weights_of(method, prepared(method, DEMONSTRATIONS, ref_logp=LOGP - LN2), LOGP)
    torch.testing.assert_close(found.weights, of(expected) / 3)
    assert found.logged == pytest.approx(sum(map(sum, expected)) / 3)  # -w log pi with log pi = -1


def test_an_own_answer_beside_a_demonstration_gets_nothing() -> None:
    method = load_method("iw_sft", weight="mean")
    found = weights_of(method, prepared(method, [group(answer("EE"), answer("O"))], ref_logp=LOGP - LN2), LOGP)
    torch.testing.assert_close(found.weights, of([[1, 1], [0, 0]]))


@pytest.mark.parametrize(("weight", "bounds"), [("token", "from 0.2 to 1.8"), ("mean", "at most 16")])
def test_iw_sfts_bounds_are_named(weight: str, bounds: str) -> None:
    assert f") {bounds}, d = log pi - log ref" in load_method("iw_sft", weight=weight).terms[0].slots["denominator"]


def test_iw_sft_starts_as_sft() -> None:
    iw, sft = load_method("iw_sft"), load_method("sft")
    one = weights_of(iw, prepared(iw, DEMONSTRATIONS, ref_logp=LOGP), LOGP)
    other = weights_of(sft, prepared(sft, DEMONSTRATIONS), LOGP)
    torch.testing.assert_close(one.weights, other.weights)
    assert one.logged == pytest.approx(other.logged)


def psft_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2508.17784 eq. 6, averaged over tokens."""
    tokens = [(x - o).exp() for g in groups for line in g for x, o in zip(line.logp, line.old, strict=True)]
    return -sum(torch.minimum(r, r.clamp(0.8, 1.28)) for r in tokens) / len(tokens)


def iw_sft_paper(kind: str) -> Paper:
    """arXiv:2507.12856: the log-likelihood of a demonstration times its detached weight."""

    def loss(groups: list[list[Line]]) -> Tensor:
        total, n = torch.zeros((), dtype=torch.float64), 0
        for line in (line for g in groups for line in g):
            d = [float(x.detach()) - r for x, r in zip(line.logp, line.ref, strict=True)]
            power = {"sequence": sum(d), "mean": sum(d) / len(d)}
            for x, own in zip(line.logp, d, strict=True):
                w = min(max(math.exp(own), 0.2), 1.8) if kind == "token" else min(math.exp(power[kind]), 16.0)
                total, n = total - w * x, n + 1
        return total / n

    return loss


@pytest.mark.parametrize("seed", range(3))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, demonstration=True)
    agrees(load_method("psft"), psft_paper, groups, seed)
    for kind in ("sequence", "mean", "token"):
        agrees(load_method("iw_sft", weight=kind), iw_sft_paper(kind), groups, seed)


def test_published_weight_of_a_token() -> None:
    """r / N where r <= 1 + epsilon_high, else 0; and w / N."""
    psft, iw = load_method("psft"), load_method("iw_sft", weight="token")
    groups = random_groups(5, demonstration=True)
    for method, column in ((psft, "old_logp"), (iw, "ref_logp")):
        logp, batch = random_logps(method, groups, 5)
        live = batch.trained[:, 1:]
        ratio = (logp - batch.columns[column][:, 1:]).exp()
        weight = torch.where(ratio > 1.28, 0.0, ratio) if method is psft else ratio.clamp(0.2, 1.8)
        expected = torch.where(live, weight / live.sum(), 0.0)
        torch.testing.assert_close(weights_of(method, batch, logp).weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("iw_sft", {"weight": "group"}, "weight: got 'group'; allowed: sequence, mean, token"),
        ("iw_sft", {"temperature": 0.0}, "both must be positive"),
        ("psft", {"epsilon_high": 0.0}, "epsilon_high: got 0.0; it must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)
