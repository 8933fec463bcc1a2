"""The parent's side of one child process that runs reward functions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from crosstrain.errors import UserError
from crosstrain.rewards.load import Reward

IN_WORKER = "CROSSTRAIN_REWARD_WORKER"
"""Set in the environment of processes that run rewards."""


def check_not_in_worker() -> None:
    """UserError in a process that runs rewards: a script that trains where it is loaded would start itself again and again."""
    if IN_WORKER in os.environ:
        raise UserError(
            "the file of this reward trains when it is loaded, and a reward is loaded in a process of its own; put what starts the "
            'training under `if __name__ == "__main__":`, or the reward into another file'
        )


class ChildTimeout(Exception):
    """A call took longer than its limit; the child was killed."""


class ChildDied(Exception):
    """The child ended in the middle of a call; the message says how."""


class Child:
    """One spawned process. It is started by `start`, takes one call at a time, and is gone after `stop` or after a failed call.

    Spawned afresh instead of forked: a fork of a process with threads and a GPU may hang.
    """

    def __init__(self, rewards: Sequence[Reward], memory_gb: float | None) -> None:
        start = {
            "functions": [{"spec": r.spec, "config": dict(r.config)} for r in rewards],
            "memory": None if memory_gb is None else int(memory_gb * 2**30),
        }
        # one thread each, so that several do not fight over the processor, and set order that does not change between runs
        environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | dict(os.environ) | {IN_WORKER: "1"}
        self._process = subprocess.Popen(
            # -P: the working folder does not come before Python's own modules
            [sys.executable, "-P", "-m", "crosstrain.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only the parent, and killing reaches what the reward itself started
        )
        self._greeting = json.dumps(start)
        self._ready = False

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def start(self, seconds: float) -> None:
        """Return once the reward functions are loaded. Raises UserError when they cannot be, or not within `seconds`."""
        if self._ready:
            return
        try:
            reply = self._exchange(self._greeting, seconds)
        except ChildTimeout as error:
            raise UserError(
                f"the reward functions were not loaded within {seconds:g} s; what do their files do on import?"
            ) from error
        except ChildDied as error:
            raise UserError(f"the process that loads the reward functions {error}") from error
        if "error" in reply:
            self.stop()
            raise UserError(reply["error"])
        self._ready = True

    def call(self, function: int, columns: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The child's reply to one call. Raises ChildTimeout or ChildDied; the child is then gone."""
        return self._exchange(json.dumps({"function": function, "seconds": seconds, "columns": columns}), seconds)

    def stop(self) -> None:
        """End the process by closing its input, by force if that takes longer than a second, with whatever it started."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what is still unsent to a process that is gone
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        self._kill()
        self._process.wait()

    def _exchange(self, line: str, seconds: float) -> dict[str, Any]:
        """One line out, one line in. A timer kills the child at the limit, which ends both a blocked write and a blocked read."""
        assert self._process.stdin is not None and self._process.stdout is not None
        lock, done, late = threading.Lock(), threading.Event(), threading.Event()

        def expire() -> None:
            with lock:
                if not done.is_set():
                    late.set()
                    self._kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            reply = ""
        finally:
            with lock:
                done.set()
            timer.cancel()
        if reply.endswith("\n") and not late.is_set():
            content: dict[str, Any] = json.loads(reply)
            return content
        self.stop()
        if late.is_set():
            raise ChildTimeout
        code = self._process.returncode
        raise ChildDied(f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}")

    def _kill(self) -> None:
        """Kill the process and whatever it started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
