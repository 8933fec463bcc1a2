"""The building blocks of objectives.

`surrogate` is the one primitive of the policy-gradient family:

    value_t = -gate_t * exp(logp_t - log_den_t) * A_t          gate, log_den and A carry no gradient

whose weight on grad log pi is gate * (pi / den) * A, the four parts of the Unified Policy Gradient Estimator
(arXiv:2509.04419). `nll`, `kl` and `pairwise_logistic` are ordinary terms whose value is the published loss.
Every value function receives scores and columns that are 0 outside the term's own mask (see `reduce`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from crosstrain.objective.denominators import Denominator, current, old
from crosstrain.objective.gates import Gate, always, ppo_clip
from crosstrain.objective.returns import divergence
from crosstrain.objective.words import says, words_of
from crosstrain.types import Batch, On, Per, Schedule, Scores, Source, Term, Value

Normalise = Callable[[Tensor, Batch], Tensor]
"""A weight per token from what belongs to one sequence or group: `(on [B, T], batch) -> [B, T]`."""


def by(*sources: Source) -> On:
    """The trained tokens that one of `sources` wrote."""
    return lambda batch: batch.written_by(*sources)


def best_by(*sources: Source) -> On:
    """As `by`, in the best-rewarded rows of each group only (a rejected answer is EXPERT text too)."""
    return lambda batch: batch.written_by(*sources) & (batch.rank == 0)[:, None]


@says("")
def token_sum(on: Tensor, batch: Batch) -> Tensor:
    """Weight 1: nothing is divided within a sequence."""
    return on.to(batch.advantage.dtype)


@says("mean over each sequence")
def seq_mean(on: Tensor, batch: Batch) -> Tensor:
    """Weight 1 / T_i with T_i the term's own tokens of the sequence: a mean over each sequence."""
    weight = on.to(batch.advantage.dtype)
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=1)


@says("mean over the tokens of each group")
def group_mean(on: Tensor, batch: Batch) -> Tensor:
    """Weight 1 / (the term's own tokens in the group): a token mean over each group. Needs `unit="group"`."""
    weight = on.to(batch.advantage.dtype)
    index = torch.unique(batch.group, return_inverse=True)[1]
    totals = weight.new_zeros(int(index.max()) + 1).index_add(0, index, weight.sum(dim=1))
    return weight / totals[index].clamp(min=1)[:, None]


def surrogate(
    name: str,
    *,
    on: On,
    per: Per,
    denominator: Denominator = current,
    gate: Gate = always,
    corrected: Callable[[Tensor, Batch, Tensor], Tensor] | None = None,
    normalise: Normalise = token_sum,
    coef: float | Schedule = 1.0,
    unit: Literal["token", "sequence", "group"] = "token",
    logged: Value | None = None,
    needs: frozenset[str] = frozenset(),
    describe: str = "",
) -> Term:
    """A policy-gradient term: `-gate * exp(logp - log_den) * A` per token, [B, T].

    The ratio's gradient flows through logp only: that of denominators, gates and corrections, whatever they are made of, and of
    the advantage is stopped here. corrected: a further factor (see `gates.correction`).
    """

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        logp = scores.logp.detach()
        with torch.no_grad():
            log_den = denominator(logp, batch, on)
            opened = gate(torch.exp(logp - log_den), logp, batch, on)
            if corrected is not None:
                opened = opened * corrected(logp, batch, on)
        apart = scores.logp - log_den
        # where the gate is closed nothing may come through: 0 times a ratio that overflows would be NaN
        ratio = torch.exp(torch.where(opened == 0, torch.zeros_like(apart), apart))
        return -opened * ratio * batch.advantage.detach() * normalise(on, batch)

    slots = {
        "gate": words_of(gate) + ("" if corrected is None else f"; times {words_of(corrected)}"),
        "denominator": words_of(denominator),
        "within": words_of(normalise),
    }
    return Term(name, value, on, per, coef, unit, needs, logged, describe, slots)


def unclipped(name: str, *, on: On, per: Per) -> Term:
    """`surrogate` of the ratio to the policy that sampled, without a clip: -A r, whose weight is r A."""
    return surrogate(name, on=on, per=per, denominator=old, needs=frozenset({"old_logp"}), describe="-A r, r = pi / old")


def clipped(
    name: str,
    low: float,
    high: float,
    *,
    on: On,
    per: Per,
    denominator: Denominator = old,
    dual: float | None = None,
    corrected: Callable[[Tensor, Batch, Tensor], Tensor] | None = None,
    normalise: Normalise = token_sum,
    coef: float | Schedule = 1.0,
    unit: Literal["token", "sequence", "group"] = "token",
    needs: frozenset[str] = frozenset(),
    describe: str = "max(-A r, -A clip(r)), r = pi / old",
) -> Term:
    """PPO's clipped term: `surrogate` with `ppo_clip(low, high, dual)`, logged as `ppo_loss` with the same bounds."""
    return surrogate(
        name,
        on=on,
        per=per,
        denominator=denominator,
        gate=ppo_clip(low, high, dual),
        corrected=corrected,
        normalise=normalise,
        coef=coef,
        unit=unit,
        logged=ppo_loss(denominator, low, high, normalise, dual, corrected),
        needs=needs | {"old_logp"},
        describe=describe,
    )


