"""SRL: rewards for coming close to the expert's next step, which need no verifier."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from crosstrain.methods.bread import shown
from crosstrain.methods.checks import at_least, several
from crosstrain.methods.grpo import grpo
from crosstrain.methods.plans import cuts, keyed_uniforms, told
from crosstrain.methods.registry import method
from crosstrain.methods.uft import next_step, nothing
from crosstrain.types import Decode, Example, Group, Method, Plan, Request, Source, State, Trajectory


@method(
    paper="arXiv:2510.25992",
    family="hybrid",
    checked="reconstructed",
    direction="(SFT ->) RL",
    works="Reported to teach 7B models problems that are never solved, on which RL has no signal and SFT on long solutions makes "
    "them worse; best before RL with a verifier (arXiv:2510.25992).",
    fails="A student far below the expert gets about the same similarity whatever it does, and none goes beyond the expert; "
    "models of 3B gained nothing on the hardest sets (arXiv:2510.25992).",
    deviates="Written from descriptions of the paper. Steps are parts of the demonstration of one length, or end with a token; "
    "the authors have solutions with numbered steps and a prompt that asks for the next one. Which step is trained is drawn anew "
    "each time a row is, and may be the first; the paper makes a row of each. min_reward_std is a guess. Similarity is exactly 2 "
    "M / T: difflib's shortcut for long texts is off.",
)
def srl(
    num_generations: int = 8,
    steps: int = 5,
    step_end: int | None = None,
    think_end: str = "</think>",
    format_reward: float = -1.0,
    min_reward_std: float = 0.01,
    dynamic_sampling: int = 10,
    beta: float = 0.0,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """SRL (supervised reinforcement learning): from the expert's steps so far, reason freely and write the next step.

    Rollouts start from the first k steps of the row's demonstration, k drawn uniformly. What follows `think_end` in a rollout's
    text is its step, and its reward the similarity of that to the expert's next step, 2 M / T with M the characters in matching
    blocks (difflib's ratio) and T those of both texts. Groups whose rewards have a std (n - 1) of at most min_reward_std are
    replaced.

    Loss: that of `grpo`, max(-A r, -A clip(r)), over what the rollouts wrote, their reasoning too. Weight on grad log pi: that of
    `grpo`, gate r A / (T_i N); 0 on the expert's steps.

    steps: parts of about one length that a demonstration is cut into; 5 is a choice. step_end: the id of a token that ends a step
    instead (a line break, in many vocabularies); steps is then 0. think_end: the text that ends the reasoning; empty where the
    policy writes the step at once. format_reward: the reward where think_end is missing, -1 by descriptions of the paper.
    min_reward_std: the spread of rewards above which a group is trained on (a guess). dynamic_sampling: draws per step at most, to
    replace groups; 10 is a choice. beta: the coefficient of `grpo`'s KL term; 0, for none, is a choice.
    """
    if (step_end is None) == (steps == 0) or steps < 0:
        raise ValueError(f"got steps={steps}, step_end={step_end}; give a positive number of steps, or steps=0 and step_end")
    if min_reward_std < 0:
        raise ValueError(f"min_reward_std: got {min_reward_std}; it must not be negative")

    at_least(1, dynamic_sampling=dynamic_sampling)
    several(num_generations, "the spread of a single reward is none")

    def ends(example: Example) -> list[int]:
        answer = told(example)
        if step_end is None:
            return [0, *cuts(len(answer), steps), len(answer)]
        inside = [i + 1 for i, token in enumerate(answer[:-1]) if token == step_end]
        return [0, *inside, len(answer)]

    def following(group: Group, state: State) -> Sequence[Request]:
        if group.trajectories:
            return ()
        starts = ends(group.example)[:-1]
        [u] = keyed_uniforms(1, "srl", state["seed"], group.example.id, state["step"])
        return (Request(num_generations, told(group.example)[: starts[int(u * len(starts))]]),)

    def reward(group: Group, rollout: Trajectory, decode: Decode) -> float:
        places, start = ends(group.example), shown(rollout)
        expert = decode(told(group.example)[start : places[places.index(start) + 1]])
        text = decode(tuple(x for x, s in zip(rollout.tokens, rollout.source, strict=True) if s == Source.POLICY))
        if think_end and think_end not in text:
            return format_reward
        return similarity(text.partition(think_end)[2] if think_end else text, expert)

    def select(group: Group, state: State) -> Group | None:
        rewards = [t.reward for t in group.trajectories if t.reward is not None]
        return group if len(rewards) > 1 and statistics.stdev(rewards) > min_reward_std else None

    made = grpo(
        num_generations=num_generations, beta=beta, epsilon=epsilon, num_iterations=num_iterations, minibatches=minibatches
    )
    plan = Plan(
        start=nothing,
        next=following,
        samples=True,
        reward=reward,
        needs_expert="demonstration",
        max_draws=dynamic_sampling,
    )
    return replace(made, plan=plan, select=select, init=lambda: {"step": 0}, update=next_step)


def similarity(one: str, other: str) -> float:
    """2 M / T of two texts without the white space around them: M characters in matching blocks, of T in both; 1 if both are empty.

    >>> similarity("x = 2", " x = 3 "), similarity("", "x")
    (0.8, 0.0)
    """
    return SequenceMatcher(None, one.strip(), other.strip(), autojunk=False).ratio()
