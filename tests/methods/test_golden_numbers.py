"""Numbers by hand that no other file has: GKD, SDFT, ASFT and OTR with two words, STaR's kept answers, IPO of means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from worked import answer, group, prepared, weights_of

from crosstrain.methods import load_method
from crosstrain.objective.reduce import count, term_loss
from crosstrain.types import Group, Method, Scores

LN2, LN3 = math.log(2), math.log(3)
LIKELY, UNLIKELY = [LN3, 0.0], [0.0, LN3]
"""Logits of probabilities 3/4 and 1/4, and of 1/4 and 3/4."""


def of(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def on_logits(method: Method, groups: list[Group], logits: Any, others: Any) -> tuple[float, Tensor]:
    """The logged loss and the gradient on the logits [tokens, 2] of all trained tokens in order, each of which is the word 0."""
    leaf, targets = of(logits).requires_grad_(), torch.zeros(len(logits), dtype=torch.long)
    batch = prepared(method, groups)

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(batch.tokens.shape, dtype=torch.float64).masked_scatter(batch.trained, values)

    channels = {name: spread(c.divergence(leaf, of(others), targets)) for name, c in method.comparisons.items()}
    channels |= {name: spread(c(leaf, targets)) for name, c in method.channels.items()}
    scores = Scores(spread(leaf.log_softmax(-1)[:, 0]), channels)
    counts = count(method.terms, batch, groups=len(groups))
    parts = [part for t in method.terms if (part := term_loss(t, scores, batch, counts)) is not None]
    (gradient,) = torch.autograd.grad(sum((p.loss for p in parts), torch.zeros(())), leaf)
    return sum(p.logged for p in parts), gradient


@pytest.mark.parametrize(
    ("beta", "loss", "pull"),
    [(0.0, LN3 / 2, 1 / 2), (1.0, LN3 / 2, 3 / 8 * LN3), (0.5, 3 / 4 * math.log(3 / 2) - LN2 / 4, 3 / 32 * LN3)],
)
def test_gkd_by_hand(beta: float, loss: float, pull: float) -> None:
    """pi = 3/4, 1/4 and q = 1/4, 3/4. KL(q | pi) = 1/4 ln 1/3 + 3/4 ln 3 = ln 3 / 2, gradient pi - q = +-1/2. KL(pi | q) is as
    large, gradient pi (ln pi / q - KL) = 3/4 (ln 3 - ln 3 / 2). Halfway m = 1/2, 1/2: 3/4 ln 3/2 + 1/4 ln 1/2, gradient half of
    3/4 (ln 3/2 - KL(pi | m)) = 3/32 ln 3. A second token, on which both agree, halves everything."""
    method = load_method("gkd", beta=beta)
    found, gradient = on_logits(method, [group(answer("EE"))], [LIKELY, LIKELY], [UNLIKELY, LIKELY])
    assert found == pytest.approx(loss / 2)
    torch.testing.assert_close(gradient, of([[pull / 2, -pull / 2], [0, 0]]), rtol=0, atol=1e-12)


def test_sdft_by_hand() -> None:
    """Forward KLs of ln 3 / 2 and 0 in one answer, ln 3 / 2 in the other: (1/4 + 1/2) / 2 ln 3, answers counting alike."""
    method = load_method("sdft", distillation_alpha=0.0)
    groups = [group(answer("OO"), answer("O"))]
    found, gradient = on_logits(method, groups, [LIKELY] * 3, [UNLIKELY, LIKELY, UNLIKELY])
    assert found == pytest.approx(3 / 8 * LN3)
    torch.testing.assert_close(gradient, of([[1 / 8, -1 / 8], [0, 0], [1 / 4, -1 / 4]]), rtol=0, atol=1e-12)


def test_an_answer_that_is_skipped_whole_counts_among_sdfts_answers() -> None:
    """Without the first token of each: 0 where both agree in one answer, nothing of the other; a mean over two, as in TRL."""
    method = load_method("sdft", num_loss_tokens_to_skip=1)
    groups = [group(answer("OO"), answer("O"))]
    found, gradient = on_logits(method, groups, [LIKELY] * 3, [LIKELY, UNLIKELY, UNLIKELY])
    assert found == pytest.approx(LN3 / 4)
    torch.testing.assert_close(gradient, of([[0, 0], [1 / 4, -1 / 4], [0, 0]]), rtol=0, atol=1e-12)


def test_asft_by_hand() -> None:
    """p = 3/4: -p ln p, and -p (1 - p) = -3/16 on its logit; 0.1 KL(ref | pi) = 0.05 ln 3, and 0.1 x 1/2. Two such tokens."""
    method = load_method("asft", kl_weight=0.1)
    found, gradient = on_logits(method, [group(answer("EE"))], [LIKELY] * 2, [UNLIKELY] * 2)
    assert found == pytest.approx(3 / 4 * math.log(4 / 3) + 0.05 * LN3)
    pull = (-3 / 16 + 0.05) / 2
    torch.testing.assert_close(gradient, of([[pull, -pull]] * 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("temperature", "q", "pull"), [(1.0, 3 / 4, -9 / 32), (0.5, 9 / 10, -0.2625)])
def test_otr_by_hand(temperature: float, q: float, pull: float) -> None:
    """pi = 3/4, 1/4, drawn at temperature 1 as they are and at 1/2 as 9/10 and 1/10; rewards 1 and -1/2. The mean reward is
    3/4 - 1/8 = 5/8 and 9/10 - 1/20 = 17/20; the right word's logit is pulled by -q + 3/4 of it."""
    method = load_method("otr", beta=-0.5, temperature=temperature)
    found, gradient = on_logits(method, [group(answer("E"))], [LIKELY], [LIKELY])
    assert found == pytest.approx(-q * math.log(3 / 4) + (1 - q) / 2 * math.log(1 / 4))
    torch.testing.assert_close(gradient, of([[pull, -pull]]), rtol=0, atol=1e-12)


def test_star_by_hand() -> None:
    """Two tokens of a right answer; a wrong one, and three tokens of the right one that the hint gave: a mean over five."""
    method = load_method("star")
    hinted = replace(answer("OOO", 1.0), sampled_from="hint")
    groups = [group(answer("OO", 1.0)), group(answer("O", 0.0), hinted, name="b")]
    found = weights_of(method, prepared(method, groups), of([[-1, -2, 0], [-3, -4, -5]]))
    assert found.loss == pytest.approx(15 / 5)
    torch.testing.assert_close(found.weights, of([[0.2, 0.2, 0], [0.2, 0.2, 0.2]]))


def test_ipo_mean_by_hand() -> None:
    """Three tokens moved by 2/3 ln 2 on average, one by ln 2; at tau 1/2 the margin is 1: (-ln 2 / 3 - 1)^2."""
    method = load_method("ipo_mean", tau=0.5)
    logp, ref = -LN2 * of([[1, 2, 3], [1, 0, 0]]), -LN2 * of([[2, 2, 4], [2, 0, 0]])
    pair = [group(answer("EEE", 1.0), answer("E", 0.0))]
    found = weights_of(method, prepared(method, pair, ref_logp=ref), logp)
    assert found.loss == pytest.approx((-LN2 / 3 - 1) ** 2)
    w = 2 * (1 + LN2 / 3)
    torch.testing.assert_close(found.weights, of([[w / 3, w / 3, w / 3], [-w, 0, 0]]))
