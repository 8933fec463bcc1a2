"""What methods share of collecting: what to ask for each example, and which groups to keep."""

from __future__ import annotations

from collections.abc import Sequence

from crosstrain.types import Example, Group, Plan, Request, Source, State, Trajectory


def demonstrations() -> Plan:
    """The row's demonstration, nothing sampled."""
    return Plan(needs_expert="demonstration")


def preference_pairs() -> Plan:
    """The row's chosen and rejected answers, nothing sampled."""
    return Plan(needs_expert="pair")


def rollouts(n: int, *, with_demonstration: bool = False, max_draws: int = 1) -> Plan:
    """`n` completions of each prompt, in one round; beside the row's demonstration where asked for."""
    if n < 1:
        raise ValueError(f"num_generations: got {n}; it must be at least 1")

    def start(example: Example, state: State) -> tuple[Trajectory, ...]:
        return example.expert if with_demonstration else ()

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if group.by(Source.POLICY) else (Request(n),)

    return Plan(
        start=start,
        next=following,
        samples=True,
        needs_expert="demonstration" if with_demonstration else None,
        max_draws=max_draws,
    )


def drop_equal_rewards(group: Group, state: State) -> Group | None:
    """The group, or None when all its known rewards are equal (no advantage could differ from 0)."""
    rewards = {t.reward for t in group.trajectories if t.reward is not None}
    return group if len(rewards) > 1 else None
