"""What methods share of remembering: names, solve rates and rollouts, as JSON holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from crosstrain.types import Example, Group, Source, Trajectory


def name_of(example: Example) -> str:
    """The example's name in the data, without what tells one draw of it from another.

    >>> name_of(Example("train:3@17", "", (1,))), name_of(Example("train:3", "", (1,)))
    ('train:3', 'train:3')
    """
    return example.id.partition("@")[0]


def solve_rate(group: Group, solved_above: float = 0.0) -> float | None:
    """The share of the group's own completions with a reward above `solved_above`, of those with a reward; None without any."""
    rewards = [t.reward for t in group.by(Source.POLICY) if t.reward is not None and not t.greedy]
    return sum(r > solved_above for r in rewards) / len(rewards) if rewards else None


def as_json(trajectory: Trajectory) -> dict[str, Any]:
    """A rollout without its prompt, which the data have: its tokens, who wrote them, their behaviour log-probs (None where not
    known), reward, and the version of the policy that wrote it."""
    start = trajectory.response_start
    logp = trajectory.behaviour_logp[start:] or (math.nan,) * len(trajectory.response)
    return {
        "tokens": list(trajectory.response),
        "source": [int(s) for s in trajectory.source[start:]],
        "behaviour_logp": [None if math.isnan(x) else x for x in logp],
        "reward": trajectory.reward,
        "finished": trajectory.finished,
        "policy_version": trajectory.policy_version,
    }


def replayed(kept: Mapping[str, Any], example: Example) -> Trajectory:
    """The rollout that `as_json` wrote, behind the prompt of its example, marked as replayed.

    >>> one = Trajectory((1, 5), (Source.PROMPT, Source.POLICY), reward=1.0, behaviour_logp=(math.nan, -0.5))
    >>> again = replayed(as_json(one), Example("train:0", "", (1,)))
    >>> again.tokens, again.behaviour_logp[1:], again.reward, again.replayed
    ((1, 5), (-0.5,), 1.0, True)
    """
    prompt = example.prompt_tokens
    logp = (math.nan if x is None else x for x in kept["behaviour_logp"])
    return Trajectory(
        tokens=prompt + tuple(kept["tokens"]),
        source=(Source.PROMPT,) * len(prompt) + tuple(map(Source, kept["source"])),
        reward=kept["reward"],
        behaviour_logp=(math.nan,) * len(prompt) + tuple(logp),
        policy_version=kept["policy_version"],
        finished=kept["finished"],
        replayed=True,
    )
