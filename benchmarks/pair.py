"""Two workers that take turns, and what came of it."""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_DISABLED": "true",
}
"""The same for both sides; threads and allocator are left as the system has them."""


LONG = 60.0
"""Seconds of the first setting's warm-up from which settings are compared by it, without a step after it: what is set up in a first
step takes seconds."""

PATIENCE, SETUP = 1.6, 30.0
"""A setting is no longer tried when its warm-up takes so many times as long as the quickest one's so far and so many seconds more,
or its step so many times as long: a step of some does half as much again."""


class WorkerFailed(RuntimeError):
    """A worker ended where an answer was due; the message has the end of its log. side: whose it was."""

    def __init__(self, message: str, side: Side) -> None:
        super().__init__(message)
        self.side = side


class TooSlow(RuntimeError):
    """A worker did not answer in time."""


@dataclass(frozen=True)
class Side:
    """A worker: its command, a name for its log, and what its settings are called in the table."""

    command: Sequence[str]
    name: str
    label: str = ""


@dataclass(frozen=True)
class Steps:
    """What a worker said of each step after the warm-up."""

    lines: tuple[dict[str, Any], ...]

    @property
    def seconds(self) -> list[float]:
        """Seconds per unit of work, step by step."""
        return [line["seconds"] / line["amount"] for line in self.lines]

    @property
    def speed(self) -> float:
        """Units of work per second, the median."""
        return 1 / statistics.median(self.seconds)

    @property
    def memory_gb(self) -> float:
        """The peak of all steps, in GiB."""
        return max(float(line["memory_gb"]) for line in self.lines)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, the median."""
        return statistics.median(line["seconds"] for line in self.lines)


class Worker:
    """A running worker."""

    def __init__(self, side: Side, logs: Path) -> None:
        self.side, self.log = side, logs / f"{side.name}.log"
        logs.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            side.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w", encoding="utf-8"),
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self.facts = self._read()

    def step(self, limit: float | None = None) -> dict[str, Any]:
        """Ask for a step and wait for it. Raises TooSlow after `limit` seconds without an answer; the worker is ended then."""
        self._say("go")
        if limit is not None and not select.select([self._process.stdout], [], [], limit)[0]:
            self._process.kill()
            raise TooSlow(f"{self.side.name}: no answer within {limit:.0f} s")
        return self._read()

    def floor(self) -> dict[str, Any]:
        """Ask for parts of the last step alone, and wait for them."""
        self._say("floor")
        return self._read()

    def stop(self) -> None:
        """End it, by force where it does not end by itself."""
        if self._process.poll() is None:
            try:
                self._say("stop")
                self._process.wait(timeout=20)
            except (subprocess.TimeoutExpired, WorkerFailed):
                self._process.kill()
                self._process.wait()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failed() from error

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        return dict(json.loads(line))

    def _failed(self) -> WorkerFailed:
        end = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        self._process.kill()
        return WorkerFailed(f"{self.side.name} ended without an answer; {self.log}:\n  " + "\n  ".join(end), self.side)


@contextmanager
def running(side: Side, logs: Path) -> Iterator[Worker]:
    """A worker that is ready, ended afterwards whatever happens."""
    worker = Worker(side, logs)
    try:
        yield worker
    finally:
        worker.stop()


def alone(side: Side, logs: Path, steps: int, warmup: int = 1) -> Steps:
    """Steps of one worker."""
    with running(side, logs) as worker:
        lines = [worker.step() for _ in range(warmup + steps)]
    return Steps(tuple(lines[warmup:]))


def in_turn(ours: Side, peer: Side, logs: Path, steps: int, warmup: int = 1) -> tuple[Steps, Steps]:
    """Steps of two workers, one each in turn."""
    with running(ours, logs) as one, running(peer, logs) as other:
        lines = [(one.step(), other.step()) for _ in range(warmup + steps)]
    return Steps(tuple(a for a, _ in lines[warmup:])), Steps(tuple(b for _, b in lines[warmup:]))


def in_turn_with_floor(ours: Side, peer: Side, logs: Path, steps: int) -> tuple[Steps, Steps, Steps, float]:
    """Steps of two workers after one for warming up, one each in turn, the first of which alternates; the floor of each of our
    steps, measured after both; and the least memory that our worker needs, in GiB."""
    with running(ours, logs) as one, running(peer, logs) as other:
        both(one, other, 0)
        one.floor()
        lines = [(*both(one, other, i), one.floor()) for i in range(steps)]
        needed = float(one.facts["needed_gb"])
    mine, theirs, floors = (Steps(tuple(column)) for column in zip(*lines, strict=True))
    return mine, theirs, floors, needed


def both(one: Worker, other: Worker, turn: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step of each; the other begins in every second turn, so that a machine that becomes slower favours neither."""
    if turn % 2:
        theirs = other.step()
        return one.step(), theirs
    return one.step(), other.step()


def by_speed(sides: Sequence[Side], logs: Path) -> tuple[list[Side], dict[str, float | None]]:
    """The sides that work, by what they do per second in a step after one for warming up (see LONG), each tried alone; and what
    each did: 0 where it fails, None where it was given up (see PATIENCE)."""
    speeds: dict[str, float | None] = {}
    warmup: float | None = None  # seconds of the quickest so far
    step: float | None = None
    by_warmup = False
    for side in sides:
        try:
            with running(side, logs) as worker:
                line = worker.step(None if warmup is None else PATIENCE * warmup + SETUP)
                by_warmup = by_warmup or (warmup is None and line["seconds"] > LONG)
                warmup = min(warmup or line["seconds"], line["seconds"])
                if not by_warmup:
                    line = worker.step(None if step is None else PATIENCE * step)
                    step = min(step or line["seconds"], line["seconds"])
        except WorkerFailed as error:
            print(f"    {side.label}: {str(error).splitlines()[-1].strip()}", flush=True)
            speeds[side.label] = 0.0
        except TooSlow:
            speeds[side.label] = None
        else:
            speeds[side.label] = line["amount"] / line["seconds"]
    if not any(speeds.values()):
        raise WorkerFailed(f"none of the peer's settings works for {sides[0].name}", sides[0])
    working = [side for side in sides if speeds[side.label]]
    return sorted(working, key=lambda s: -(speeds[s.label] or 0.0)), speeds
