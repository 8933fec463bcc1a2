"""HPT: imitate where the group failed, reinforce where it did not."""

from __future__ import annotations

from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import centred
from crosstrain.objective.terms import by, group_mean, nll, reinforce_loss, surrogate
from crosstrain.types import Group, Method, Per, Source, State


@method(paper="arXiv:2509.04419", family="hybrid")
def hpt(num_generations: int = 8, gate: int = 0, sft_coef: float = 1.0, solved_above: float = 0.0) -> Method:
    """HPT (hybrid post-training), switch form: per prompt, supervised or reinforcement learning, never both.

    With s the number of solved rollouts (reward > solved_above): s <= gate removes every rollout of the prompt and trains on
    its demonstration; otherwise the rollouts alone are trained on. Loss: mean over groups of
        sft_coef * mean_t of -log pi      for a group that failed
        mean over the group's tokens of -A log pi, A = R - mean R      otherwise (no std, no ratio)
    Weight: sft_coef / (T N_groups) on a demonstration, A / (group tokens * N_groups) on rollouts.

    gate: 0 in the paper for Qwen models, 2 for Llama-3.1-8B (solved rollouts are then dropped too). Divided per group, so that
    the share of imitation follows how many groups failed and not how long answers are; the authors' code sums rollouts
    over a constant length and averages demonstrations over the micro-batch, so that its share follows the micro-batch.
    """
    if gate < 0 or gate >= num_generations:
        raise ValueError(f"gate: got {gate}; it must be in [0, num_generations) = [0, {num_generations})")
    if sft_coef <= 0:
        raise ValueError(f"sft_coef: got {sft_coef}; it must be positive")

    def switch(group: Group, state: State) -> Group | None:
        solved = sum(t.reward is not None and t.reward > solved_above for t in group.by(Source.POLICY))
        return group.only(Source.EXPERT) if solved <= gate else group.only(Source.POLICY)

    per = Per(("groups",))
    return Method(
        terms=(
            nll("demo", on=by(Source.EXPERT), per=per, normalise=group_mean, coef=sft_coef, unit="group"),
            surrogate(
                "rl",
                on=by(Source.POLICY),
                per=per,
                normalise=group_mean,
                unit="group",
                logged=reinforce_loss(group_mean),
                describe="-A log pi",
            ),
        ),
        plan=rollouts(num_generations, with_demonstration=True),
        select=switch,
        advantage=centred,
    )
