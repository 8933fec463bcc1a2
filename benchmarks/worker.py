"""The worker's side of a benchmark: do a step when asked, say what it took. Standard library only, since peers import it too.

The parent writes "go" for a step, "floor" for parts of the last step alone, and "stop" for the end; the worker answers
each with one JSON line. Two workers that take turns see the same machine, minute by minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Pace:
    """The line to the parent. What anything else prints goes to stderr from then on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._started, self._times = 0.0, os.times()

    def ready(self, **facts: Any) -> None:
        """Everything is loaded."""
        self._tell({"ready": True, **facts})

    def asked(self) -> str:
        """Wait for the next word of the parent, from which on time and the peak of memory count; empty when it has gone."""
        word = sys.stdin.readline().strip()
        forget_peak()
        self._started, self._times = time.perf_counter(), os.times()
        return word

    def go(self) -> bool:
        """Wait to be asked for a step; False when the parent has had enough."""
        return self.asked() == "go"

    def done(self, amount: float, **facts: Any) -> None:
        """What was asked for is over: it took from then until now and did this much."""
        seconds, times = time.perf_counter() - self._started, os.times()
        used = {"user": times.user - self._times.user, "system": times.system - self._times.system}
        self._tell({"seconds": seconds, **used, "amount": amount, "memory_gb": peak_gb(), **facts})

    def _tell(self, line: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def serve(
    pace: Pace,
    step: Callable[[], Mapping[str, Any]],
    floor: Callable[[], Mapping[str, Any]] | None = None,
    more_gb: float = 0.0,
) -> None:
    """Do `step` as often as asked; it returns its amount and other facts. floor: does parts of the last step alone, and returns
    what they took. more_gb: what a step needs beside what is in memory now; both together are told when everything is loaded."""
    forget_peak()
    pace.ready(needed_gb=peak_gb() + more_gb)
    while (word := pace.asked()) in ("go", "floor"):
        if word == "go":
            facts = step()
            pace.done(**facts)
        elif floor is not None:
            pace.done(facts["amount"], **floor())


def forget_peak() -> None:
    """Start the peak anew at what is held now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch := _cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """The most memory held since `forget_peak`, in GiB: of the card where there is one, else of the process."""
    if torch := _cuda():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 2**20


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