def ppo_loss(
    denominator: Denominator,
    low: float,
    high: float,
    normalise: Normalise = token_sum,
    dual: float | None = None,
    corrected: Callable[[Tensor, Batch, Tensor], Tensor] | None = None,
) -> Value:
    """PPO's published loss max(-A r, -A clip(r, 1 - low, 1 + high)) per token, [B, T], to be logged; with `dual`, at most -dual A
    for A < 0.

    Its gradient equals that of `surrogate` with `ppo_clip(low, high, dual)`; a test holds them together.
    """

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        logp, advantage = scores.logp.detach(), batch.advantage
        ratio = torch.exp(scores.logp - denominator(logp, batch, on))
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
        if dual is not None:
            loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)
        if corrected is not None:
            factor = corrected(logp, batch, on)
            loss = torch.where(factor == 0, torch.zeros_like(loss), loss * factor)  # 0 times infinity would be NaN
        return loss * normalise(on, batch)

    return value


def reinforce_loss(normalise: Normalise = token_sum) -> Value:
    """-A logp per token, [B, T], to be logged beside a surrogate whose denominator is the current policy."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return -batch.advantage * scores.logp * normalise(on, batch)

    return value


def of_channel(
    name: str, channel: str, *, on: On, per: Per, normalise: Normalise = token_sum, coef: float = 1.0, describe: str = ""
) -> Term:
    """The channel `channel` itself as a loss per token, [B, T]."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return scores.channels[channel] * normalise(on, batch)

    return Term(
        name, value, on, per, coef, needs=frozenset({channel}), describe=describe, slots={"within": words_of(normalise)}
    )


def entropy_bonus(name: str, *, on: On, per: Per, normalise: Normalise = token_sum, coef: float = 0.001) -> Term:
    """-H per token, [B, T], with H the entropy of the next-token distribution in nats: keeps the policy from narrowing."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return -scores.channels["entropy"] * normalise(on, batch)

    return Term(name, value, on, per, coef, needs=frozenset({"entropy"}), describe="-H", slots={"within": words_of(normalise)})


def nll(
    name: str,
    *,
    on: On,
    per: Per,
    normalise: Normalise = token_sum,
    coef: float | Schedule = 1.0,
    unit: Literal["token", "sequence", "group"] = "token",
    describe: str = "-log pi",
) -> Term:
    """Negative log-likelihood, -logp per token, [B, T], in nats."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return -scores.logp * normalise(on, batch)

    slots = {"gate": "1", "denominator": "pi", "advantage": "1", "within": words_of(normalise)}
    return Term(name, value, on, per, coef, unit, describe=describe, slots=slots)


def kl(
    name: str,
    *,
    on: On,
    per: Per,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    normalise: Normalise = token_sum,
    coef: float | Schedule = 1.0,
) -> Term:
    """A KL penalty to the frozen reference as a loss, per token, [B, T], with d = logp - ref_logp.

    k1: d (as a loss on own samples it has zero expected gradient). k2: d^2 / 2 (the reverse-KL gradient).
    k3: exp(-d) - 1 + d (GRPO, arXiv:2402.03300; its gradient is that of the forward KL(ref || pi)).
    """
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl: got estimator={estimator!r}; allowed: k1, k2, k3")

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return divergence(scores.logp - batch.columns["ref_logp"], estimator) * normalise(on, batch)

    describe = f"{estimator} of log pi - log ref"
    return Term(
        name, value, on, per, coef, needs=frozenset({"ref_logp"}), describe=describe, slots={"within": words_of(normalise)}
    )


def pairwise(
    name: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    on: On,
    reference: bool = True,
    average: bool = False,
    coef: float | Schedule = 1.0,
    describe: str = "",
) -> Term:
    """A loss of preference pairs, [P]: `loss(chosen [P], rejected [P])` of what `pair_scores` gives each answer."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return loss(*pair_scores(scores, batch, on, reference=reference, average=average))

    needs = frozenset({"ref_logp"}) if reference else frozenset()
    return Term(name, value, on, Per(("pairs",)), coef, unit="group", needs=needs, describe=describe)


def pairwise_logistic(name: str, *, beta: float, label_smoothing: float = 0.0, on: On, coef: float | Schedule = 1.0) -> Term:
    """DPO's loss per preference pair, [P]: -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D).

    D = sum over the better answer's tokens of (logp - ref_logp) minus the same sum over the worse answer's. e is
    `label_smoothing` (conservative DPO). Weight: +-(1 - e) beta sigmoid(-beta D) -+ e beta sigmoid(beta D) on every token.
    DPO, arXiv:2305.18290, eq. 7.
    """

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        margin = beta * (chosen - rejected)
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)

    smoothed = f"-{1 - label_smoothing:g} log sigmoid({beta:g} D) - {label_smoothing:g} log sigmoid(-{beta:g} D)"
    formula = smoothed if label_smoothing else f"-log sigmoid({beta:g} D)"
    describe = f"{formula}, D = d_chosen - d_rejected, d = sum of log pi - log ref"
    return pairwise(name, loss, on=on, coef=coef, describe=describe)


def pair_scores(
    scores: Scores, batch: Batch, on: Tensor, *, reference: bool = True, average: bool = False
) -> tuple[Tensor, Tensor]:
    """Of each pair's better and worse answer, [P] each: the sum over its tokens of logp, less ref_logp with `reference`, in nats;
    with `average` the mean over its tokens."""
    moved = scores.logp - batch.columns["ref_logp"] if reference else scores.logp
    totals = moved.sum(dim=1)
    if average:
        totals = totals / on.sum(dim=1).clamp(min=1)
    better, worse = batch.pairs()
    return totals[better], totals[worse]
