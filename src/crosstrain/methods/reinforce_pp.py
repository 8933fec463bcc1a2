"""REINFORCE++: no critic, and an advantage that is normalised over the whole step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from crosstrain.methods.checks import clip, several
from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import centred, raw_reward, whitened
from crosstrain.objective.returns import kl_penalty, returns_to_go, token_rewards, whitened_tokens
from crosstrain.objective.terms import by, clipped, kl
from crosstrain.objective.words import says, words_of
from crosstrain.types import Batch, Method, Per, Source, Term, Updates

PENALTY = "kl_penalty"
"""The column of what a KL takes off each token's reward."""


@method(
    paper="arXiv:2501.03262",
    family="reinforcement learning",
    checked="port",
    deviates="kl_coef 0.01 (the paper's for general tasks; 0.001 for mathematics) is from memory of its table, not checked. verl "
    "divides by sqrt(variance + 1e-8).",
)
def reinforce_pp(
    num_generations: int = 1, epsilon: float = 0.2, kl_coef: float = 0.01, num_iterations: int = 1, minibatches: int = 1
) -> Method:
    """REINFORCE++: PPO's loss with the return of each token, normalised over the step, as its advantage.

    Loss (logged): max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon)) averaged over all own tokens of the step, r = pi / pi_old,
    and A_t = (G_t - mean) / (std + 1e-8), mean and std over the same tokens, with the return G_t = R - kl_coef sum over s >= t
    of (log pi_old - log ref) of own tokens. Weight on grad log pi: gate r A / N.

    kl_coef: how much the KL to the reference takes off each token's return; with 0 no reference is kept, and all tokens of a
    completion share one return, the reward.
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef: got {kl_coef}; it must be 0 (no KL) or positive")
    made = _made(raw_reward, num_generations, epsilon, 0.0, Updates(num_iterations, minibatches))
    if kl_coef == 0:
        return made

    @says("G less its mean, by its standard deviation, both over own tokens of the step, with G the return to go")
    def credit(batch: Batch) -> Tensor:
        return whitened_tokens(batch, returns_to_go(batch, token_rewards(batch, penalty=batch.columns[PENALTY])))

    (term,) = made.terms
    return replace(
        made,
        terms=(replace(term, needs=term.needs | {"ref_logp", PENALTY}),),
        advantage=credit,
        columns={PENALTY: lambda look, batch: kl_penalty(look, batch, kl_coef)},
    )


@method(
    paper="arXiv:2501.03262",
    family="reinforcement learning",
    checked="port",
    deviates="verl divides by sqrt(variance + 1e-8), and gives a completion that is alone in its group its reward; here it gets 0.",
)
def reinforce_pp_baseline(
    num_generations: int = 8, epsilon: float = 0.2, beta: float = 0.0, num_iterations: int = 1, minibatches: int = 1
) -> Method:
    """REINFORCE++-baseline: rewards centred in their group first, then normalised over the step.

    Loss: as `reinforce_pp` with A = (B - mean B) / (std B + 1e-8) over own tokens, B = R - group mean; unlike GRPO's, its scale
    does not depend on how much a single group's rewards vary. Weight on grad log pi: gate r A / N.

    beta: coefficient of a k2 KL term to the reference, 0 for none.
    """
    several(num_generations, "the mean of a single completion leaves no advantage")
    if beta < 0:
        raise ValueError(f"beta: got {beta}; it must be 0 (no KL) or positive")
    return _made(centred, num_generations, epsilon, beta, Updates(num_iterations, minibatches))


def _made(credit: Callable[[Batch], Tensor], n: int, epsilon: float, beta: float, updates: Updates) -> Method:
    clip(epsilon=epsilon)
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

    @says(f"B less its mean, by its standard deviation, both over own tokens of the step, with B = {words_of(credit)}")
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
