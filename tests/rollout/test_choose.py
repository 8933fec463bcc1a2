"""Picking tokens: frequencies, log-probs, top-k, top-p, and numbers at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from crosstrain.rollout.choose import BLOCK, NUCLEUS, inverse_cdf, keep_likely
from crosstrain.rollout.choose import choose as choose_in_place

DRAWS = 20_000
JUST_BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))
LARGE = 3 * BLOCK + 17  # several blocks, the last of them cut
ONE = torch.tensor([0])  # one row, of the only logits


def choose(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`choose` with a copy of the logits, which it overwrites."""
    return choose_in_place(logits.clone(), *rest)


def made_up_logits(size: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(size))


def drawn(logits: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    never = torch.zeros(DRAWS, dtype=torch.bool)
    return choose(logits[None], torch.zeros(DRAWS, dtype=torch.long), uniform, temperature, top_p, top_k, never)


def filtered_softmax(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """As transformers' own processors do it, in the order of `generate`."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits.double()[None]
    none = torch.zeros(1, 1, dtype=torch.long)
    if temperature != 1:
        scores = TemperatureLogitsWarper(temperature)(none, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(none, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(none, scores)
    return torch.softmax(scores[0], dim=0)


@pytest.mark.parametrize("size", [40, LARGE])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.7, 1.0, 0), (1.0, 1.0, 5), (1.0, 0.7, 0), (0.8, 0.9, 12), (1.0, 0.999, 0)],
)
def test_frequencies_are_those_of_transformers_filtered_softmax(
    size: int, temperature: float, top_p: float, top_k: int
) -> None:
    logits = made_up_logits(size)
    token, logp = drawn(logits, temperature, top_p, top_k)
    expected = filtered_softmax(logits, temperature, top_p, top_k)
    observed = torch.bincount(token, minlength=size)
    assert not observed[expected == 0].any(), "a token that top-k or top-p removed was drawn"
    common = expected * DRAWS >= 5
    seen = [*observed[common].tolist(), int(observed[~common].sum())]
    hoped = [*(expected[common] * DRAWS).tolist(), float(expected[~common].sum() * DRAWS)]
    if hoped[-1] < 1e-9:
        seen, hoped = seen[:-1], hoped[:-1]
    assert stats.chisquare(seen, np.array(hoped) * (sum(seen) / sum(hoped))).pvalue > 1e-3
    full = torch.log_softmax(logits.double() / temperature, dim=0)
    assert torch.allclose(logp.double(), full[token], atol=2e-6), "log-probs are those before top-k and top-p"


def test_top_p_looks_beyond_the_first_candidates_when_the_distribution_is_flat() -> None:
    logits = made_up_logits(4 * NUCLEUS, spread=0.01)
    weight = logits.exp()[None]
    kept, ids = keep_likely(weight, 0.9, 0)
    expected = filtered_softmax(logits, 1.0, 0.9, 0) > 0
    assert int(expected.sum()) > NUCLEUS
    assert set(ids[kept > 0].tolist()) == set(torch.nonzero(expected).flatten().tolist())


def test_flat_and_peaked_rows_in_one_batch_each_keep_their_own_nucleus() -> None:
    flat, peaked = torch.zeros(2 * NUCLEUS), torch.zeros(2 * NUCLEUS)
    peaked[7] = 50.0
    kept, ids = keep_likely(torch.stack([flat, peaked]).softmax(dim=1), 0.5, 0)
    assert (kept > 0).sum(dim=1).tolist() == [NUCLEUS, 1]
    assert ids[1][kept[1] > 0].tolist() == [7]


def test_a_tiny_top_p_and_top_k_of_one_leave_the_most_likely_token() -> None:
    logits, one = made_up_logits(LARGE)[None], torch.zeros(50, dtype=torch.long)
    uniform, never = torch.linspace(0, JUST_BELOW_1, 50), torch.zeros(50, dtype=torch.bool)
    best = int(logits[0].argmax())
    assert set(choose(logits, one, uniform, 1.0, 1e-6, 0, never)[0].tolist()) == {best}
    assert set(choose(logits, one, uniform, 1.0, 1.0, 1, never)[0].tolist()) == {best}


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    kept, ids = keep_likely(torch.ones(1, 10), 1.0, 3)
    assert kept.shape == (1, 3)
    assert len(set(ids[0].tolist())) == 3


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.3, 0), (1.0, 4)])
def test_greedy_rows_take_the_most_likely_token_and_others_do_not_notice(top_p: float, top_k: int) -> None:
    logits = torch.stack([made_up_logits(LARGE), made_up_logits(LARGE + 0), made_up_logits(LARGE).flip(0)])
    uniform = torch.tensor([0.99, 0.99, 0.99])
    mixed, logp = choose(logits, torch.arange(3), uniform, 0.7, top_p, top_k, torch.tensor([True, False, False]))
    alone, _ = choose(logits[1:], torch.arange(2), uniform[1:], 0.7, top_p, top_k, torch.tensor([False, False]))
    assert mixed[0] == logits[0].argmax()
    assert mixed[1:].tolist() == alone.tolist()
    assert torch.allclose(logp[0], torch.log_softmax(logits[0] / 0.7, dim=0).max(), atol=1e-5)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.3, 0), (1.0, 4)])
def test_rows_that_share_logits_take_what_each_would_from_a_copy_of_its_own(top_p: float, top_k: int) -> None:
    logits = torch.stack([made_up_logits(LARGE), made_up_logits(LARGE).flip(0)])
    place, uniform = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([0.1, 0.2, 0.9, 0.9, 0.5])
    greedy = torch.tensor([False, False, False, False, True])
    token, logp = choose(logits, place, uniform, 0.7, top_p, top_k, greedy)
    token_of_copy, logp_of_copy = choose(logits[place], torch.arange(5), uniform, 0.7, top_p, top_k, greedy)
    assert token.tolist() == token_of_copy.tolist()
    assert logp.tolist() == logp_of_copy.tolist()


def test_temperature_0_is_greedy_with_log_probs_at_temperature_1() -> None:
    logits = made_up_logits(LARGE)[None]
    token, logp = choose(logits, ONE, torch.tensor([0.9]), 0.0, 1.0, 0, torch.tensor([False]))
    assert token.item() == logits.argmax()
    assert torch.allclose(logp, torch.log_softmax(logits, dim=1).max(), atol=1e-6)


def test_huge_logits_do_not_overflow_and_nan_is_passed_on() -> None:
    logits = torch.tensor([[3e38, 0.0, -3e38], [0.0, float("-inf"), 0.0], [float("nan"), 0.0, 0.0]])
    token, logp = choose(
        logits, torch.arange(3), torch.tensor([0.999, 0.6, 0.5]), 1.0, 1.0, 0, torch.zeros(3, dtype=torch.bool)
    )
    assert token[:2].tolist() == [0, 2]
    assert logp[0] == 0.0
    assert torch.isclose(logp[1], torch.tensor(0.5).log())
    assert logp[2].isnan()


@pytest.mark.parametrize("uniform", [0.0, 1e-45, 1e-8, 0.5, JUST_BELOW_1, 1.0])
@pytest.mark.parametrize("size", [1, 2, BLOCK, BLOCK + 1, LARGE])
def test_a_token_of_probability_0_is_never_drawn(size: int, uniform: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for holes in (0.0, 0.5, 0.99):
        weight = torch.rand(20, size, generator=generator) ** 30  # from 1 down to what fp32 flushes to 0
        weight = weight * (torch.rand(20, size, generator=generator) >= holes)
        weight[:, size // 2] = 1e-30  # one positive weight at least
        index = inverse_cdf(weight, torch.arange(20), torch.full((20,), uniform))
        assert (weight.gather(1, index[:, None]) > 0).all()


def test_certainty_is_certain_at_any_uniform_number() -> None:
    for place in (0, BLOCK - 1, BLOCK, LARGE - 1):
        weight = torch.zeros(1, LARGE)
        weight[0, place] = 0.25
        assert inverse_cdf(weight, torch.tensor([0, 0, 0]), torch.tensor([0.0, 0.5, JUST_BELOW_1])).tolist() == [place] * 3


def test_a_flat_distribution_gives_every_token_an_equal_slice() -> None:
    uniform = (torch.arange(LARGE, dtype=torch.float64) + 0.5) / LARGE
    assert inverse_cdf(torch.ones(1, LARGE), torch.zeros(LARGE, dtype=torch.long), uniform).tolist() == list(range(LARGE))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=600).filter(any), st.floats(0, 1, exclude_max=True, width=32))
def test_inverse_cdf_is_searchsorted_on_the_running_sum(weights: list[int], uniform: float) -> None:
    running = np.cumsum(weights)
    target = uniform * running[-1]
    expected = int(np.searchsorted(running, target, side="right"))
    found = inverse_cdf(torch.tensor([weights], dtype=torch.float64), ONE, torch.tensor([uniform], dtype=torch.float64))
    assert int(found) == expected
