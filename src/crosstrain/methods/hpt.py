"""HPT: imitate where the group failed, reinforce where it did not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import centred, centred_on, mean_over
from crosstrain.objective.terms import by, group_mean, nll, reinforce_loss, surrogate
from crosstrain.objective.words import says
from crosstrain.types import Batch, Group, Method, Per, Source, State, Term


@method(
    paper="arXiv:2509.04419",
    family="hybrid",
    works="Reported ahead of imitation followed by RL with 46 thousand demonstrations (arXiv:2509.04419).",
    fails=(
        "Behind imitation followed by RL with 889 thousand demonstrations, and dependent on the model it starts from "
        "(arXiv:2512.11470)."
    ),
    deviates=(
        "Groups count alike; the authors' code sums rollouts over a constant length and averages demonstrations over the "
        "micro-batch, so that the share of imitation follows the micro-batch."
    ),
)
def hpt(num_generations: int = 8, gate: int = 0, sft_coef: float = 1.0, solved_above: float = 0.0) -> Method:
    """HPT (hybrid post-training), switch form: per prompt, supervised or reinforcement learning, never both.

    With s the number of solved rollouts (reward > solved_above): s <= gate removes every rollout of the prompt and trains on
    its demonstration; otherwise the rollouts alone are trained on.

    Loss: mean over groups of
        sft_coef * mean_t of -log pi      for a group that failed
        mean over the group's tokens of -A log pi, A = R - mean R      otherwise (no std, no ratio)
    Weight: sft_coef / (T N_groups) on a demonstration, A / (group tokens * N_groups) on rollouts.

    gate: solved rollouts up to which a prompt is imitated; 0 in the paper for Qwen models, 2 for Llama-3.1-8B (solved rollouts
    are then dropped too). sft_coef: how much imitation counts; 1 in the paper, 0.3 for Qwen2.5-Math-1.5B.
    """
    if gate < 0 or gate >= num_generations:
        raise ValueError(f"gate: got {gate}; it must be in [0, num_generations) = [0, {num_generations})")
    if sft_coef <= 0:
        raise ValueError(f"sft_coef: got {sft_coef}; it must be positive")

    def switch(group: Group, state: State) -> Group | None:
        solved = sum(t.reward is not None and t.reward > solved_above for t in group.by(Source.POLICY))
        return group.only(Source.EXPERT) if solved <= gate else group.only(Source.POLICY)

    return Method(
        terms=(
            nll("demo", on=by(Source.EXPERT), per=Per(("groups",)), normalise=group_mean, coef=sft_coef, unit="group"),
            _reinforced("rl", Source.POLICY, "-A log pi"),
        ),
        plan=rollouts(num_generations, with_demonstration=True),
        select=switch,
        advantage=centred,
    )


SOFT = ((0.0, 1.0), (0.125, 0.5), (0.25, 0.25), (0.5, 0.125))
"""Of rollouts and of the demonstration by the number of solved rollouts, 0 to 3; from 4 on rollouts alone. The authors' second
table, which counts the demonstration as solved too."""


@method(
    paper="arXiv:2509.04419",
    family="hybrid",
    deviates="One of the three tables in the authors' code; groups count alike, as in `hpt`. With the estimator of the authors' "
    "script the mean would be over the demonstration too.",
)
def hpt_soft(num_generations: int = 7, solved_above: float = 0.0) -> Method:
    """HPT, soft form: per prompt both, weighted by how many rollouts are solved.

    Loss: mean over groups of a times the mean over the group's own tokens of -A log pi, A = R - mean R of the rollouts, plus b
    times the mean over the demonstration's tokens of -log pi. (a, b) is (0, 1) where no rollout is solved, then (1/8, 1/2),
    (1/4, 1/4) and (1/2, 1/8) for one, two and three, and (1, 0) from four on: the second of the tables in the authors' code,
    made for a group of seven rollouts and the demonstration; where some got no reward, the share of solved ones counts, times
    seven. Weight on grad log pi: a A / (group tokens N_groups) on rollouts, b / (T N_groups) on the demonstration.
    """
    if num_generations != 7:
        raise ValueError(f"num_generations: got {num_generations}; the table of coefficients is for 7 beside a demonstration")

    @says("a (R - mean R of the rollouts) on rollouts, b on the demonstration")
    def credit(batch: Batch) -> Tensor:
        own = (batch.source == int(Source.POLICY)).any(dim=1)
        share = mean_over(batch, (batch.reward > solved_above).to(batch.reward), own)
        a, b = (_by_solved(share * num_generations, i).to(batch.reward) for i in (0, 1))
        return torch.where(own, a * centred_on(batch, own), b)

    return Method(
        terms=(
            _reinforced("demo", Source.EXPERT, "-b log pi"),
            _reinforced("rl", Source.POLICY, "-a A log pi"),
        ),
        plan=rollouts(num_generations, with_demonstration=True),
        advantage=credit,
    )


def _reinforced(name: str, source: Source, describe: str) -> Term:
    """-A log pi: the mean over a group's tokens that `source` wrote, and then over groups."""
    return surrogate(
        name,
        on=by(source),
        per=Per(("groups",)),
        normalise=group_mean,
        unit="group",
        logged=reinforce_loss(group_mean),
        describe=describe,
    )


def _by_solved(solved: Tensor, which: int) -> Tensor:
    """[B]: the coefficient of rollouts (0) or of the demonstration (1), by the number of solved rollouts."""
    table: Sequence[float] = [pair[which] for pair in SOFT] + [1.0 - which]
    return torch.tensor(table, dtype=torch.float64)[solved.round().long().clamp(max=len(table) - 1)]
