"""The one division: counts over the whole step, masks applied in one place, nothing outside them read."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crosstrain.objective.reduce import count, term_loss
from crosstrain.objective.terms import by, nll, pairwise_logistic
from crosstrain.training.batching import to_batch
from crosstrain.types import Batch, Count, Example, Group, Per, Scores, Source, Term, Trajectory

E, O, P = Source.EXPERT, Source.POLICY, Source.PROMPT  # noqa: E741


def made(*groups: list[tuple[str, float | None]]) -> Batch:
    letters = {"E": E, "O": O, "P": P}

    def one(text: str, reward: float | None) -> Trajectory:
        return Trajectory((1,) * (len(text) + 1), (P, *(letters[x] for x in text)), reward=reward)

    return to_batch([Group(Example(str(i), "", (1,)), tuple(one(*t) for t in g)) for i, g in enumerate(groups)])


BATCH = made([("EEE", 1.0), ("E", 0.0)], [("OO", 1.0), ("O", 1.0), ("OPO", 0.0)])


@pytest.mark.parametrize(
    ("counts", "sources", "expected"),
    [
        (("own_tokens",), (E,), 4),
        (("own_tokens",), (O,), 5),
        (("all_tokens",), (E,), 9),
        (("sequences",), (O,), 3),
        (("pairs",), (E,), 1),
        (("groups",), (E,), 2),
        (("sequences", "own_tokens"), (E,), 8),
        ((), (E,), 1),
    ],
)
def test_what_a_term_is_divided_by(counts: tuple[Count, ...], sources: tuple[Source, ...], expected: int) -> None:
    term = nll("t", on=by(*sources), per=Per(counts, constant=2.5))
    other = nll("other", on=by(E, O), per=Per(("own_tokens",)))
    assert count([term, other], BATCH, groups=2)["t"] == expected * 2.5


def test_groups_may_be_counted_as_collected() -> None:
    before, after = (nll("t", on=by(O), per=Per(("groups",), when=when)) for when in ("before", "after"))
    assert count([before], BATCH, groups=2, groups_before_select=6)["t"] == 6
    assert count([after], BATCH, groups=2, groups_before_select=6)["t"] == 2


def test_a_term_with_nothing_to_be_on_counts_0_and_has_no_loss() -> None:
    """Also when its denominator is a constant or a count of groups."""
    for per in (Per(("own_tokens",)), Per(("groups",)), Per((), constant=7.0)):
        term = nll("t", on=by(Source.TOOL), per=per)
        counts = count([term], BATCH, groups=2)
        assert counts == {"t": 0.0}
        assert term_loss(term, Scores(torch.zeros(5, 4)), BATCH, counts) is None


def test_a_micro_batch_without_the_terms_tokens_adds_nothing() -> None:
    term = nll("t", on=by(E), per=Per(("own_tokens",)))
    counts = count([term], BATCH, groups=2)
    rows = torch.tensor([2, 3])
    assert term_loss(term, Scores(torch.zeros(2, 4)), BATCH.rows(rows), counts) is None


def test_nothing_outside_the_mask_reaches_a_value() -> None:
    """Scores, advantages and columns are 0 there, whatever they held: also NaN, and also for the gradient."""
    seen: dict[str, Tensor] = {}

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        seen.update(logp=scores.logp, extra=scores.channels["extra"], advantage=batch.advantage, ref=batch.columns["ref_logp"])
        return -scores.logp * scores.channels["extra"]

    term = Term("t", value, by(E), Per(("own_tokens",)))
    nan = torch.full((5, 4), math.nan)
    inside = BATCH.written_by(E)
    logp = torch.where(inside, torch.full_like(nan, -1.0), nan).requires_grad_()
    scores = Scores(logp, {"extra": torch.where(inside, torch.ones_like(nan), nan)})
    batch = replace(BATCH, advantage=torch.where(inside, torch.ones_like(nan), nan)).with_columns(
        ref_logp=torch.where(inside, -2.0, nan)
    )
    part = term_loss(term, scores, batch, {"t": 4.0})
    assert part is not None and part.logged == 1.0
    assert all(float(x.detach()[~inside].abs().sum()) == 0 for x in seen.values())
    (gradient,) = torch.autograd.grad(part.loss, logp)
    assert torch.equal(gradient, torch.where(inside, -0.25, 0.0))


def test_a_column_with_a_number_per_row_reaches_a_value_whole() -> None:
    """Two of the five rows have EXPERT tokens: 1 + 2."""
    batch = BATCH.with_columns(weight=torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    term = Term("t", lambda s, b, on: b.columns["weight"], by(E), Per(()))
    part = term_loss(term, Scores(torch.zeros(5, 4)), batch, {"t": 1.0})
    assert part is not None and part.logged == 3.0


def test_what_a_value_returns_outside_the_mask_is_left_out() -> None:
    """Per token and per sequence; a row is inside when any of its tokens is."""
    per_token = Term("t", lambda s, b, on: torch.ones(5, 4), by(E), Per(()))
    per_row = Term("t", lambda s, b, on: torch.ones(5), by(E), Per(()))
    scores = Scores(torch.zeros(5, 4))
    losses = [term_loss(t, scores, BATCH, {"t": 1.0}) for t in (per_token, per_row)]
    assert [p.logged for p in losses if p is not None] == [4.0, 2.0]


def test_a_value_per_pair_is_summed_over_pairs() -> None:
    batch = made([("E", 1.0), ("E", 0.0)], [("E", 0.0), ("E", 1.0)], [("E", 1.0), ("E", 1.0)])
    batch = batch.with_columns(ref_logp=torch.zeros(6, 2))
    term = pairwise_logistic("t", beta=1.0, on=by(E))
    counts = count([term], batch, groups=3)
    assert counts["t"] == 2
    part = term_loss(term, Scores(torch.zeros(6, 2)), batch, counts)
    assert part is not None and part.logged == pytest.approx(math.log(2))


def test_the_coefficient_multiplies_loss_and_logged_value() -> None:
    base = nll("t", on=by(E), per=Per(("own_tokens",)))
    logp = torch.full((5, 4), -1.0)
    for term in (replace(base, coef=0.5), replace(base, coef=0.5, logged=base.value)):
        part = term_loss(term, Scores(logp), BATCH, {"t": 4.0})
        assert part is not None and (float(part.loss), part.logged) == (0.5, 0.5)
