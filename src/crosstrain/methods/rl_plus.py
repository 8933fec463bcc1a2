"""RL-PLUS: a demonstration in the group, its unlikely tokens first."""

from __future__ import annotations

from torch import Tensor

from crosstrain.methods.luffy import Baseline, centred_by
from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.denominators import mixture
from crosstrain.objective.gates import unlikely
from crosstrain.objective.terms import by, surrogate, unclipped
from crosstrain.types import Batch, Method, Per, Scores, Source, Updates


@method(
    paper="arXiv:2508.00222",
    family="hybrid",
    direction="(SFT ->) RL",
    deviates=(
        "Divided by the tokens of the whole step; the authors' code divides by a constant length per micro-batch and adds "
        "an entropy bonus of 0.001. Its script takes two optimizer steps per batch (minibatches 2)."
    ),
)
def rl_plus(
    num_generations: int = 7,
    power: float = 0.5,
    baseline: Baseline = "group",
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """RL-PLUS: own rollouts and a demonstration in one group, with multiple importance sampling on the demonstration.

    Loss, summed over the tokens of both and divided by all of them:
        own tokens      -A r                              r = pi / pi_old
        expert tokens   -A sg((1 - p)^power) p / den      p = pi, den = (pi_old + w) / 2, w = (pi_old + 1) / 2
    with A = R - group mean, no std and no clip. den mixes the policy at the start of the batch with a uniform one
    whose density is taken as 1. Weight: r A on own tokens, A (1 - p)^power p / den on expert tokens.

    power: how much less likely tokens count, 0.5 in the authors' code. baseline: the mean is taken over rollouts and demonstration
    together ("group"), as in the authors' script, or over rollouts only ("rollouts"), which their code offers too.
    """
    per = Per(("all_tokens",))
    gate = unlikely(power)

    def published(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        logp = scores.logp
        ratio = (logp - mixture(logp, batch, on)).exp()
        return -batch.advantage * gate(ratio, logp, batch, on) * ratio

    return Method(
        terms=(
            unclipped("rl", on=by(Source.POLICY), per=per),
            surrogate(
                "demo",
                on=by(Source.EXPERT),
                per=per,
                denominator=mixture,
                gate=gate,
                needs=frozenset({"old_logp"}),
                logged=published,
                describe=f"-A (1 - p)^{power:g} p / den, den = (3 old + 1) / 4",
            ),
        ),
        plan=rollouts(num_generations, with_demonstration=True),
        advantage=centred_by(baseline),
        updates=Updates(num_iterations, minibatches),
    )
