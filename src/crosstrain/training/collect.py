"""Collecting a step's groups: draw examples, sample what the plan asks for, score it, keep what the method selects."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from crosstrain.errors import UserError
from crosstrain.rollout.sampler import Completion, Prompt, Sampler, Sampling
from crosstrain.types import Decode, Example, Group, Method, Request, Source, State, Trajectory


class Stream(Protocol):
    """A named, seekable source of examples."""

    @property
    def examples(self) -> Sequence[Example]:
        """All of them, in an order of their own."""
        ...

    def draw(self, position: int, n: int) -> tuple[list[Example], int]:
        """`n` examples from `position` on, and the position after them."""
        ...


@dataclass(frozen=True)
class Truncation:
    """What happens to own completions cut at the token limit: scored as they are, masked, or penalised.

    The penalty grows from 0 to `penalty` over the last `buffer` tokens before `limit` (DAPO, arXiv:2503.14476, eq. 13, where it is
    1); with a buffer of 0 it is for cut completions alone.

    >>> soft = Truncation("penalise", penalty=1.0, buffer=4, limit=10)
    >>> [soft.of(length, finished=True) for length in (6, 7, 10)], Truncation("penalise", 0.5).of(10, finished=False)
    ([0.0, 0.25, 1.0], 0.5)
    """

    rule: str = "score"
    penalty: float = 0.0
    buffer: int = 0
    limit: int = 0

    def of(self, length: int, *, finished: bool) -> float:
        """What a completion of so many tokens loses."""
        if self.rule != "penalise":
            return 0.0
        if not self.buffer or not finished:
            return 0.0 if finished else self.penalty
        return self.penalty * max(0, length - (self.limit - self.buffer)) / self.buffer


ScoreGroups = Callable[[list[Group]], list[Group]]
"""Sets the rewards of the trajectories that have none yet."""


@dataclass(frozen=True)
class Usage:
    """Tokens that sampling prefilled and generated, those of the teacher apart, and the seconds that sampling and scoring took.

    >>> Usage(1, 2, 0.5, 0.25) + Usage(1, 1, 0.5, 0.0)  # doctest: +ELLIPSIS
    Usage(prefill_tokens=2, generated_tokens=3, sampling_seconds=1.0, reward_seconds=0.25, ...)
    """

    prefill_tokens: int = 0
    generated_tokens: int = 0
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0
    teacher_prefill_tokens: int = 0
    teacher_generated_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Collected:
    """What a step was given.

    groups: kept by the method's select. drawn: groups before select. rewarded: the groups before select, without what was replayed
    in them, for metrics and for the method to remember. positions: where each stream stands afterwards. usage: what sampling and
    scoring cost. skipped: examples that the plan did not want.
    """

    groups: list[Group]
    rewarded: list[Group]
    positions: Mapping[str, int]
    usage: Usage
    skipped: int = 0

    @property
    def drawn(self) -> int:
        """Groups before select."""
        return len(self.rewarded)


def collect(
    method: Method,
    state: State,
    streams: Mapping[str, Stream],
    positions: Mapping[str, int],
    *,
    batch_size: int,
    sampler: Sampler | None,
    sampling: Sampling,
    rewards: ScoreGroups | None,
    truncation: Truncation,
    seed: int,
    step: int,
    teacher: Sampler | None = None,
    decode: Decode | None = None,
) -> Collected:
    """`batch_size` groups as `method` wants them, from where the streams stand.

    What the plan recalls comes first, and in place of as many drawn examples. Groups that select drops are replaced from further
    draws, at most `plan.max_draws` draws in all; what a later draw collects beyond batch_size is left out, so that a step never
    grows. Completions whose reward is missing are left out of their group, and a group with no other completions is dropped: what
    cannot be credited is not trained on (`rewarded` still has it). A plan that is not `scored` keeps them. teacher: writes what the
    plan asks it for.
    """
    state = {**state, "seed": seed, "batch_size": batch_size}  # for what a plan draws
    recalled = _recalled(method, state, streams)
    wanted = max(batch_size - len(recalled), 0)
    kept: list[Group] = []
    rewarded: list[Group] = []
    usage = Usage()
    positions = dict(positions)
    skipped = 0
    writers = {"policy": sampler, "teacher": teacher}
    asking = Asking(method, state, writers, sampling, _scorer(method, rewards, decode), truncation, seed, step)
    for draw in range(method.plan.max_draws):
        drawn, positions, passed = _drawn(method, state, streams, positions, wanted)
        skipped += passed
        groups, used = rounds(asking, (recalled if draw == 0 else []) + drawn)
        usage += used
        rewarded += [_sampled_now(g) for g in groups]
        chosen = [_chosen(method, g, state) for g in groups]
        if draw == 0:
            recalled, chosen = [g for g in chosen[: len(recalled)] if g is not None], chosen[len(recalled) :]
        kept += [g for g in chosen if g is not None]
        if len(kept) >= wanted:
            break
    return Collected(recalled + kept[:wanted], rewarded, positions, usage, skipped)


def _recalled(method: Method, state: State, streams: Mapping[str, Stream]) -> list[Group]:
    """The groups that the plan recalls, whose examples get random numbers of their own."""
    if method.plan.recall is None:
        return []
    every: dict[str, Example] = {}

    def by_id(name: str) -> Example:
        if not every:
            every.update({e.id: e for stream in streams.values() for e in stream.examples})
        return every[name]

    groups = method.plan.recall(state, by_id)
    return [replace(g, example=replace(g.example, id=f"{g.example.id}@recalled{i}")) for i, g in enumerate(groups)]


def _drawn(
    method: Method, state: State, streams: Mapping[str, Stream], positions: Mapping[str, int], n: int
) -> tuple[list[Group], dict[str, int], int]:
    """`n` new groups, where the streams stand after them, and how many examples were passed over."""
    groups: list[Group] = []
    after = dict(positions)
    skipped = 0
    for stream, share in shares(method.plan.streams(state), n).items():
        origin = method.plan.origin(stream)
        if origin not in streams:
            raise UserError(f"method {method.name} draws from a data stream {origin!r}; the recipe has {', '.join(streams)}")
        taken, after[origin], passed = _take(method, state, streams[origin], after.get(origin, 0), share)
        skipped += passed
        for at, example in taken:
            _check_brings(method, stream, example)
            # an example drawn twice in one step still gets random numbers of its own
            example = replace(example, id=f"{example.id}@{at}")
            groups.append(Group(example, method.plan.start(example, state), stream))
    return groups, after, skipped


def _take(method: Method, state: State, stream: Stream, start: int, n: int) -> tuple[list[tuple[int, Example]], int, int]:
    """`n` examples with their positions, the position after the last that was looked at, and how many of these were not taken."""
    wants = method.plan.wants
    if wants is None:
        examples, after = stream.draw(start, n)
        return list(enumerate(examples, start)), after, 0
    if n == 0:
        return [], start, 0
    examples, after = stream.draw(start, max(len(stream.examples), n))
    wanted: list[tuple[int, Example]] = []
    passed: list[tuple[int, Example]] = []
    for at, example in enumerate(examples, start):
        (wanted if wants(example, state) else passed).append((at, example))
        if len(wanted) == n:
            return wanted, at + 1, len(passed)
    fill = passed[: n - len(wanted)]
    return sorted(wanted + fill, key=lambda one: one[0]), after, len(passed) - len(fill)


def _chosen(method: Method, group: Group, state: State) -> Group | None:
    known = with_known_rewards(group) if method.plan.scored else group
    return None if known is None else method.select(known, state)


def _sampled_now(group: Group) -> Group:
    return replace(group, trajectories=tuple(t for t in group.trajectories if not t.replayed))


def _scorer(method: Method, rewards: ScoreGroups | None, decode: Decode | None) -> ScoreGroups | None:
    """The recipe's rewards, or those of the plan where it has its own."""
    own = method.plan.reward
    if own is None:
        return rewards

    def score(groups: list[Group]) -> list[Group]:
        def one(g: Group, t: Trajectory) -> Trajectory:
            unscored = t.reward is None and t.wrote(Source.POLICY)
            return replace(t, reward=own(g, t, decode or _no_text)) if unscored else t

        return [replace(g, trajectories=tuple(one(g, t) for t in g.trajectories)) for g in groups]

    return score


