"""Credits and terms on numbers worked by hand, one for each part that could be left out or turned round."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crosstrain.objective.advantages import group_normalised, mean_over, whitened
from crosstrain.objective.denominators import current, old
from crosstrain.objective.gates import always
from crosstrain.objective.reduce import count, term_loss
from crosstrain.objective.terms import (
    by,
    clipped,
    entropy_bonus,
    group_mean,
    kl,
    nll,
    of_channel,
    pair_scores,
    pairwise,
    pairwise_logistic,
    ppo_loss,
    reinforce_loss,
    seq_mean,
    surrogate,
)
from crosstrain.training.batching import to_batch
from crosstrain.types import Batch, Example, Group, Per, Scores, Source, Term, Trajectory

OWN = by(Source.POLICY)


def row(n: int, reward: float | None = None, source: Source = Source.POLICY) -> Trajectory:
    return Trajectory((1,) * (n + 1), (Source.PROMPT,) + (source,) * n, reward=reward)


def batch_of(*groups: tuple[Trajectory, ...]) -> Batch:
    batch = to_batch([Group(Example(f"e:{i}", "", (1,)), rows) for i, rows in enumerate(groups)])
    return replace(batch, reward=batch.reward.double(), advantage=batch.advantage.double())


def weights(term: Term, batch: Batch, logp: Tensor, **channels: Tensor) -> tuple[float, float, list[list[float]]]:
    """The loss, what is logged, and minus the gradient on log-probs of trained tokens, by row."""
    leaf = logp.clone().requires_grad_()
    part = term_loss(term, Scores(leaf, channels), batch, count([term], batch, groups=len(torch.unique(batch.group))))
    assert part is not None
    found = torch.zeros_like(leaf)
    if part.loss.requires_grad:
        found = torch.autograd.grad(part.loss, leaf, allow_unused=True)[0]
        found = torch.zeros_like(leaf) if found is None else found
    rows = [[float(-found[r, t]) for t in range(leaf.shape[1]) if bool(batch.trained[r, t])] for r in range(len(batch))]
    return float(part.loss.detach()), part.logged, rows


def test_a_std_is_of_those_it_is_taken_over_alone() -> None:
    """Rollouts 1 and 0 have a mean of 0.5 and a std of sqrt(0.5); the demonstration's 5 is in neither."""
    batch = batch_of((row(1, 5.0, Source.EXPERT), row(1, 1.0), row(1, 0.0)))
    found = group_normalised(batch, std_eps=0.5, over=(Source.POLICY,))
    scale = math.sqrt(0.5) + 0.5
    assert found.tolist() == pytest.approx([4.5 / scale, 0.5 / scale, -0.5 / scale])


def test_a_group_of_one_has_its_reward_and_two_are_normalised() -> None:
    batch = batch_of((row(1, 0.25),), (row(1, 3.0), row(1, 1.0)))
    assert group_normalised(batch).tolist() == pytest.approx([0.25, 1 / (math.sqrt(2) + 1e-6), -1 / (math.sqrt(2) + 1e-6)])


def test_a_mean_over_no_row_is_0() -> None:
    batch = batch_of((row(1, 2.0), row(1, 4.0)))
    assert mean_over(batch, batch.reward, torch.tensor([True, False])).tolist() == [2.0, 2.0]
    assert mean_over(batch, batch.reward, torch.tensor([False, False])).tolist() == [0.0, 0.0]


def test_whitening_counts_a_row_as_often_as_it_has_tokens() -> None:
    """Values 0 on one token and 1 on three: mean 3/4, variance (9/16 + 3/16) / 3 = 1/4."""
    batch = batch_of((row(1, 0.0), row(3, 0.0)))
    values = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert whitened(batch, values).tolist() == pytest.approx([-1.5, 0.5])
    assert whitened(batch, values, eps=0.5).tolist() == pytest.approx([-0.75, 0.25])


def test_whitening_leaves_out_what_a_tool_answered() -> None:
    """Own tokens: 1 of value 1, 1 of value 0; the first row's two tool tokens are counted nowhere."""
    one = Trajectory((1,) * 4, (Source.PROMPT, Source.POLICY, Source.TOOL, Source.TOOL), reward=1.0)
    values = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = whitened(batch_of((one, row(1, 0.0))), values)
    assert found.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])


def test_two_tokens_can_be_whitened_and_one_cannot() -> None:
    values = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert whitened(batch_of((row(1, 0.0), row(1, 0.0))), values).tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert whitened(batch_of((row(1, 0.0),)), values[:1]).tolist() == [0.0]


