"""Clip-Cov and KL-Cov: which tokens are held back, and how."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from worked import answer, group, prepared, random_groups, random_logps, weights_of

from crosstrain.errors import UserError
from crosstrain.methods import load_method
from crosstrain.methods.covariance import CHOSEN
from crosstrain.types import Batch, Method, Scores

A = 0.5 / (math.sqrt(0.5) + 1e-6)
ROLLOUTS = [group(answer("OO", 1.0), answer("OO", 0.0))]
LOGP = torch.full((2, 2), -1.0, dtype=torch.float64)


def of(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def chosen(method: Method, batch: Batch, logp: Tensor) -> Tensor:
    """The tokens that the method's column chooses, [B, T - 1]."""
    scores = Scores(torch.nn.functional.pad(logp, (1, 0)))
    return method.columns[CHOSEN](lambda b: scores, batch)[:, 1:]


def test_clip_cov_by_hand() -> None:
    """One token is held back: no gradient there, A r / 4 elsewhere; a ratio of 1.9 is not clipped, nor is one of 3 where A < 0."""
    method = load_method("clip_cov")
    held = of([[0, 1], [0, 0]])
    ratio = of([[1.9, 1.9], [3.0, 0.1]])
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - ratio.log(), covariant=held), LOGP)
    torch.testing.assert_close(found.weights, of([[1.9 * A / 4, 0], [-3 * A / 4, -0.1 * A / 4]]))
    assert found.logged == pytest.approx((-1.9 * A + 3 * A + 0.1 * A) / 4)


def test_clip_cov_clips_beyond_twice_the_old_probability() -> None:
    """As the authors' scripts do: with r = 3 and A > 0 there is no gradient, and the loss is -2 A."""
    method = load_method("clip_cov")
    none = torch.zeros(2, 2, dtype=torch.float64)
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - math.log(3), covariant=none), LOGP)
    torch.testing.assert_close(found.weights, of([[0, 0], [-3 * A / 4, -3 * A / 4]]))
    assert found.logged == pytest.approx((-2 * 2 * A + 2 * 3 * A) / 4)


def test_kl_cov_by_hand() -> None:
    """One token has beta |log r| beside it, whose weight is -beta / 4 where the policy moved up."""
    method = load_method("kl_cov", beta=0.5)
    held = of([[0, 1], [0, 0]])
    found = weights_of(method, prepared(method, ROLLOUTS, old_logp=LOGP - math.log(2), covariant=held), LOGP)
    torch.testing.assert_close(found.weights, of([[2 * A / 4, 2 * A / 4 - 0.5 / 4], [-2 * A / 4, -2 * A / 4]]))
    assert found.logged == pytest.approx(0.5 * math.log(2) / 4)


def test_kl_cov_takes_the_largest_covariances() -> None:
    """Mean advantage 0 and mean log-prob -2: of the right answer the likely token, of the wrong one the unlikely one."""
    method = load_method("kl_cov", ratio=0.5)
    logp = of([[-0.5, -1.5], [-4.0, -2.0]])
    batch = prepared(method, ROLLOUTS, covariant=torch.zeros(2, 2))
    assert chosen(method, batch, logp).tolist() == [[1, 0], [1, 0]]
    assert chosen(load_method("kl_cov", ratio=0.01), batch, logp).sum() == 1, "at least one"


def test_clip_cov_draws_from_a_band() -> None:
    """Covariances A x 1.5, A x 0.5, A x 2 and 0: in (1, 5) are the first and the third, of which half of four tokens are drawn."""
    method = load_method("clip_cov", ratio=0.5)
    logp = of([[-0.5, -1.5], [-4.0, -2.0]])
    batch = prepared(method, ROLLOUTS, covariant=torch.zeros(2, 2))
    assert chosen(method, batch, logp).tolist() == [[1, 0], [1, 0]]
    one = load_method("clip_cov", ratio=0.25)
    assert chosen(one, batch, logp).sum() == 1
    narrow = load_method("clip_cov", ratio=0.5, highest=1.2)
    assert chosen(narrow, batch, logp).tolist() == [[1, 0], [0, 0]]


def test_which_tokens_are_drawn_does_not_depend_on_the_order_of_rows_or_on_padding() -> None:
    method = load_method("clip_cov", ratio=0.2, lowest=-9.0, highest=9.0)
    logp, batch = random_logps(load_method("reinforce_rej"), random_groups(3, own=4), 3)
    first = chosen(method, batch, logp)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen(method, batch.rows(order), logp[order]), first[order])
    assert first.sum() == int(0.2 * int(batch.trained.sum())) and not bool(first[~batch.trained[:, 1:]].any())


def paper(batch: Batch, logp: Tensor, *, beta: float | None) -> Tensor:
    """arXiv:2505.22617 eq. 10 and 12 on the given choice, token by token: the weights."""
    weights = torch.zeros_like(logp)
    live = [(r, t) for r in range(len(batch)) for t in range(1, int(batch.length[r])) if bool(batch.trained[r, t])]
    for r, t in live:
        moved = float(logp[r, t - 1] - batch.columns["old_logp"][r, t])
        held = float(batch.columns[CHOSEN][r, t])
        w = float(batch.advantage[r, t]) * math.exp(moved)
        w = 0.0 if beta is None and w > 0 and math.exp(moved) > 2 else w
        weights[r, t - 1] = (w * (1 - held) if beta is None else w - held * beta * math.copysign(1.0, moved)) / len(live)
    return weights


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "beta"), [("clip_cov", None), ("kl_cov", 0.7)])
def test_second_implementations(seed: int, name: str, beta: float | None) -> None:
    method = load_method(name, **({} if beta is None else {"beta": beta}))
    logp, batch = random_logps(method, random_groups(seed, own=4), seed)
    held = (torch.rand(logp.shape, generator=torch.Generator().manual_seed(seed)) < 0.3).double()
    batch = batch.with_columns(**{CHOSEN: torch.nn.functional.pad(held, (1, 0)) * batch.trained})
    found = weights_of(method, batch, logp).weights
    torch.testing.assert_close(found, paper(batch, logp, beta=beta), rtol=0, atol=1e-10)


def test_with_one_update_kl_cov_is_a_plain_policy_gradient() -> None:
    method = load_method("kl_cov", minibatches=1)
    batch = prepared(method, ROLLOUTS, covariant=torch.ones(2, 2))
    torch.testing.assert_close(weights_of(method, batch, LOGP).weights, of([[A / 4, A / 4], [-A / 4, -A / 4]]))


@pytest.mark.parametrize(
    ("name", "settings"), [("clip_cov", {"ratio": 0.0}), ("clip_cov", {"lowest": 5.0}), ("kl_cov", {"beta": 0.0})]
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        load_method(name, **settings)