def _no_text(tokens: tuple[int, ...]) -> str:
    raise ValueError("the method scores completions by their text: collect needs `decode`")


@dataclass(frozen=True)
class Asking:
    """What stays the same over a step's rounds of sampling and scoring. writers: who may be asked for completions, by name."""

    method: Method
    state: State
    writers: Mapping[str, Sampler | None]
    sampling: Sampling
    rewards: ScoreGroups | None
    truncation: Truncation
    seed: int
    step: int


def rounds(asking: Asking, groups: Sequence[Group]) -> tuple[list[Group], Usage]:
    """Ask the plan what to sample until it asks for nothing; each round is sampled and scored for all groups together."""
    plan, usage, after = asking.method.plan, Usage(), list(groups)
    for index in itertools.count():
        asked = [(i, request) for i, g in enumerate(after) for request in plan.next(g, asking.state)]
        if not asked:
            break
        if plan.scored and (asking.writers["policy"] is None or asking.rewards is None):
            raise UserError(
                f"method {asking.method.name} samples completions: the recipe needs a reward (a task, or `rewards`)"
            )
        started = time.perf_counter()
        new, used = _sampled(asking, after, asked, index)
        sampled = time.perf_counter()
        # a demonstration is scored with the first round's completions; only what is new is scored, and penalised, at all
        unscored = [replace(after[i], trajectories=(after[i].trajectories if index == 0 else ()) + t) for i, t in new.items()]
        scored = unscored if asking.rewards is None else asking.rewards(unscored)
        usage += used + Usage(sampling_seconds=sampled - started, reward_seconds=time.perf_counter() - sampled)
        for i, g in zip(new, scored, strict=True):
            before = () if index == 0 else after[i].trajectories
            after[i] = replace(after[i], trajectories=before + _penalised(g, asking.truncation).trajectories)
    return after, usage


