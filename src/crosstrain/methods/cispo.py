"""CISPO and SAPO: GRPO without a clip that closes tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from crosstrain.methods.checks import inert, positive
from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.denominators import capped, old
from crosstrain.objective.gates import soft
from crosstrain.objective.terms import by, seq_mean, surrogate
from crosstrain.types import Batch, Method, Per, Scores, Source, Updates, Value


@method(
    paper="arXiv:2506.13585",
    family="reinforcement learning",
    checked="port",
    deviates=(
        "The paper names no bound. TRL's is an absolute cap, the default here; verl's is a band around 1 that cuts from "
        "below too."
    ),
)
def cispo(
    num_generations: int = 8,
    epsilon_high: float = 5.0,
    bounds: Literal["cap", "band"] = "cap",
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 16,
) -> Method:
    """CISPO: every token keeps its gradient; what is cut is the size of its importance weight.

    Loss (logged): -sum_t sg(r') A log pi(y_t) / N over all tokens of the step, with r' = r = pi / pi_old cut, and the
    group-normalised A of `grpo`. Weight on grad log pi: A r' / N.

    bounds: two meanings of the upper bound are in use. "cap": r' = min(r, epsilon_high), an absolute cap, as in TRL; the paper sets
    no lower bound. "band": r' = clip(r, 1 - epsilon, 1 + epsilon_high), as in verl. epsilon_high: the upper bound of the ratio; the
    paper names no number, 5 is TRL's example. epsilon: the lower bound of "band" alone.
    """
    if bounds not in ("cap", "band"):
        raise ValueError(f"bounds: got {bounds!r}; allowed: cap, band")
    positive(epsilon_high=epsilon_high)
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon: got {epsilon}; it must be in (0, 1], and with 1 no ratio is cut from below")
    if bounds == "cap":
        inert("bounds is 'cap'", epsilon=(epsilon, 0.2))
    cut = capped(None, epsilon_high) if bounds == "cap" else capped(1 - epsilon, 1 + epsilon_high)

    def published(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        logp = scores.logp
        return -(logp - cut(logp, batch, on)).exp() * batch.advantage * logp

    term = surrogate(
        "rl",
        on=by(Source.POLICY),
        per=Per(("own_tokens",)),
        denominator=cut,
        logged=published,
        needs=frozenset({"old_logp"}),
        describe="-sg(cut(r)) A log pi, r = pi / old",
    )
    return Method(
        terms=(term,),
        plan=rollouts(num_generations),
        advantage=group_normalised,
        updates=Updates(num_iterations, minibatches),
    )


@method(paper="arXiv:2511.20347", family="reinforcement learning", checked="port")
def sapo(
    num_generations: int = 8,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    num_iterations: int = 1,
    minibatches: int = 4,
) -> Method:
    """SAPO: a soft gate around ratio 1 in place of a clip.

    Loss (logged): mean over sequences of the mean over tokens of -A (4 / tau) sigmoid(tau (r - 1)), r = pi / pi_old, with the
    group-normalised A of `grpo`; tau is temperature_pos for A > 0, else temperature_neg. Weight on grad log pi:
    A 4 s (1 - s) r / (T_i N) with s = sigmoid(tau (r - 1)), which is A / (T_i N) at r = 1.

    temperature_pos, temperature_neg: how narrow the gate is for a positive and a negative advantage; 1 and 1.05 in the paper.
    """
    positive(temperature_pos=temperature_pos, temperature_neg=temperature_neg)
    term = surrogate(
        "rl",
        on=by(Source.POLICY),
        per=Per(("sequences",)),
        denominator=old,
        gate=soft(temperature_pos, temperature_neg),
        normalise=seq_mean,
        logged=_sigmoid_loss(temperature_pos, temperature_neg),
        needs=frozenset({"old_logp"}),
        describe="-A (4 / tau) sigmoid(tau (r - 1)), r = pi / old",
    )
    return Method(
        terms=(term,),
        plan=rollouts(num_generations),
        advantage=group_normalised,
        updates=Updates(num_iterations, minibatches),
    )


def _sigmoid_loss(positive: float, negative: float) -> Value:
    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        ratio = (scores.logp - old(scores.logp, batch, on)).exp()
        tau = (batch.advantage > 0).to(ratio.dtype) * (positive - negative) + negative
        return -batch.advantage * 4 / tau * (tau * (ratio - 1)).sigmoid() * seq_mean(on, batch)

    return value
