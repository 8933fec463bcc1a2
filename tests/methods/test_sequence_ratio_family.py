"""GSPO, GMPO, CISPO and SAPO: what each makes of the ratio in place of GRPO's clip per token."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from worked import Line, Paper, agrees, answer, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method

A = 0.5 / (math.sqrt(0.5) + 1e-6)
"""Rewards 1 and 0: the advantages are +-0.7071."""
ROLLOUTS = [group(answer("OO", 1.0), answer("OO", 0.0))]
LOGP = torch.full((2, 2), -1.0, dtype=torch.float64)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def outcome(name: str, ratios: list[list[float]], **settings: object) -> tuple[float, Tensor]:
    """The logged loss and the weights of both answers of ROLLOUTS, whose tokens have these ratios."""
    method = load_method(name, **settings)
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - of(ratios).log()), LOGP)
    return found.logged, found.weights


def test_gspo_by_hand() -> None:
    """Ratios 4 and 1/4 have the sequence ratio 1, and 1.21 and 1 have 1.1, which is past 1 + 0.0004 but A < 0: it stays open.

    Loss: mean of -A and 1.1 A. Weights s A / (2 tokens x 2 sequences).
    """
    logged, weights = outcome("gspo", [[4.0, 0.25], [1.21, 1.0]])
    assert logged == pytest.approx((-A + 1.1 * A) / 2)
    torch.testing.assert_close(weights, of([[A / 4, A / 4], [-1.1 * A / 4, -1.1 * A / 4]]))


def test_gspo_clips_a_sequence_as_a_whole() -> None:
    """s = 1.1 with A > 0: the loss stops at 1.0004, and no token keeps a gradient, not even the one whose own ratio is 1."""
    logged, weights = outcome("gspo", [[1.21, 1.0], [1.0, 1.0]])
    assert logged == pytest.approx((-1.0004 * A + A) / 2)
    torch.testing.assert_close(weights, of([[0, 0], [-A / 4, -A / 4]]))


def test_gmpo_by_hand() -> None:
    """A > 0: log-ratios 1 and -1, of which the first is cut to 0.4: rho = exp(-0.3), and only the second token has a gradient."""
    logged, weights = outcome("gmpo", [[math.e, 1 / math.e], [1.0, 1.0]])
    rho = math.exp(-0.3)
    assert logged == pytest.approx((-rho * A + A) / 2)
    torch.testing.assert_close(weights, of([[0, rho * A / 4], [-A / 4, -A / 4]]))


def test_cispo_by_hand() -> None:
    """Ratio 8 is cut to 5 and keeps its gradient; four tokens count alike. In TRL's sense there is no lower bound."""
    logged, weights = outcome("cispo", [[8.0, 1.0], [0.5, 1.0]])
    torch.testing.assert_close(weights, of([[5 * A / 4, A / 4], [-0.5 * A / 4, -A / 4]]))
    assert logged == pytest.approx((5 * A + A - 0.5 * A - A) / 4)  # -sg(r) A log pi with log pi = -1
    _, banded = outcome("cispo", [[8.0, 1.0], [0.5, 1.0]], bounds="band", epsilon=0.2, epsilon_high=0.3)
    torch.testing.assert_close(banded, of([[1.3 * A / 4, A / 4], [-0.8 * A / 4, -A / 4]]))


def test_sapo_by_hand() -> None:
    """At ratio 1 the gate is 1 and the loss -A 2 / tau; ln 3 above it sigmoid(ln 3) = 3/4 and the gate 4 x 3/4 x 1/4 = 3/4."""
    ratio = 1 + math.log(3)
    logged, weights = outcome("sapo", [[ratio, 1.0], [1.0, 1.0]])
    assert logged == pytest.approx((-A * (4 * 0.75 + 2) / 2 + A * 2 / 1.05) / 2)
    torch.testing.assert_close(weights, of([[0.75 * ratio * A / 4, A / 4], [-A / 4, -A / 4]]))


def advantages(group: list[Line]) -> list[float]:
    rewards = [line.reward for line in group]
    return [(r - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6) for r in rewards]


def by_sequence(loss: object) -> Paper:
    """The mean over sequences of `loss(log-ratios, advantage)`."""

    def paper(groups: list[list[Line]]) -> Tensor:
        each = []
        for g in groups:
            for line, a in zip(g, advantages(g), strict=True):
                each.append(loss([x - o for x, o in zip(line.logp, line.old, strict=True)], a))  # type: ignore[operator]
        return sum(each) / len(each)

    return paper


def gspo_paper(moved: list[Tensor], a: float) -> Tensor:
    """arXiv:2507.18071 eq. 5 and 7."""
    s = (sum(moved) / len(moved)).exp()
    return -torch.minimum(s * a, s.clamp(1 - 3e-2, 1 + 4e-2) * a)


def gmpo_paper(moved: list[Tensor], a: float) -> Tensor:
    """arXiv:2507.20673 eq. 4: the tokens' ratios to the power of the advantage's sign, the smaller of it and its clipped form."""
    sign = 1.0 if a >= 0 else -1.0
    cut = [torch.minimum(sign * m, sign * m.clamp(-0.4, 0.4)) * sign for m in moved]
    return -a * (sum(cut) / len(cut)).exp()


def sapo_paper(moved: list[Tensor], a: float) -> Tensor:
    """arXiv:2511.20347 eq. 5 and 6."""
    tau = 1.0 if a > 0 else 1.05
    return sum(-a * 4 / tau * torch.sigmoid(tau * (m.exp() - 1)) for m in moved) / len(moved)


def cispo_paper(groups: list[list[Line]]) -> Tensor:
    """arXiv:2506.13585 eq. 4: stop-gradient of the cut ratio, times A log pi, over all tokens."""
    tokens = [
        -min(math.exp(float(x.detach()) - o), 1.5) * a * x
        for g in groups
        for line, a in zip(g, advantages(g), strict=True)
        for x, o in zip(line.logp, line.old, strict=True)
    ]
    return sum(tokens) / len(tokens)


@pytest.mark.parametrize("seed", range(4))
def test_second_implementations(seed: int) -> None:
    groups = random_groups(seed, own=4)
    agrees(load_method("gspo", epsilon=3e-2, epsilon_high=4e-2), by_sequence(gspo_paper), groups, seed)
    agrees(load_method("gmpo"), by_sequence(gmpo_paper), groups, seed)
    agrees(load_method("sapo"), by_sequence(sapo_paper), groups, seed)
    agrees(load_method("cispo", epsilon_high=1.5), cispo_paper, groups, seed)


@pytest.mark.parametrize("name", ["gspo", "gmpo", "sapo", "cispo"])
def test_with_one_update_all_have_grpos_direction(name: str) -> None:
    """Without old log-probs each weight is A over the denominator: of a sequence's mean, or of all tokens for CISPO."""
    groups = random_groups(1, own=4)
    method = load_method(name)
    like = load_method("grpo", beta=0.0, average="tokens" if name == "cispo" else "sequences")
    logp, _ = random_logps(load_method("reinforce"), groups, 1)
    found, expected = (weights_of(m, prepared(m, groups), logp).weights for m in (method, like))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cispo", {"bounds": "both"}, "bounds: got 'both'; allowed: cap, band"),
        ("gspo", {"epsilon": 0.0}, r"epsilon: got 0.0; it must be in \(0, 1\)"),
        ("gmpo", {"epsilon": -0.4}, "epsilon: got -0.4; it must be positive"),
        ("sapo", {"temperature_pos": 0.0}, "temperature_pos: got 0.0; it must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method(name, **settings)