def _sampled(
    asking: Asking, groups: Sequence[Group], asked: Sequence[tuple[int, Request]], index: int
) -> tuple[dict[int, tuple[Trajectory, ...]], Usage]:
    """What is written in a round for each group that is asked for something, by its place, and the tokens of that."""
    prompts = [_prompt(groups[i], request, index) for i, request in asked]
    new: dict[int, tuple[Trajectory, ...]] = {}
    usage = Usage()
    for (i, request), prompt, completions in zip(asked, prompts, _answers(asking, asked, prompts), strict=True):
        read, written = len(prompt.tokens), sum(len(c.tokens) for c in completions)
        own = request.by == "policy"
        usage += Usage(read, written) if own else Usage(teacher_prefill_tokens=read, teacher_generated_tokens=written)
        new[i] = new.get(i, ()) + tuple(_trajectory(groups[i].example, request, c, asking.step) for c in completions)
    return new, usage


def _answers(asking: Asking, asked: Sequence[tuple[int, Request]], prompts: Sequence[Prompt]) -> list[list[Completion]]:
    """The completions of each prompt, whoever writes them; what one writes is sampled together."""
    answers: list[list[Completion]] = [[] for _ in prompts]
    for who, sampler in asking.writers.items():
        mine = [k for k, (_, request) in enumerate(asked) if request.by == who]
        if mine and sampler is None:
            raise UserError(f"method {asking.method.name} needs a sampler of the {who}, and none was set up")
        if mine and sampler is not None:
            found = sampler.sample([prompts[k] for k in mine], asking.sampling, seed=asking.seed, step=asking.step)
            for k, completions in zip(mine, found, strict=True):
                answers[k] = completions
    return answers


