"""REINFORCE++: no critic, and an advantage that is normalised over the whole step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import centred, raw_reward, whitened
from crosstrain.objective.terms import by, clipped, kl
from crosstrain.objective.words import says, words_of
from crosstrain.types import Batch, Method, Per, Source, Term, Updates


@method(
    paper="arXiv:2501.03262",
    family="reinforcement learning",
    checked="port",
    deviates="Without the KL per token that the paper takes off the reward.",
)
def reinforce_pp(num_generations: int = 1, epsilon: float = 0.2, num_iterations: int = 1, minibatches: int = 1) -> Method:
    """REINFORCE++: PPO's loss with the reward, normalised over the step, as every token's advantage.

    Loss (logged): max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon)) averaged over all tokens of the step, r = pi / pi_old, and
    A = (R - mean) / (std + 1e-8), mean and std over all tokens of the step. Weight on grad log pi: gate r A / N.

    The paper takes a KL per token off the reward before; with beta 0, which is this method, all tokens of a completion share one
    return.
    """
    return _made(raw_reward, num_generations, epsilon, 0.0, Updates(num_iterations, minibatches))


@method(paper="arXiv:2501.03262", family="reinforcement learning", checked="port")
def reinforce_pp_baseline(
    num_generations: int = 8, epsilon: float = 0.2, beta: float = 0.0, num_iterations: int = 1, minibatches: int = 1
) -> Method:
    """REINFORCE++-baseline: rewards centred in their group first, then normalised over the step.

    Loss: as `reinforce_pp` with A = (B - mean B) / (std B + 1e-8), B = R - group mean; unlike GRPO's, its scale does not depend on
    how much a single group's rewards vary. Weight on grad log pi: gate r A / N.

    beta: coefficient of a k2 KL term to the reference, 0 for none.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations: got {num_generations}; a group mean needs at least 2")
    if beta < 0:
        raise ValueError(f"beta: got {beta}; it must be 0 (no KL) or positive")
    return _made(centred, num_generations, epsilon, beta, Updates(num_iterations, minibatches))


def _made(credit: Callable[[Batch], Tensor], n: int, epsilon: float, beta: float, updates: Updates) -> Method:
    per, on = Per(("own_tokens",)), by(Source.POLICY)
    terms: list[Term] = [
        clipped(
            "rl",
            epsilon,
            epsilon,
            on=on,
            per=per,
        )
    ]
    if beta > 0:
        terms.append(kl("kl", on=on, per=per, estimator="k2", coef=beta))

    @says(f"B less its mean, by its standard deviation, both over the tokens of the step, with B = {words_of(credit)}")
    def over_the_step(batch: Batch) -> Tensor:
        return whitened(batch, credit(batch))

    return Method(
        terms=tuple(terms),
        plan=rollouts(n),
        advantage=over_the_step,
        credits="step",
        updates=updates,
        reference="stage_start",
    )
