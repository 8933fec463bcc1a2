"""The primitive and the KL terms: what each does to every token, and which divergence each KL estimator descends."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosstrain.objective import denominators
from crosstrain.objective.reduce import count, term_loss
from crosstrain.objective.terms import (
    best_by,
    by,
    clipped,
    group_mean,
    kl,
    nll,
    ppo_loss,
    reinforce_loss,
    seq_mean,
    surrogate,
    token_sum,
)
from crosstrain.testing import tiny_batch
from crosstrain.training.batching import to_batch
from crosstrain.types import Batch, Example, Group, Per, Scores, Source, Term, Trajectory

NUMBERS = st.lists(st.floats(-4, 0), min_size=6, max_size=6)


def double(batch: Batch) -> Batch:
    columns = {k: c.double() for k, c in batch.columns.items()}
    return replace(batch, reward=batch.reward.double(), advantage=batch.advantage.double(), columns=columns)


def two_by_three(advantage: float = 1.0) -> Batch:
    batch = double(tiny_batch([1.0, 0.0], [0, 0], tokens=3))
    return replace(batch, advantage=torch.full_like(batch.advantage, advantage))


def weights(term: Term, logp: Tensor, batch: Batch) -> Tensor:
    leaf = torch.nn.functional.pad(logp.double(), (1, 0)).requires_grad_()
    part = term_loss(term, Scores(leaf), batch, count([term], batch, groups=1))
    assert part is not None
    return -torch.autograd.grad(part.loss, leaf)[0][:, 1:]


DENOMINATORS = {
    "current": (denominators.current, lambda p, old: torch.ones_like(p)),
    "old": (denominators.old, lambda p, old: p / old),
    "one": (denominators.one, lambda p, old: p),
    "shaped": (denominators.shaped(0.3), lambda p, old: 0.3 * p / (p + 0.3) ** 2),
    "shaped_behaviour": (denominators.shaped_behaviour(0.3), lambda p, b: 0.3 * (p / b) / (p / b + 0.3) ** 2),
    "uncertain": (denominators.uncertain, lambda p, old: p * (1 - p)),
    "floored": (denominators.floored(0.1), lambda p, old: p / p.clamp(min=0.1)),
    "mixture": (denominators.mixture, lambda p, old: 2 * p / (old + (old + 1) / 2)),
    "capped": (denominators.capped(None, 1.5), lambda p, old: (p / old).clamp(max=1.5)),
    "band": (denominators.capped(0.8, 1.5), lambda p, old: (p / old).clamp(0.8, 1.5)),
    "sequence": (denominators.sequence, lambda p, old: (p / old).log().mean(dim=1, keepdim=True).exp().expand_as(p)),
}


@pytest.mark.parametrize("name", DENOMINATORS)
@given(logp=NUMBERS, old=NUMBERS, advantage=st.floats(-2, 2))
def test_the_weight_is_gate_times_ratio_times_advantage(
    name: str, logp: list[float], old: list[float], advantage: float
) -> None:
    """The four parts of arXiv:2509.04419, and the normaliser (6 tokens)."""
    denominator, closed_form = DENOMINATORS[name]
    now, before = torch.tensor(logp).double().view(2, 3), torch.tensor(old).double().view(2, 3)
    wide = torch.nn.functional.pad(before, (1, 0))
    batch = two_by_three(advantage).with_columns(old_logp=wide, behaviour_logp=wide)
    half = surrogate(
        "t", on=by(Source.POLICY), per=Per(("own_tokens",)), denominator=denominator, gate=lambda r, *rest: 0.5 + 0 * r
    )
    expected = 0.5 * closed_form(now.exp(), before.exp()) * advantage / 6
    torch.testing.assert_close(weights(half, now, batch), expected, rtol=1e-9, atol=1e-12)


def test_no_gradient_flows_through_denominator_gate_or_correction() -> None:
    """Of parts that do not stop it themselves, the primitive does: all of them are 1 here, and only the ratio has a gradient."""
    careless = surrogate(
        "t",
        on=by(Source.POLICY),
        per=Per(("own_tokens",)),
        denominator=lambda logp, batch, on: logp,
        gate=lambda ratio, logp, *rest: ratio * torch.exp(logp + 1),
        corrected=lambda logp, batch, on: torch.exp(logp + 1),
    )
    assert torch.allclose(weights(careless, torch.full((2, 3), -1.0), two_by_three()), torch.full((2, 3), 1 / 6).double())


@pytest.mark.parametrize("part", ["denominator", "gate", "corrected"])
def test_what_a_part_has_learned_itself_gets_no_gradient(part: str) -> None:
    """A third party's part may hold numbers that have a gradient of their own."""
    learned = torch.zeros((), dtype=torch.float64, requires_grad=True)
    parts: dict[str, Any] = {
        "denominator": lambda logp, batch, on: logp + learned,
        "gate": lambda ratio, logp, batch, on: torch.exp(learned).expand_as(logp),
        "corrected": lambda logp, batch, on: torch.exp(learned).expand_as(logp),
    }
    term = surrogate("t", on=by(Source.POLICY), per=Per(("own_tokens",)), **{part: parts[part]})
    found = term_loss(term, Scores(torch.zeros(2, 4).double().requires_grad_()), two_by_three(), {"t": 6.0})
    assert found is not None and torch.autograd.grad(found.loss, learned, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_closed_gate_lets_nothing_of_an_overflowing_ratio_through(dtype: torch.dtype) -> None:
    """0 times infinity is NaN; where PPO's clip is closed (here A is 1 and r is e^800) the weight is 0."""
    batch = two_by_three().with_columns(old_logp=torch.full((2, 4), -801.0, dtype=dtype))
    batch = replace(batch, advantage=torch.ones_like(batch.advantage))
    term = clipped("t", 0.2, 0.2, on=by(Source.POLICY), per=Per(("own_tokens",)))
    leaf = torch.full((2, 4), -1.0, dtype=dtype).requires_grad_()
    part = term_loss(term, Scores(leaf), batch, {"t": 6.0})
    assert part is not None and part.logged == pytest.approx(-1.2) and float(part.loss) == 0
    assert torch.autograd.grad(part.loss, leaf)[0].tolist() == [[0.0] * 4] * 2


def test_a_token_that_a_correction_takes_out_has_no_logged_loss_either() -> None:
    """A = -1 and r = e^800, which no clip closes; the correction is 0."""
    batch = two_by_three().with_columns(old_logp=torch.full((2, 4), -801.0).double())
    batch = replace(batch, advantage=-torch.ones_like(batch.advantage))
    none = clipped(
        "t", 0.2, 0.2, on=by(Source.POLICY), per=Per(("own_tokens",)), corrected=lambda logp, batch, on: torch.zeros_like(logp)
    )
    leaf = torch.full((2, 4), -1.0).double().requires_grad_()
    part = term_loss(none, Scores(leaf), batch, {"t": 6.0})
    assert part is not None and part.logged == 0.0
    assert torch.autograd.grad(part.loss, leaf)[0].tolist() == [[0.0] * 4] * 2


def test_no_gradient_flows_through_the_advantage() -> None:
    batch = two_by_three()
    advantage = batch.advantage.requires_grad_()
    term = surrogate("t", on=by(Source.POLICY), per=Per(("own_tokens",)))
    part = term_loss(term, Scores(torch.zeros(2, 4).double().requires_grad_()), batch, {"t": 6.0})
    assert part is not None and torch.autograd.grad(part.loss, advantage, allow_unused=True) == (None,)


@pytest.mark.parametrize("denominator", [*(d for d, _ in DENOMINATORS.values()), denominators.clipped_sequence(0.1, 0.1)])
def test_a_denominator_has_no_gradient(denominator: denominators.Denominator) -> None:
    batch = two_by_three().with_columns(behaviour_logp=torch.full((2, 4), -2.0).double())
    logp = torch.full((2, 4), -1.0).double().requires_grad_()
    assert not denominator(logp, batch, batch.trained).requires_grad


def test_a_sequence_without_tokens_of_the_term_has_a_ratio_of_1() -> None:
    batch = two_by_three().with_columns(old_logp=torch.full((2, 4), -2.0).double())
    logp = torch.full((2, 4), -1.0).double()
    assert torch.equal(denominators.sequence(logp, batch, torch.zeros_like(batch.trained)), logp)


@pytest.mark.parametrize(
    ("advantage", "opened"), [(1.0, [[1, 0, 1], [0, 1, 1]]), (-1.0, [[1, 1, 0], [0, 1, 1]]), (0.0, [[0, 0, 0], [0, 0, 0]])]
)
def test_a_clipped_terms_gradient_is_that_of_the_loss_it_logs(advantage: float, opened: list[list[int]]) -> None:
    """Bounds 0.8 and 1.2, dual 3, a correction of 2, 6 tokens: 2 r A / 6 where open. Neither part stops a gradient itself."""
    moved = torch.tensor([[0.1, 0.5, -0.5], [1.5, -0.1, 0.0]]).double()
    term = clipped(
        "t",
        0.2,
        0.2,
        on=by(Source.POLICY),
        per=Per(("own_tokens",)),
        denominator=lambda logp, batch, on: logp - torch.nn.functional.pad(moved, (1, 0)),
        dual=3.0,
        corrected=lambda logp, batch, on: 2 * torch.exp(logp + 1),
    )
    assert term.logged is not None
    expected = 2 * moved.exp() * advantage / 6 * torch.tensor(opened)
    for value in (term.value, term.logged):
        found = weights(replace(term, value=value), torch.full((2, 3), -1.0), two_by_three(advantage))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_old_is_the_current_policy_when_a_batch_is_used_once() -> None:
    batch = two_by_three().with_columns(behaviour_logp=torch.full((2, 4), -9.0).double())
    logp = torch.randn(2, 4)
    assert torch.equal(denominators.old(logp, batch, batch.trained), logp)


def test_shaping_needs_a_positive_gamma() -> None:
    with pytest.raises(ValueError, match="gamma"):
        denominators.shaped(0.0)


def test_what_is_logged_is_the_published_loss() -> None:
    """-A log p for REINFORCE; the clipped loss for PPO: ratio e at A = 1 is cut at 1.2."""
    batch = two_by_three().with_columns(old_logp=torch.full((2, 4), -2.0).double())
    logp = torch.full((2, 4), -1.0).double()
    on = by(Source.POLICY)(batch)
    assert float(reinforce_loss()(Scores(logp), batch, on)[on].mean()) == 1.0
    ppo = ppo_loss(denominators.old, 0.2, 0.2)
    assert float(ppo(Scores(logp), batch, on)[on].mean()) == pytest.approx(-1.2)
    minus = replace(batch, advantage=-batch.advantage)
    assert float(ppo(Scores(logp), minus, on)[on].mean()) == pytest.approx(math.e)


# --- weights within a sequence or group ----------------------------------------------------------------------------


def uneven() -> Batch:
    """Rows of 3, 1 and 2 own tokens; the first two are one group."""

    def own(n: int) -> Trajectory:
        return Trajectory((1,) * (n + 1), (Source.PROMPT,) + (Source.POLICY,) * n, reward=0.0)

    return double(to_batch([Group(Example("a", "", (1,)), (own(3), own(1))), Group(Example("b", "", (1,)), (own(2),))]))


def test_averages_within_sequences_and_groups() -> None:
    batch = uneven()
    on = by(Source.POLICY)(batch)
    assert token_sum(on, batch).sum(dim=1).tolist() == [3, 1, 2]
    torch.testing.assert_close(seq_mean(on, batch).sum(dim=1), torch.ones(3).double())
    torch.testing.assert_close(group_mean(on, batch).sum(dim=1), torch.tensor([3 / 4, 1 / 4, 1]).double())
    nothing = torch.zeros_like(on)
    assert float(seq_mean(nothing, batch).sum()) == 0 == float(group_mean(nothing, batch).sum())


def test_on_selects_by_author_and_by_rank() -> None:
    """A rejected answer is EXPERT text too: `best_by` is on the better one only; ties are both best."""

    def expert(reward: float) -> Trajectory:
        return Trajectory((1, 2), (Source.PROMPT, Source.EXPERT), reward=reward)

    def pair(name: str, *rewards: float) -> Group:
        return Group(Example(name, "", (1,)), tuple(expert(r) for r in rewards))

    batch = to_batch([pair("a", 0.0, 1.0), pair("b", 1.0, 1.0)])
    assert by(Source.EXPERT)(batch)[:, 1].tolist() == [True] * 4
    assert best_by(Source.EXPERT)(batch)[:, 1].tolist() == [False, True, True, True]
    assert not by(Source.POLICY)(batch).any()


# --- KL as a loss ---------------------------------------------------------------------------------------------------

PI = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REF = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64)


