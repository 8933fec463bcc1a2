"""Gates: PPO's clip has exactly the gradient of its published min form; the others open and close where they say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosstrain.objective.gates import Gate, always, ppo_clip, soft, token_clip, unlikely
from crosstrain.testing import tiny_batch

NEAR_BOUNDS = st.one_of(st.floats(0.01, 5), st.sampled_from([0.7, 0.8, 1.0, 1.2, 1.28, 1 - 0.2, 1 + 0.2, 3.0]))


def opened(gate: Gate, ratio: Tensor, advantage: Tensor, old: Tensor | None = None) -> Tensor:
    """How far a gate is open for tokens with these ratios and advantages, one per row; log-probs are 0."""
    n = len(ratio)
    batch = tiny_batch([0.0] * n, [0] * n, tokens=1)
    batch = replace(batch, advantage=advantage[:, None].expand(batch.tokens.shape))
    wide = ratio[:, None].expand(batch.tokens.shape)
    if old is not None:
        batch = batch.with_columns(old_logp=old[:, None].expand(batch.tokens.shape))
    return gate(wide, torch.zeros_like(wide), batch, batch.trained)[:, -1]


@given(
    st.lists(NEAR_BOUNDS, min_size=1, max_size=8),
    st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3 or a == 0),
    st.sampled_from([(0.2, 0.2, None), (0.2, 0.28, None), (0.3, 3.0, None), (0.2, 0.2, 3.0), (0.2, 0.28, 1.5)]),
)
def test_gate_and_min_form_have_one_gradient(
    ratios: list[float], advantage: float, bounds: tuple[float, float, float | None]
) -> None:
    low, high, dual = bounds
    ratio = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    a = torch.full_like(ratio, advantage).detach()
    published = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    if dual is not None and advantage < 0:
        published = torch.where(published > -a * dual, -a * dual, published)  # at the bound itself the gradient stays
    gated = -opened(ppo_clip(low, high, dual), ratio.detach(), a) * ratio * a
    (one,) = torch.autograd.grad(published.sum(), ratio)
    (other,) = torch.autograd.grad(gated.sum(), ratio)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


def test_where_the_gate_is_closed() -> None:
    """Only where the policy already moved past the bound in the direction the advantage pushes."""
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert opened(ppo_clip(0.2, 0.2), ratio, advantage).tolist() == [0, 1, 1, 0, 1]
    assert opened(ppo_clip(0.2, 0.4), ratio, advantage).tolist() == [1, 1, 1, 0, 1]
    assert opened(always, ratio, advantage).tolist() == [1] * 5


def test_dual_clip_closes_what_went_far_the_wrong_way() -> None:
    ratio, advantage = torch.tensor([2.9, 3.1, 3.1]), torch.tensor([-1.0, -1.0, 1.0])
    assert opened(ppo_clip(0.2, 0.2, dual=3.0), ratio, advantage).tolist() == [1, 0, 0]


def test_at_the_bound_itself_the_gate_is_open() -> None:
    bound = torch.tensor([1.25, 0.75])
    assert opened(ppo_clip(0.25, 0.25), bound, torch.tensor([1.0, -1.0])).tolist() == [1, 1]


def test_a_tokens_own_ratio_is_clipped_whatever_the_terms_ratio_is() -> None:
    """Log-probs are 0, so that log(pi / old) is minus the old log-prob: 0.5, 0.5, -0.5 and -0.5."""
    old, advantage = torch.tensor([-0.5, -0.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert opened(token_clip(0.4, 0.4), torch.ones(4), advantage, old).tolist() == [0, 1, 1, 0]
    assert opened(token_clip(0.6, 0.6), torch.ones(4), advantage, old).tolist() == [1] * 4


def test_without_an_advantage_no_clip_is_closed() -> None:
    """Log-probs are 0, so that log(pi / old) is 1 and -1."""
    ratio, none = torch.tensor([4.0, 0.1]), torch.zeros(2)
    assert opened(ppo_clip(0.2, 0.2), ratio, none).tolist() == [1, 1]
    assert opened(ppo_clip(0.2, 0.2, dual=3.0), ratio, none).tolist() == [1, 1]
    assert opened(token_clip(0.4, 0.4), ratio, none, torch.tensor([-1.0, 1.0])).tolist() == [1, 1]


def test_without_an_advantage_the_soft_gate_falls_as_for_a_negative_one() -> None:
    """sigmoid(ln 3) = 3/4: 4 3/4 1/4."""
    found = opened(soft(positive=1.0, negative=math.log(3.0)), torch.tensor([2.0], dtype=torch.float64), torch.zeros(1))
    assert found.item() == pytest.approx(0.75)


def test_an_unlikely_token_counts_more() -> None:
    """(1 - p)^power for p = 3/4: sqrt(1/4), and (1/4)^2."""
    logp = torch.full((1, 2), 0.75, dtype=torch.float64).log()
    batch = tiny_batch([0.0], [0], tokens=1)
    for power, expected in ((0.5, 0.5), (2.0, 0.0625)):
        assert unlikely(power)(logp.exp(), logp, batch, batch.trained)[0, 1].item() == pytest.approx(expected)


@given(st.floats(0.01, 5), st.sampled_from([-1.0, 1.0]))
def test_the_soft_gate_is_the_derivative_of_the_published_sigmoid(ratio: float, advantage: float) -> None:
    tau = 1.5 if advantage > 0 else 0.7
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((4 / tau * torch.sigmoid(tau * (r - 1))).sum(), r)
    found = opened(soft(1.5, 0.7), r.detach(), torch.tensor([advantage], dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert 0 < float(found) <= 1 and opened(soft(), torch.ones(1), torch.ones(1)).item() == 1


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.1, 0.2), (0.2, 0.0), (-0.1, 0.2)])
def test_bounds_that_make_no_sense_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="ppo_clip"):
        ppo_clip(low, high)


def test_other_settings_that_make_no_sense_are_refused() -> None:
    for make in (lambda: ppo_clip(0.2, 0.2, dual=1.1), lambda: token_clip(0.0, 0.4), lambda: soft(negative=-1.0)):
        with pytest.raises(ValueError, match="got"):
            make()
