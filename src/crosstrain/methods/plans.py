"""What methods share of collecting: what to ask for each example, and which groups to keep."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

from crosstrain.types import Example, Group, Plan, Request, Source, State, Trajectory


def demonstrations() -> Plan:
    """The row's demonstration, nothing sampled."""
    return Plan(needs_expert="demonstration")


def preference_pairs() -> Plan:
    """The row's chosen and rejected answers, nothing sampled."""
    return Plan(needs_expert="pair")


def rollouts_and_demonstrations(n: int, share: float, rollouts_from: str, demonstrations_from: str) -> Plan:
    """`n` completions of each prompt of one stream, and the demonstrations of another, `share` of the step's examples.

    Where both are the same stream, each of its examples gives both, and there is no share.
    """
    if n < 1:
        raise ValueError(f"num_generations: got {n}; it must be at least 1")
    if not 0 < share < 1:
        raise ValueError(f"demonstration_share: got {share}; it must be between 0 and 1")
    one = rollouts_from == demonstrations_from
    wanted = {rollouts_from: 1.0} if one else {rollouts_from: 1 - share, demonstrations_from: share}

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if group.stream != rollouts_from or group.by(Source.POLICY) else (Request(n),)

    return Plan(
        streams=lambda state: wanted,
        next=following,
        samples=True,
        needs_expert="demonstration",
        expert_streams=frozenset({demonstrations_from}),
    )


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


def told(example: Example) -> tuple[int, ...]:
    """The demonstration's tokens up to the first that somebody else wrote (a user's next turn, a tool), which are no hint."""
    shown = example.expert[0]
    own = takewhile(
        lambda pair: pair[1] == Source.EXPERT, zip(shown.response, shown.source[shown.response_start :], strict=True)
    )
    return tuple(token for token, _ in own)


def cuts(n: int, parts: int) -> list[int]:
    """Where `n` tokens are cut into `parts` parts of about one length: the ends of all but the last, within the tokens.

    >>> cuts(10, 4), cuts(3, 10), cuts(1, 5)
    ([2, 5, 8], [1, 2], [])
    """
    return sorted({round(i * n / parts) for i in range(1, parts)} - {0, n})


def keyed_uniforms(n: int, *key: object) -> list[float]:
    """`n` numbers in [0, 1) that depend on the key alone, and so on no neighbour in a batch and on no earlier draw.

    >>> keyed_uniforms(2, "train:0", 3) == keyed_uniforms(2, "train:0", 3) != keyed_uniforms(2, "train:1", 3)
    True
    """
    digests = (hashlib.sha256(repr((key, i)).encode()).digest() for i in range(n))
    return [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]


def right_answers(
    threshold: float = 0.0, *, distinct: bool = False, most: int | None = None
) -> Callable[[Group, State], Group | None]:
    """Of a group, the own answers whose reward is above `threshold` and whatever an expert wrote; None where neither is left.

    distinct: of answers with the same tokens, the first. most: no more than that many, the first; which are as random as any.
    """
    if most is not None and most < 1:
        raise ValueError(f"max_per_prompt: got {most}; it must be at least 1, or None for all")

    def select(group: Group, state: State) -> Group | None:
        right = [t for t in group.by(Source.POLICY) if t.reward is not None and t.reward > threshold]
        if distinct:
            first: dict[tuple[int, ...], Trajectory] = {}
            for t in right:
                first.setdefault(t.response, t)
            right = list(first.values())
        shown = tuple(t for t in group.by(Source.EXPERT) if not t.wrote(Source.POLICY))
        kept = shown + tuple(right[:most])
        return replace(group, trajectories=kept) if kept else None

    return select


def drop_equally_right(group: Group, state: State) -> Group | None:
    """The group, or None when all that the verifier said of it is equal, whatever lengths cost (DAPO's filter by accuracy)."""
    known = [t for t in group.trajectories if t.reward is not None]
    return group if len({t.reward if t.unpenalised is None else t.unpenalised for t in known}) > 1 else None


def drop_equal_rewards(group: Group, state: State) -> Group | None:
    """The group, or None when all its known rewards are equal (no advantage could differ from 0)."""
    rewards = {t.reward for t in group.trajectories if t.reward is not None}
    return group if len(rewards) > 1 else None