def expected_gradient(estimator: str) -> Tensor:
    """The gradient of the term on the logits, in expectation over own samples: every token enumerated, weighted by pi."""
    logits = PI.log().requires_grad_()
    term = kl("kl", on=by(Source.POLICY), per=Per(()), estimator=estimator)  # type: ignore[arg-type]
    total = torch.zeros(4, dtype=torch.float64)
    batch = double(tiny_batch([0.0], [0], tokens=1))
    for token in range(4):
        logp = torch.log_softmax(logits, dim=0)[token]
        scores = Scores(torch.stack([torch.zeros_like(logp), logp])[None])
        given_ref = batch.with_columns(ref_logp=torch.tensor([[math.nan, float(REF[token].log())]]).double())
        part = term_loss(term, scores, given_ref, {"kl": 1.0})
        assert part is not None
        total += PI[token] * torch.autograd.grad(part.loss, logits)[0]
    return total


def gradient_on_logits(divergence: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(divergence, logits)[0]


def test_k1_as_a_loss_has_no_expected_gradient() -> None:
    assert float(expected_gradient("k1").abs().max()) < 1e-15


def test_k2_as_a_loss_descends_the_reverse_kl() -> None:
    logits = PI.log().requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    reverse = (logp.exp() * (logp - REF.log())).sum()
    torch.testing.assert_close(expected_gradient("k2"), gradient_on_logits(reverse, logits))


def test_k3_as_a_loss_descends_the_forward_kl() -> None:
    logits = PI.log().requires_grad_()
    forward = (REF * (REF.log() - torch.log_softmax(logits, dim=0))).sum()
    torch.testing.assert_close(expected_gradient("k3"), gradient_on_logits(forward, logits))


@given(st.floats(-5, 5))
def test_kl_estimators_by_formula(d: float) -> None:
    batch = double(tiny_batch([0.0], [0], tokens=1)).with_columns(ref_logp=torch.tensor([[math.nan, -1.0]]).double())
    scores = Scores(torch.tensor([[0.0, -1.0 + d]], dtype=torch.float64))
    for estimator, formula in (("k1", d), ("k2", d * d / 2), ("k3", math.exp(-d) - 1 + d)):
        part = term_loss(kl("kl", on=by(Source.POLICY), per=Per(()), estimator=estimator), scores, batch, {"kl": 1.0})  # type: ignore[arg-type]
        assert part is not None and part.logged == pytest.approx(formula, abs=1e-9)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl("kl", on=by(Source.POLICY), per=Per(()), estimator="k4")  # type: ignore[arg-type]


def test_an_unknown_reference_is_not_read_as_certainty() -> None:
    """NaN in a column that a term reads makes its loss NaN, never 0."""
    batch = double(tiny_batch([0.0], [0], tokens=1)).with_columns(ref_logp=torch.full((1, 2), math.nan).double())
    part = term_loss(kl("kl", on=by(Source.POLICY), per=Per(())), Scores(torch.zeros(1, 2).double()), batch, {"kl": 1.0})
    assert part is not None and math.isnan(part.logged)


def test_a_coefficient_may_be_a_schedule_over_optimizer_steps() -> None:
    term = nll("t", on=by(Source.POLICY), per=Per(("own_tokens",)), coef=lambda step: 1.0 / (step + 1))
    batch = two_by_three()
    first = weights(term, torch.zeros(2, 3), batch)
    fourth = weights(term, torch.zeros(2, 3), replace(batch, step=3))
    torch.testing.assert_close(first, 4 * fourth)
