"""IPO, DPO with likelihood, SimPO, CPO and ORPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method

LN2 = math.log(2)
PAIR = [group(answer("EEE", 1.0), answer("E", 0.0))]
LOGP = -LN2 * torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
REF = -LN2 * torch.tensor([[2.0, 2.0, 4.0], [2.0, 0.0, 0.0]])


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def found(name: str, **settings: Any) -> Any:
    method = load_method(name, **settings)
    return weights_of(method, prepared(method, PAIR, **({"ref_logp": REF} if "ref_logp" in method.needs else {})), LOGP)


def test_ipo_by_hand() -> None:
    """Moved by 2 ln 2 and ln 2: (ln 2 - 1)^2 at tau 1/2, weight -2 (ln 2 - 1). In the mean form by 2/3 ln 2 and ln 2."""
    outcome = found("ipo", tau=0.5)
    assert outcome.loss == pytest.approx((LN2 - 1) ** 2)
    w = 2 * (1 - LN2)
    torch.testing.assert_close(outcome.weights, of([[w, w, w], [-w, 0, 0]]))
    outcome = found("ipo", tau=0.5, average=True)
    assert outcome.loss == pytest.approx((-LN2 / 3 - 1) ** 2)
    w = 2 * (1 + LN2 / 3)
    torch.testing.assert_close(outcome.weights, of([[w / 3, w / 3, w / 3], [-w, 0, 0]]))


def test_dpo_with_likelihood_by_hand() -> None:
    """DPO at beta 1 is ln 1.5 with weights +-1/3; half of the chosen answer's mean -log pi, 2 ln 2, comes beside it."""
    outcome = found("dpo_nll", beta=1.0, nll_coef=0.5)
    assert outcome.loss == pytest.approx(math.log(1.5) + LN2)
    torch.testing.assert_close(outcome.weights, of([[1 / 3 + 1 / 6] * 3, [-1 / 3, 0, 0]]))


def test_simpo_by_hand() -> None:
    """Means of -2 ln 2 and -ln 2: at beta 1 and gamma 0 the margin is -ln 2, sigmoid 1/3, and the weights +-2/3 over the length."""
    outcome = found("simpo", beta=1.0, gamma=0.0)
    assert outcome.loss == pytest.approx(math.log(3))
    torch.testing.assert_close(outcome.weights, of([[2 / 9] * 3, [-2 / 3, 0, 0]]))
    assert found("simpo", beta=1.0, gamma=LN2).loss == pytest.approx(math.log(5))  # margin -2 ln 2, sigmoid 1/5


def test_cpo_by_hand() -> None:
    """Sums of -6 ln 2 and -ln 2: margin -5 ln 2, sigmoid 1/33. The likelihood is a mean over the three chosen tokens."""
    outcome = found("cpo", beta=1.0)
    assert outcome.loss == pytest.approx(math.log(33) + 2 * LN2)
    torch.testing.assert_close(outcome.weights, of([[32 / 33 + 1 / 3] * 3, [-32 / 33, 0, 0]]))


def test_cpo_without_likelihood_has_its_preference_term_alone() -> None:
    assert [t.name for t in load_method("cpo", nll_coef=0.0).terms] == ["cpo"]
    assert [t.name for t in load_method("cpo").terms] == ["cpo", "chosen"]


def test_orpo_by_hand() -> None:
    """Mean probabilities 1/4 and 1/2: odds 1/3 and 1, sigmoid(ln 1/3) = 1/4. Loss 2 ln 2 + beta ln 4."""
    outcome = found("orpo", beta=0.5)
    assert outcome.loss == pytest.approx(2 * LN2 + 0.5 * math.log(4))
    chosen, rejected = (1 + 0.5 * 0.75 / 0.75) / 3, -0.5 * 0.75 / 0.5
    torch.testing.assert_close(outcome.weights, of([[chosen] * 3, [rejected, 0, 0]]))


def pairs(loss: Callable[[Line, Line], Tensor]) -> Paper:
    def paper(groups: list[list[Line]]) -> Tensor:
        return sum(loss(*sorted(g, key=lambda line: -line.reward)) for g in groups) / len(groups)

    return paper


def moved(line: Line) -> Tensor:
    return sum(x - r for x, r in zip(line.logp, line.ref, strict=True))


def mean(line: Line) -> Tensor:
    return sum(line.logp) / len(line)


def ipo_paper(w: Line, l: Line) -> Tensor:  # noqa: E741 - as the papers write it
    """arXiv:2310.12036 eq. 17."""
    return (moved(w) - moved(l) - 1 / (2 * 0.2)) ** 2


def rpo_paper(w: Line, l: Line) -> Tensor:  # noqa: E741
    """arXiv:2404.19733 eq. 1."""
    return -torch.sigmoid(0.3 * (moved(w) - moved(l))).log() - 0.7 * mean(w)


def simpo_paper(w: Line, l: Line) -> Tensor:  # noqa: E741
    """arXiv:2405.14734 eq. 6."""
    return -torch.sigmoid(2.0 * mean(w) - 2.0 * mean(l) - 0.5).log()


def cpo_preference_paper(w: Line, l: Line) -> Tensor:  # noqa: E741
    """arXiv:2401.08417 eq. 5, the preference part."""
    return -torch.sigmoid(0.1 * (sum(w.logp) - sum(l.logp))).log()


def orpo_paper(w: Line, l: Line) -> Tensor:  # noqa: E741
    """arXiv:2403.07691 eq. 6 and 7."""
    chosen, rejected = mean(w).exp(), mean(l).exp()
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return -mean(w) - 0.1 * torch.sigmoid(ratio.log()).log()


@pytest.mark.parametrize("seed", range(3))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, pair=True)
    agrees(load_method("ipo", tau=0.2), pairs(ipo_paper), groups, seed)
    agrees(load_method("dpo_nll", beta=0.3, nll_coef=0.7), pairs(rpo_paper), groups, seed)
    agrees(load_method("simpo", beta=2.0, gamma=0.5), pairs(simpo_paper), groups, seed)
    agrees(load_method("cpo", nll_coef=0.0), pairs(cpo_preference_paper), groups, seed)
    agrees(load_method("orpo"), pairs(orpo_paper), groups, seed)


def test_cpo_without_likelihood_is_dpo_with_a_uniform_reference() -> None:
    """A reference that gives every token the same probability only matters where lengths differ."""
    same = [group(answer("EE", 1.0), answer("EE", 0.0))]
    cpo, dpo = load_method("cpo", beta=0.4, nll_coef=0.0), load_method("dpo", beta=0.4)
    logp = LOGP[:, :2]
    one = weights_of(cpo, prepared(cpo, same), logp).weights
    other = weights_of(dpo, prepared(dpo, same, ref_logp=torch.full((2, 2), -3.0)), logp).weights
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ipo", {"tau": 0.0}),
        ("dpo_nll", {"nll_coef": 0.0}),
        ("simpo", {"beta": 0.0}),
        ("cpo", {"beta": -1.0}),
        ("cpo", {"nll_coef": -1.0}),
        ("orpo", {"beta": 0.0}),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"must be (0 or )?positive"):
        load_method(name, **settings)