def shares(wanted: Mapping[str, float], n: int) -> dict[str, int]:
    """`n` examples split over streams by share, largest remainders first.

    >>> shares({"rl": 2, "demos": 1}, 8)
    {'rl': 5, 'demos': 3}
    """
    total = sum(wanted.values())
    exact = {stream: n * share / total for stream, share in wanted.items()}
    counts = {stream: math.floor(x) for stream, x in exact.items()}
    by_remainder = sorted(exact, key=lambda s: counts[s] - exact[s])
    for stream in by_remainder[: n - sum(counts.values())]:
        counts[stream] += 1
    return counts


def _prompt(group: Group, request: Request, round_index: int) -> Prompt:
    example = group.example
    if request.context and request.context not in example.contexts:
        raise UserError(f"{example.where or example.id}: there is no context {request.context!r} to sample from")
    prompt = example.contexts[request.context] if request.context else example.prompt_tokens
    # what makes random numbers: the example, the round and the request itself, never its neighbours
    key = f"{example.id}#{round_index}#{len(request.prefix)}#{int(request.greedy)}"
    key += "" if request.by == "policy" else f"#{request.by}"
    key += f"#{request.context}" if request.context else ""
    return Prompt(tokens=prompt + request.prefix, n=request.n, key=key, greedy=request.greedy)


def _trajectory(example: Example, request: Request, completion: Completion, step: int) -> Trajectory:
    given = len(example.prompt_tokens)
    if request.by == "teacher":
        words = request.prefix + tuple(completion.tokens)
        authors = (Source.PROMPT,) * given + (Source.EXPERT,) * len(words)
        return Trajectory(example.prompt_tokens + words, authors, finished=completion.finished, contexts=example.contexts)
    source = (Source.PROMPT,) * given + (Source.EXPERT,) * len(request.prefix) + (Source.POLICY,) * len(completion.tokens)
    unknown = (math.nan,) * (given + len(request.prefix))
    return Trajectory(
        tokens=example.prompt_tokens + request.prefix + tuple(completion.tokens),
        source=source,
        behaviour_logp=() if request.context else unknown + tuple(completion.logp),
        policy_version=step,
        finished=completion.finished,
        greedy=request.greedy,
        contexts=example.contexts,
        sampled_from=request.context,
    )


def with_known_rewards(group: Group) -> Group | None:
    """The group without own completions that got no reward, a demonstration beside some being taken as right; None where none is
    left."""
    own = group.by(Source.POLICY)
    if not own:
        return group  # imitation: no reward is asked for
    known = tuple(t for t in group.trajectories if t.reward is not None or not t.wrote(Source.POLICY))
    # a demonstration that no verifier judges is taken to be right
    judged = tuple(replace(t, reward=1.0) if t.reward is None else t for t in known)
    return replace(group, trajectories=judged) if any(t.wrote(Source.POLICY) for t in judged) else None


def _penalised(group: Group, truncation: Truncation) -> Group:
    def penalise(t: Trajectory) -> Trajectory:
        if t.reward is None or t.replayed or not t.wrote(Source.POLICY):
            return t
        off = truncation.of(t.source.count(Source.POLICY), finished=t.finished)
        return replace(t, reward=t.reward - off, unpenalised=t.reward) if off else t

    return replace(group, trajectories=tuple(penalise(t) for t in group.trajectories))


def _check_brings(method: Method, stream: str, example: Example) -> None:
    needs = method.plan.brings(stream)
    has = len(example.expert)
    if needs == "pair" and has != 2:
        raise UserError(f"{example.where}: method {method.name} needs `chosen` and `rejected`; the row has neither")
    if needs == "demonstration" and has != 1:
        raise UserError(f"{example.where}: method {method.name} needs one demonstration (`completion`); the row has {has}")
    if needs == "label" and (has != 1 or example.expert[0].reward is None):
        raise UserError(f"{example.where}: method {method.name} needs `completion` and `label`")
