"""Scoring groups: reward functions in child processes that can be killed, reward models in this one."""

from __future__ import annotations

import json
import math
import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from crosstrain.errors import UserError
from crosstrain.rewards.child import Child, ChildDied, ChildTimeout
from crosstrain.rewards.load import Reward, load_reward
from crosstrain.rewards.model import ModelReward, unusable
from crosstrain.types import Decode, Group, Source, Trajectory


@dataclass(frozen=True)
class RewardCounts:
    """What one call of `RewardPool.score` came to.

    scored, missing: trajectories with and without a reward. errors: function calls that raised, crashed or gave no usable scores.
    timeouts: function calls killed at the time limit.
    """

    scored: int = 0
    missing: int = 0
    errors: int = 0
    timeouts: int = 0


@dataclass(frozen=True)
class Failure:
    """A call of one function on one group that gave no usable scores. bug: it would fail again; what, in words."""

    what: str
    bug: bool
    timeout: bool = False


Result = list[float | None] | Failure


class RewardPool:
    """Reward functions in `workers` child processes, started once and replaced when they crash or hang. A reward model runs no code
    of a user's and reads only tokens: it is asked in this process, one group at a time, under no time limit.

        with RewardPool([load_reward("check.py:right"), load_reward("exact_match")], weights=[1.0, 0.5]) as pool:
            groups, counts = pool.score(groups, decode)

    A function is called once per group, in TRL's way: keywords prompts, completions, completion_ids and every extra column, each
    a list with one entry per completion, and gives a list of numbers or None (not applicable). A trajectory's reward is the
    weighted sum over the functions that gave it a number, None when none did. It is also None, never a partial sum, when a
    function failed on its group.

    functions: rewards or their specs. weights: one per function, 1 by default. timeout_s: per call. workers: processes.
    on_error: "raise": an exception, a wrong number of scores, NaN, an infinity or anything that is no number is a UserError that
    names the row; a time-out or a crash loses its group's scores, unless all groups of a step (two or more) fail that way.
    "missing": all of these lose the group's scores. What is lost is counted.
    memory_gb: address space of a child (Linux; None is no limit). start_s: how long loading the functions may take.
    """

    def __init__(
        self,
        functions: Sequence[Reward | ModelReward | str],
        weights: Sequence[float] | None = None,
        *,
        timeout_s: float = 10.0,
        workers: int = 1,
        on_error: Literal["raise", "missing"] = "raise",
        memory_gb: float | None = 8.0,
        start_s: float = 120.0,
    ) -> None:
        self.functions = tuple(load_reward(f) if isinstance(f, str) else f for f in functions)
        self._called = tuple(f for f in self.functions if isinstance(f, Reward))  # in child processes
        self._asking = threading.Lock()
        self.weights = tuple(1.0 for _ in self.functions) if weights is None else tuple(weights)
        if not self.functions or len(self.weights) != len(self.functions):
            raise UserError(
                f"rewards: got {len(self.functions)} functions and {len(self.weights)} weights; need one each, at least one"
            )
        if not all(math.isfinite(w) for w in self.weights):
            raise UserError(f"rewards: weights must be finite numbers; got {', '.join(map(str, self.weights))}")
        if timeout_s <= 0 or workers < 1:
            raise UserError(f"rewards: timeout_s must be above 0 and workers at least 1; got {timeout_s:g} and {workers}")
        if on_error not in ("raise", "missing"):
            raise UserError(f"rewards: on_error must be 'raise' or 'missing'; got {on_error!r}")
        names = [f.name for f in self.functions]
        self.names = tuple(f.spec if names.count(f.name) > 1 else f.name for f in self.functions)
        if len(set(self.names)) < len(self.names):
            raise UserError(f"rewards: the same function is given twice: {', '.join(self.names)}")
        self.timeout_s, self.on_error, self.start_s = timeout_s, on_error, start_s
        self._memory_gb = memory_gb
        self._children = [Child(self._called, memory_gb) for _ in range(workers if self._called else 0)]
        self._closer = weakref.finalize(self, _stop_all, self._children)  # also runs at exit
        try:
            for child in self._children:
                child.start(start_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all child processes."""
        self._closer()

    def score(self, groups: Sequence[Group], decode: Decode, *, score_expert: bool = False) -> tuple[list[Group], RewardCounts]:
        """The groups with `reward` and `rewards` set on the trajectories that POLICY wrote and that have no reward yet.

        score_expert: also on demonstrations without a reward.
        """
        chosen = [_unscored(g, score_expert) for g in groups]
        calls = [(g, f) for g, which in enumerate(chosen) if which for f in range(len(self.functions))]
        columns = {g: self._columns(groups[g], chosen[g], decode) for g in {g for g, _ in calls}}
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(self._children)):
            free.put(i)

        def run(call: tuple[int, int]) -> Result:
            function = self.functions[call[1]]
            if isinstance(function, ModelReward):
                return self._ask(function, columns[call[0]])
            slot = free.get()
            try:
                return self._run(slot, self._called.index(function), columns[call[0]], len(chosen[call[0]]))
            finally:
                free.put(slot)

        if not self._closer.alive:
            raise UserError("rewards: the pool is closed")
        with ThreadPoolExecutor(max(len(self._children), 1)) as threads:
            results = dict(zip(calls, threads.map(run, calls), strict=True))
        self._raise_first(groups, results)
        return self._set(groups, chosen, results)

    def _ask(self, model: ModelReward, columns: Mapping[str, Any]) -> Result:
        """A reward model's scores of one group."""
        try:
            with self._asking:
                scores = model(**columns)
        except UserError:
            raise
        except Exception as error:
            return Failure(f"raised {type(error).__name__}: {error}", bug=True)
        wrong = unusable(scores)
        return Failure(wrong, bug=True) if wrong else scores

    def _run(self, slot: int, function: int, columns: Mapping[str, Any], n: int) -> Result:
        """One call in the child at `slot`, which is replaced when the call ends it."""
        child = self._children[slot]
        child.start(self.start_s)  # at once, unless the child was just replaced
        try:
            reply = child.call(function, columns, self.timeout_s)
        except ChildTimeout:
            self._children[slot] = Child(self._called, self._memory_gb)
            return Failure(f"took longer than {self.timeout_s:g} s (its time limit, timeout_s)", bug=False, timeout=True)
        except ChildDied as error:
            self._children[slot] = Child(self._called, self._memory_gb)
            return Failure(f"crashed: its process {error}", bug=False)
        if "error" in reply:
            return Failure(f"raised {reply['error']}", bug=True)
        if "bad" in reply:
            return Failure(reply["bad"], bug=True)
        scores = reply["result"]
        if len(scores) != n:
            return Failure(f"gave {len(scores)} scores for {n} completions", bug=True)
        bad = next((s["bad"] for s in scores if isinstance(s, dict)), None)
        return scores if bad is None else Failure(f"gave {bad}; a score is a finite number or None", bug=True)

    def _columns(self, group: Group, which: Sequence[int], decode: Decode) -> dict[str, Any]:
        example, n = group.example, len(which)
        chat = not isinstance(example.prompt, str)
        prompt = example.prompt if isinstance(example.prompt, str) else [dict(m) for m in example.prompt]
        answers = [group.trajectories[i].response for i in which]
        texts = [decode(tokens) for tokens in answers]
        columns = {
            **{key: [value] * n for key, value in example.columns.items()},
            "prompts": [prompt] * n,
            "completions": [[{"role": "assistant", "content": text}] if chat else text for text in texts],
            "completion_ids": [list(tokens) for tokens in answers],
        }
        for key, values in columns.items():
            try:
                json.dumps(values)
            except TypeError as error:
                raise UserError(f"{_where(group)}: column {key!r} cannot be handed to a reward function: {error}") from error
        return columns

    def _raise_first(self, groups: Sequence[Group], results: Mapping[tuple[int, int], Result]) -> None:
        """UserError for the first failure that must stop the run, in the groups' order."""
        failures = [(g, f, r) for (g, f), r in results.items() if isinstance(r, Failure)]
        everywhere = len({g for g, _, _ in failures}) == len({g for g, _ in results}) > 1
        for g, f, failure in failures if self.on_error == "raise" else ():
            if failure.bug or everywhere:
                raise UserError(
                    f"reward {self.functions[f].spec} {failure.what}, on {_where(groups[g])}"
                    + ("" if failure.bug else f" and all {len(groups)} rows of this step failed")
                )

    def _set(
        self, groups: Sequence[Group], chosen: Sequence[Sequence[int]], results: Mapping[tuple[int, int], Result]
    ) -> tuple[list[Group], RewardCounts]:
        failures = [r for r in results.values() if isinstance(r, Failure)]
        timeouts = sum(f.timeout for f in failures)
        scored = missing = 0
        new_groups = []
        for g, group in enumerate(groups):
            new = list(group.trajectories)
            for position, i in enumerate(chosen[g]):
                given = [results[g, f] for f in range(len(self.functions))]
                scores = [None if isinstance(r, Failure) else r[position] for r in given]
                failed = any(isinstance(r, Failure) for r in given)
                new[i] = self._with_scores(new[i], scores, failed)
                scored += new[i].reward is not None
                missing += new[i].reward is None
            new_groups.append(replace(group, trajectories=tuple(new)))
        return new_groups, RewardCounts(scored, missing, len(failures) - timeouts, timeouts)

    def _with_scores(self, trajectory: Trajectory, scores: Sequence[float | None], failed: bool) -> Trajectory:
        known = [w * s for w, s in zip(self.weights, scores, strict=True) if s is not None]
        rewards = {name: math.nan if s is None else s for name, s in zip(self.names, scores, strict=True)}
        return replace(trajectory, reward=None if failed or not known else math.fsum(known), rewards=rewards)


def _unscored(group: Group, score_expert: bool) -> tuple[int, ...]:
    wanted = (Source.POLICY, Source.EXPERT) if score_expert else (Source.POLICY,)
    return tuple(i for i, t in enumerate(group.trajectories) if t.reward is None and any(t.wrote(s) for s in wanted))


def _where(group: Group) -> str:
    return group.example.where or group.example.id


def _stop_all(children: list[Child]) -> None:
    for child in children:
        child.stop()
