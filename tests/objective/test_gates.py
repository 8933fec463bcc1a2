"""PPO's clip as a gate on the gradient has exactly the gradient of its published min form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.objective.gates import always, ppo_clip

NEAR_BOUNDS = st.one_of(st.floats(0.01, 5), st.sampled_from([0.7, 0.8, 1.0, 1.2, 1.28, 1 - 0.2, 1 + 0.2]))


@given(
    st.lists(NEAR_BOUNDS, min_size=1, max_size=8),
    st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3 or a == 0),
    st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.3, 3.0)]),
)
def test_gate_and_min_form_have_one_gradient(ratios: list[float], advantage: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    ratio = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    a = torch.full_like(ratio, advantage).detach()
    published = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high)).sum()
    gated = (-ppo_clip(low, high)(ratio.detach(), a) * ratio * a).sum()
    (one,) = torch.autograd.grad(published, ratio)
    (other,) = torch.autograd.grad(gated, ratio)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


def test_where_the_gate_is_closed() -> None:
    """Only where the policy already moved past the bound in the direction the advantage pushes."""
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert ppo_clip(0.2, 0.2)(ratio, advantage).tolist() == [0, 1, 1, 0, 1]
    assert ppo_clip(0.2, 0.4)(ratio, advantage).tolist() == [1, 1, 1, 0, 1]
    assert always(ratio, advantage).tolist() == [1] * 5


def test_at_the_bound_itself_the_gate_is_open() -> None:
    bound = torch.tensor([1.25, 0.75])
    assert ppo_clip(0.25, 0.25)(bound, torch.tensor([1.0, -1.0])).tolist() == [1, 1]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.0, 0.2), (0.2, 0.0), (-0.1, 0.2)])
def test_bounds_that_make_no_sense_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="ppo_clip"):
        ppo_clip(low, high)
