"""The plans that methods share: what to collect for each example."""

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
