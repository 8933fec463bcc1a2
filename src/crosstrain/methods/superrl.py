"""What to do with prompts that teach nothing: imitate their demonstration (SuperRL), or leave them out."""

from __future__ import annotations

import functools
from typing import Literal

from crosstrain.methods.checks import EQUAL, clip, several
from crosstrain.methods.plans import drop_equal_rewards, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.terms import by, clipped, group_mean, nll, seq_mean
from crosstrain.types import Group, Method, Per, Source, State, Updates


@method(
    paper="arXiv:2506.01096",
    family="hybrid",
    checked="reconstructed",
    direction="(SFT ->) RL",
    deviates="Reconstructed: no code of the authors was found. That groups count alike, and not tokens, is a choice made here.",
)
def superrl(
    trigger: Literal["rewards", "advantages"] = "rewards",
    num_generations: int = 8,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """SuperRL: per prompt, imitation where the reward says nothing, reinforcement learning elsewhere.

    Loss: mean over groups of -log pi averaged over the demonstration's tokens where the trigger holds, else of GRPO's clipped loss
    averaged over the group's tokens, r = pi / pi_old and the group-normalised A of `grpo` over rollouts. Weight on grad log pi:
    1 / (T N_groups) on a demonstration, gate r A / (group tokens N_groups) on rollouts.

    trigger: "rewards" when none is above 0 (SuperRL-R, the rule of `hpt` with gate 0), "advantages" when all are (SuperRL-A, which
    takes prompts that are always solved too).

    No code of the authors was found: that groups count alike, and not tokens, is this
    library's choice, made so that the share of imitation follows how many groups failed.
    """
    if trigger not in ("rewards", "advantages"):
        raise ValueError(f"trigger: got {trigger!r}; allowed: rewards, advantages")
    clip(epsilon=epsilon)
    if trigger == "advantages":
        several(num_generations, "a prompt with a single completion would always be imitated")

    def switch(group: Group, state: State) -> Group | None:
        rewards = {float(t.reward or 0.0) for t in group.by(Source.POLICY)}
        dead = all(r <= 0 for r in rewards) if trigger == "rewards" else len(rewards) <= 1
        return group.only(Source.EXPERT) if dead else group.only(Source.POLICY)

    per = Per(("groups",))
    return Method(
        terms=(
            nll("demo", on=by(Source.EXPERT), per=per, normalise=group_mean, unit="group"),
            clipped(
                "rl",
                epsilon,
                epsilon,
                on=by(Source.POLICY),
                per=per,
                normalise=group_mean,
                unit="group",
            ),
        ),
        plan=rollouts(num_generations, with_demonstration=True),
        select=switch,
        advantage=functools.partial(group_normalised, over=(Source.POLICY,)),
        updates=Updates(num_iterations, minibatches),
    )


@method(
    paper="arXiv:2506.01096",
    family="reinforcement learning",
    checked="paper",
    works=(
        "Leaving out prompts that are always wrong was found to be most of what GRPO gains over rejection sampling "
        "(arXiv:2504.11343)."
    ),
)
def drop_dead(num_generations: int = 8, epsilon: float = 0.2, num_iterations: int = 1, minibatches: int = 1) -> Method:
    """GRPO without the prompts whose rewards are all equal: the baseline that a reviewer of SuperRL missed.

    Loss: `grpo` with beta 0, except that such a group does not count among the sequences that the loss is divided by: a step in
    which half of the prompts are dead is not half as large. Weight on grad log pi: gate r A / (T_i N).

    Nothing is drawn in their place, as `dapo` does.
    """
    clip(epsilon=epsilon)
    several(num_generations, EQUAL)
    term = clipped(
        "rl",
        epsilon,
        epsilon,
        on=by(Source.POLICY),
        per=Per(("sequences",)),
        normalise=seq_mean,
    )
    return Method(
        terms=(term,),
        plan=rollouts(num_generations),
        select=drop_equal_rewards,
        advantage=group_normalised,
        updates=Updates(num_iterations, minibatches),
    )
