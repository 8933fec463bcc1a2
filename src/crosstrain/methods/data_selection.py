"""What of the data RL spends its budget on: prompts by their solve rate or difficulty, and rollouts by their rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

from crosstrain.errors import UserError
from crosstrain.methods.checks import several
from crosstrain.methods.grpo import grpo
from crosstrain.methods.memory import name_of, solve_rate
from crosstrain.methods.plans import keyed_uniforms
from crosstrain.methods.registry import method
from crosstrain.methods.uft import next_step
from crosstrain.types import Example, Group, Method, State


@method(
    paper="arXiv:2504.03380",
    family="reinforcement learning",
    checked="reconstructed",
    works="Prompts of intermediate solve rate are reported to learn faster and to a higher end than all prompts "
    "(arXiv:2504.03380), and skipping before sampling to save 2 to 2.4 times the rollouts at the same accuracy (arXiv:2506.02177).",
    deviates="The band is chosen before sampling by the solve rate that was seen last, with a chance of a new look, as "
    "arXiv:2506.02177 skips prompts without variance; arXiv:2504.03380 samples every prompt and filters afterwards. Band and "
    "chance are guesses.",
)
def solve_rate_selection(
    lowest: float = 0.1,
    highest: float = 0.9,
    revisit: float = 0.05,
    solved_above: float = 0.0,
    num_generations: int = 8,
    beta: float = 0.0,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """Prompt selection by solve rate: GRPO on prompts that are neither always nor never solved.

    A prompt is drawn when it was never sampled, when the share of its rollouts that was solved last (reward > solved_above) is in
    [lowest, highest], and else with chance `revisit`, so that none is lost for ever. The stream is gone through once at most; what
    is lacking then is filled with prompts that were passed over.

    Loss: that of `grpo`, max(-A r, -A clip(r)), on the prompts that were drawn. Weight on grad log pi: that of `grpo`, gate r A /
    (T_i N).

    lowest, highest: the band of solve rates from which prompts are drawn (guesses). revisit: the chance of a new look at a prompt
    outside of the band (a guess). beta: the coefficient of `grpo`'s KL term; 0, for none, is a choice.
    """
    _check_chance("revisit", revisit)
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(f"got lowest={lowest}, highest={highest}; they must be in [0, 1], lowest not above highest")

    def wants(example: Example, state: State) -> bool:
        rate = state["rates"].get(example.id)
        return rate is None or lowest <= rate <= highest or _by_chance(revisit, example, state)

    made = grpo(
        num_generations=num_generations, beta=beta, epsilon=epsilon, num_iterations=num_iterations, minibatches=minibatches
    )
    return replace(
        made,
        plan=replace(made.plan, wants=wants),
        init=lambda: {"step": 0, "rates": {}},
        update=next_step,
        remember=lambda state, groups: _with_rates(state, groups, solved_above),
    )


HARDEST = 100.0
"""Difficulties are numbers from 0 to this."""


@method(
    paper="arXiv:2504.05520",
    family="reinforcement learning",
    checked="reconstructed",
    works="A target that follows the reward is reported to halve the steps that RL on mathematics takes, most where the data are "
    "mostly too easy or too hard (arXiv:2504.05520).",
    deviates="The rule of the target and its numbers are the paper's, by descriptions of it. It takes the prompts nearest to the "
    "target; here those within `width` of it, as they come (a guess), and others by chance. Without a column the difficulty is "
    "what the policy itself did not solve last, where the paper has it from another model beforehand.",
)
def difficulty_curriculum(
    column: str = "",
    initial_target: float = 0.0,
    target_reward: float = 0.5,
    sensitivity: float = 2.0,
    step_size: float = 50.0,
    width: float = 25.0,
    revisit: float = 0.05,
    solved_above: float = 0.0,
    num_generations: int = 8,
    beta: float = 0.0,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """Difficulty curriculum (AdaRFT): GRPO on prompts about as difficult as the policy can just do.

    A target difficulty T moves after every step by its mean reward:
        T <- clip(T + step_size tanh(sensitivity (mean reward - target_reward)), 0, 100)
    Drawn are prompts of unknown difficulty, those at most `width` from T, and others with chance `revisit`. The stream is gone
    through once at most; what is lacking then is filled with prompts that were passed over.

    Loss: that of `grpo`, max(-A r, -A clip(r)), on the prompts that were drawn. Weight on grad log pi: that of `grpo`, gate r A /
    (T_i N).

    column: the rows' column with a prompt's difficulty, a number from 0 to 100; empty, it is 100 (1 - share of rollouts solved
    last). initial_target: T at first. target_reward: the mean reward at which T stays where it is, the paper's by descriptions.
    sensitivity: how soon the tanh saturates, the paper's by descriptions. step_size: how far T moves in a step at most, the paper's
    by descriptions. width: how far from T a prompt's difficulty may be (a guess). revisit: the chance of a new look at any other
    prompt (a guess). beta: the coefficient of `grpo`'s KL term; 0, for none, is a choice.
    """
    _check_chance("revisit", revisit)
    if not 0 <= initial_target <= HARDEST or width < 0:
        raise ValueError(
            f"got initial_target={initial_target}, width={width}; they must be in [0, 100], and width not negative"
        )
    if column and solved_above != 0.0:
        raise ValueError(
            f"solved_above: got {solved_above}, which has no effect where the rows' {column!r} says how difficult they are"
        )
    if sensitivity <= 0 or step_size <= 0:
        raise ValueError(f"got sensitivity={sensitivity}, step_size={step_size}; both must be positive")

    def difficulty(example: Example, state: State) -> float | None:
        if column:
            return _number(example, column)
        rate = state["rates"].get(example.id)
        return None if rate is None else HARDEST * (1 - rate)

    def wants(example: Example, state: State) -> bool:
        known = difficulty(example, state)
        return known is None or abs(known - state["target"]) <= width or _by_chance(revisit, example, state)

    def update(state: State, observed: Mapping[str, float]) -> State:
        reward = observed.get("reward", math.nan)
        moved = 0.0 if math.isnan(reward) else step_size * math.tanh(sensitivity * (reward - target_reward))
        return {**next_step(state, observed), "target": min(max(state["target"] + moved, 0.0), HARDEST)}

    made = grpo(
        num_generations=num_generations, beta=beta, epsilon=epsilon, num_iterations=num_iterations, minibatches=minibatches
    )
    return replace(
        made,
        plan=replace(made.plan, wants=wants),
        init=lambda: {"step": 0, "rates": {}, "target": initial_target},
        update=update,
        remember=lambda state, groups: state if column else _with_rates(state, groups, solved_above),
    )


@method(
    paper="arXiv:2504.13818",
    family="reinforcement learning",
    works="Reported to reach the best accuracy of GRPO at least 1.7 times sooner, where sampling is cheap beside updates "
    "(arXiv:2504.13818).",
    deviates="Of subsets that vary alike the authors' code takes the one with fewer of the highest rewards.",
)
def rollout_selection(
    num_generations: int = 64,
    keep: int = 16,
    beta: float = 0.0,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """Rollout selection (PODS): GRPO on those `keep` of num_generations rollouts whose rewards vary most.

    The subset of a size with the largest variance is some of the lowest and some of the highest rewards; of all such subsets the
    best is taken, and among equals the one with more of the highest. All rollouts are sampled, scored and counted in the budget.

    Loss: that of `grpo`, max(-A r, -A clip(r)), on the rollouts that are kept, with their own mean and std in A. Weight on grad log
    pi: that of `grpo` on what is kept, gate r A / (T_i N); 0 elsewhere.

    keep: rollouts of a prompt that are trained on. beta: the coefficient of `grpo`'s KL term; 0, for none, is a choice.
    """
    several(num_generations, "rewards of a single rollout do not vary")
    if not 2 <= keep <= num_generations:
        raise ValueError(
            f"keep: got {keep} with num_generations={num_generations}; it must be in [2, num_generations], as a single reward "
            "does not vary"
        )

    def select(group: Group, state: State) -> Group | None:
        rows = most_varied([float(t.reward or 0.0) for t in group.trajectories], keep)
        return replace(group, trajectories=tuple(group.trajectories[i] for i in rows))

    made = grpo(
        num_generations=num_generations, beta=beta, epsilon=epsilon, num_iterations=num_iterations, minibatches=minibatches
    )
    return replace(made, select=select)


def most_varied(rewards: Sequence[float], n: int) -> list[int]:
    """The indices, rising, of the `n` rewards with the largest variance; all where there are no more.

    >>> most_varied([1.0, 0.0, 0.5, 1.0, 0.0], 3)
    [0, 1, 3]
    """
    if len(rewards) <= n:
        return list(range(len(rewards)))
    exact = [Fraction(r) for r in rewards]
    order = sorted(range(len(exact)), key=lambda i: (exact[i], i))
    sums = [Fraction(0), *accumulate(exact[i] for i in order)]
    squares = [Fraction(0), *accumulate(exact[i] ** 2 for i in order)]

    def variance(low: int) -> Fraction:
        """Times n^2, of the `low` lowest and the n - low highest."""
        rest = len(order) - (n - low)
        return n * (squares[low] + squares[-1] - squares[rest]) - (sums[low] + sums[-1] - sums[rest]) ** 2

    low = max(range(n + 1), key=lambda i: (variance(i), -i))
    return sorted(order[:low] + order[len(order) - (n - low) :])


def _with_rates(state: State, groups: Sequence[Group], solved_above: float) -> State:
    found = {name_of(g.example): rate for g in groups if (rate := solve_rate(g, solved_above)) is not None}
    return {**state, "rates": {**state["rates"], **found}}


def _by_chance(chance: float, example: Example, state: State) -> bool:
    return keyed_uniforms(1, "revisit", state["seed"], example.id, state["step"])[0] < chance


def _check_chance(name: str, chance: float) -> None:
    if not 0 <= chance <= 1:
        raise ValueError(f"{name}: got {chance}; it must be in [0, 1]")


def _number(example: Example, column: str) -> float:
    value = example.columns.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= HARDEST:
        raise UserError(
            f"{example.where or example.id}: column {column!r} is {value!r}; a difficulty is a number from 0 to 100"
        )
    return float(value)
