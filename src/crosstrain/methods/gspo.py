"""GSPO and GMPO: group-relative policy optimisation with the ratio of a whole sequence."""

from __future__ import annotations

from torch import Tensor

from crosstrain.methods.checks import clip, positive
from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.denominators import clipped_sequence, sequence
from crosstrain.objective.gates import token_clip
from crosstrain.objective.terms import by, clipped, seq_mean, surrogate
from crosstrain.types import Batch, Method, Per, Scores, Source, Updates, Value

OLD = frozenset({"old_logp"})


@method(
    paper="arXiv:2507.18071",
    family="reinforcement learning",
    checked="port",
    deviates="verl's port cuts a sequence's mean log-ratio at 10; here it is not cut.",
)
def gspo(
    num_generations: int = 8, epsilon: float = 3e-4, epsilon_high: float = 4e-4, num_iterations: int = 1, minibatches: int = 4
) -> Method:
    """GSPO: the ratio is that of the sequence, and a sequence is clipped as a whole.

    Loss (logged): mean over sequences of max(-A s, -A clip(s, 1 - epsilon, 1 + epsilon_high)) with the group-normalised A of
    `grpo` and s = exp(mean_t log(pi / pi_old)). Weight on grad log pi: gate s A / (T_i N), the same for every token.

    epsilon, epsilon_high: the bounds of the clip, the paper's; s moves far less than a token's ratio. minibatches: the paper's four
    optimizer steps per batch. The paper's token form (GSPO-token) has this gradient as long as A is one number per sequence, which
    it is here.
    """
    clip(epsilon=epsilon, high=epsilon_high)
    term = clipped(
        "rl",
        epsilon,
        epsilon_high,
        on=by(Source.POLICY),
        per=Per(("sequences",)),
        denominator=sequence,
        normalise=seq_mean,
        unit="sequence",
        describe="max(-A s, -A clip(s)), s = exp(mean log(pi / old))",
    )
    return Method(
        terms=(term,),
        plan=rollouts(num_generations),
        advantage=group_normalised,
        updates=Updates(num_iterations, minibatches),
    )


@method(
    paper="arXiv:2507.20673",
    family="reinforcement learning",
    deviates="A group's std gets GRPO's 1e-6 added, so that with one update the gradient is that of `grpo`; the authors' code adds "
    "1e-8 (TRL: 1e-4).",
)
def gmpo(num_generations: int = 8, epsilon: float = 0.4, num_iterations: int = 1, minibatches: int = 8) -> Method:
    """GMPO: the geometric mean of the tokens' ratios, each clipped by itself.

    Loss: mean over sequences of -A rho, rho = exp(mean_t clip(log(pi / pi_old))), where a log-ratio is cut at +epsilon for A > 0
    and at -epsilon for A < 0, with the group-normalised A of `grpo`. Weight on grad log pi: A rho / (T_i N), 0 for tokens whose
    log-ratio is cut.

    epsilon: the bound of a token's log-ratio, 0.4, so that ratios are in exp(-0.4) to exp(0.4). minibatches: 1,024 rollouts in
    mini-batches of 128 in the paper.
    """
    positive(epsilon=epsilon)
    term = surrogate(
        "rl",
        on=by(Source.POLICY),
        per=Per(("sequences",)),
        denominator=clipped_sequence(epsilon, epsilon),
        gate=token_clip(epsilon, epsilon),
        normalise=seq_mean,
        unit="sequence",
        logged=geometric_mean_loss(epsilon),
        needs=OLD,
        describe="-A rho, rho = exp(mean clip(log(pi / old)))",
    )
    return Method(
        terms=(term,),
        plan=rollouts(num_generations),
        advantage=group_normalised,
        updates=Updates(num_iterations, minibatches),
    )


def geometric_mean_loss(epsilon: float) -> Value:
    """-A rho shared out over the tokens of each sequence, [B, T], whatever is cut."""

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        log_den = clipped_sequence(epsilon, epsilon)(scores.logp, batch, on)
        return -batch.advantage * (scores.logp - log_den).exp() * seq_mean(on, batch)

    return value