def test_a_surrogates_weight_has_every_factor() -> None:
    """coef 2, gate 1/2, correction 3, r = e^0.5, A = -4, a mean over two tokens, two sequences: 2 1/2 3 e^0.5 (-4) / 2 / 2."""

    def half(ratio: Tensor, logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return torch.full_like(ratio, 0.5)

    def three(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return torch.full_like(logp, 3.0)

    term = surrogate(
        "rl", on=OWN, per=Per(("sequences",)), denominator=old, gate=half, corrected=three, normalise=seq_mean, coef=2.0
    )
    batch = batch_of((row(2, 0.0), row(2, 0.0)))
    batch = replace(batch, advantage=torch.full_like(batch.advantage, -4.0))
    batch = batch.with_columns(old_logp=torch.full(batch.tokens.shape, -1.5, dtype=torch.float64))
    logp = torch.full(batch.tokens.shape, -1.0, dtype=torch.float64)
    one = 2 * 0.5 * 3 * math.exp(0.5) * -4 / 2 / 2
    loss, _, found = weights(term, batch, logp)
    assert found == [pytest.approx([one, one])] * 2 and loss == pytest.approx(-4 * one)


@pytest.mark.parametrize(
    ("advantage", "moved", "dual", "loss"),
    [
        (2.0, 0.5, None, -2.0 * 1.2),
        (2.0, -0.5, None, -2.0 * math.exp(-0.5)),
        (-2.0, -0.5, None, 2.0 * 0.8),
        (-2.0, 0.5, None, 2.0 * math.exp(0.5)),
        (-2.0, 2.0, 3.0, 2.0 * 3.0),
        (2.0, 2.0, 3.0, -2.0 * 1.2),
        (0.0, 2.0, 3.0, 0.0),
    ],
)
def test_ppos_loss_is_logged_as_published(advantage: float, moved: float, dual: float | None, loss: float) -> None:
    """One token of two in a row, half of each; a correction of 3 multiplies all of it."""
    batch = batch_of((row(2, 0.0),))
    batch = replace(batch, advantage=torch.full_like(batch.advantage, advantage))
    batch = batch.with_columns(old_logp=torch.full(batch.tokens.shape, -3.0 - moved, dtype=torch.float64))
    logp = torch.full(batch.tokens.shape, -3.0, dtype=torch.float64)

    def three(logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
        return torch.full_like(logp, 3.0)

    seen = replace(batch, columns={k: torch.where(batch.trained, c, 0.0) for k, c in batch.columns.items() if c.ndim == 2})
    value = ppo_loss(old, 0.2, 0.2, seq_mean, dual)(Scores(logp), seen, batch.trained)
    assert value[0, 1:].tolist() == pytest.approx([loss / 2] * 2)
    term = clipped("rl", 0.2, 0.2, on=OWN, per=Per(("sequences",)), dual=dual, corrected=three, normalise=seq_mean, coef=0.5)
    assert weights(term, batch, logp)[1] == pytest.approx(0.5 * 3 * loss)


def test_a_clipped_term_reads_old_log_probs_and_what_its_parts_read() -> None:
    assert clipped("rl", 0.2, 0.2, on=OWN, per=Per(("sequences",)), needs=frozenset({"x"})).needs == {"x", "old_logp"}


def test_reinforce_is_logged_as_minus_a_log_pi() -> None:
    batch = batch_of((row(2, 0.0),))
    batch = replace(batch, advantage=torch.full_like(batch.advantage, 3.0))
    term = surrogate("rl", on=OWN, per=Per(("sequences",)), denominator=current, gate=always, logged=reinforce_loss(seq_mean))
    logp = torch.tensor([[0.0, -1.0, -2.0]], dtype=torch.float64)
    assert weights(term, batch, logp)[1] == pytest.approx(3.0 * (1 + 2) / 2)


@pytest.mark.parametrize(
    ("estimator", "value", "weight"),
    [("k1", 0.5, -1.0), ("k2", 0.125, -0.5), ("k3", math.exp(-0.5) - 1 + 0.5, math.exp(-0.5) - 1)],
)
def test_kl_estimators_by_hand(estimator: Any, value: float, weight: float) -> None:
    """d = 0.5 on two tokens of one sequence, averaged over it, times a coefficient of 2."""
    batch = batch_of((row(2, 0.0),)).with_columns(ref_logp=torch.full((1, 3), -1.5, dtype=torch.float64))
    term = kl("kl", on=OWN, per=Per(("sequences",)), estimator=estimator, normalise=seq_mean, coef=2.0)
    loss, _, found = weights(term, batch, torch.full((1, 3), -1.0, dtype=torch.float64))
    assert loss == pytest.approx(2 * value) and found[0] == pytest.approx([weight, weight])


def test_nll_entropy_and_channels_by_hand() -> None:
    batch = batch_of((row(2, 0.0),))
    logp = torch.tensor([[0.0, -1.0, -2.0]], dtype=torch.float64)
    channel = torch.tensor([[9.0, 0.5, 2.5]], dtype=torch.float64)
    per = Per(("sequences",))
    assert weights(nll("n", on=OWN, per=per, normalise=seq_mean, coef=3.0), batch, logp)[0] == pytest.approx(3 * 1.5)
    assert weights(entropy_bonus("e", on=OWN, per=per, normalise=seq_mean, coef=0.5), batch, logp, entropy=channel)[0] == -0.75
    assert weights(of_channel("c", "x", on=OWN, per=per, normalise=seq_mean, coef=4.0), batch, logp, x=channel)[0] == 6.0


def test_a_group_mean_is_over_the_tokens_of_the_group() -> None:
    """Three tokens in the first group, one in the second: a third each, and one."""
    batch = batch_of((row(2, 0.0), row(1, 0.0)), (row(1, 0.0),))
    assert group_mean(batch.trained, batch).tolist() == [
        pytest.approx([0, 1 / 3, 1 / 3]),
        pytest.approx([0, 1 / 3, 0]),
        pytest.approx([0, 1, 0]),
    ]
    nothing = torch.zeros_like(batch.trained)
    assert float(group_mean(nothing, batch).sum()) == 0.0 and float(seq_mean(nothing, batch).sum()) == 0.0


def test_dpo_with_smoothing_by_hand() -> None:
    """Margin beta (d_chosen - d_rejected) = 0.5 (1 + 0.5) = 0.75 and a fifth of it the wrong way round; coefficient 3."""
    batch = batch_of((row(2, 1.0, Source.EXPERT), row(1, 0.0, Source.EXPERT)))
    batch = batch.with_columns(ref_logp=torch.tensor([[0.0, -1.0, -1.0], [0.0, -1.0, 0.0]], dtype=torch.float64))
    logp = torch.tensor([[0.0, -0.5, -0.5], [0.0, -1.5, 0.0]], dtype=torch.float64)
    term = pairwise_logistic("dpo", beta=0.5, label_smoothing=0.2, on=by(Source.EXPERT), coef=3.0)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    loss, _, found = weights(term, batch, logp)
    assert loss == pytest.approx(3 * (-0.8 * math.log(sigmoid(0.75)) - 0.2 * math.log(sigmoid(-0.75))))
    w = 3 * 0.5 * (0.8 * sigmoid(-0.75) - 0.2 * sigmoid(0.75))
    assert found == [pytest.approx([w, w]), pytest.approx([-w])]


@pytest.mark.parametrize(
    ("reference", "average", "better", "worse"),
    [(True, False, 1.0, -0.5), (False, False, -1.0, -1.5), (True, True, 0.5, -0.5), (False, True, -0.5, -1.5)],
)
def test_what_a_pairs_answers_score(reference: bool, average: bool, better: float, worse: float) -> None:
    """Two tokens of -1/2 where the reference has -1, and one of -3/2 where it has -1."""
    batch = batch_of((row(2, 1.0, Source.EXPERT), row(1, 0.0, Source.EXPERT)))
    if reference:
        batch = batch.with_columns(ref_logp=torch.tensor([[0.0, -1.0, -1.0], [0.0, -1.0, 0.0]], dtype=torch.float64))
    scores = Scores(torch.tensor([[0.0, -0.5, -0.5], [0.0, -1.5, 0.0]], dtype=torch.float64))
    found = pair_scores(scores, batch, batch.trained, reference=reference, average=average)
    assert [x.tolist() for x in found] == [[better], [worse]]


def test_a_pairs_answer_without_a_token_of_the_term_scores_0() -> None:
    batch = batch_of((row(2, 1.0, Source.EXPERT), row(1, 0.0)))
    on = by(Source.EXPERT)(batch)
    scores = Scores(torch.where(on, -1.0, torch.zeros(2, 3, dtype=torch.float64)))
    assert [x.tolist() for x in pair_scores(scores, batch, on, reference=False, average=True)] == [[-1.0], [0.0]]


def test_a_loss_of_pairs_reads_the_reference_only_where_it_is_asked_to() -> None:
    for reference, needs in ((True, {"ref_logp"}), (False, set())):
        assert pairwise("p", lambda one, other: other - one, on=OWN, reference=reference).needs == needs
