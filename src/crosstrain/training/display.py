"""Progress for people: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Display:
    """Shows a run's share done, reward or loss, tokens per second and time left.

    In a terminal: one live line. Elsewhere: a plain line at most every `every_s` seconds and at the end of a run.
    """

    def __init__(self, console: Console | None = None, every_s: float = 15.0) -> None:
        self.console = console or Console(stderr=True)
        self.every_s = every_s
        self.title = ""
        self._bar: Progress | None = None
        self._shown = 0.0
        self._started = 0.0
        self._tokens = 0.0
        self._done_at_start = 0.0

    def start(self, title: str, done: float = 0.0) -> None:
        """Begin a run called `title`, of which the share `done` is already there."""
        self._started, self._shown, self._tokens, self._done_at_start = time.monotonic(), 0.0, -1.0, done
        self.title = title
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.add_task(title, total=1.0, completed=done, note="")
            self._bar.start()

    def step(self, done: float, metrics: Mapping[str, float]) -> None:
        """After a step: `done` is the share of the run."""
        note = self._note(done, metrics)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=min(done, 1.0), note=note)
        elif time.monotonic() - self._shown >= self.every_s or done >= 1.0:
            self._shown = time.monotonic()
            self.console.print(f"{self.title}: {min(done, 1.0):4.0%} {note}", highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A message on a line of its own."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A message about the run, on a line of its own."""
        self.say(f"{self.title}: {text}")

    def finish(self) -> None:
        """End the run's display."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _note(self, done: float, metrics: Mapping[str, float]) -> str:
        elapsed = time.monotonic() - self._started
        tokens = metrics.get("cost/processed_tokens", 0.0)
        if self._tokens < 0:
            self._tokens = tokens
        parts = [f"{name} {metrics[name]:.3f}" for name in ("reward", "loss") if name in metrics]
        if elapsed > 0 and tokens > self._tokens:
            parts.append(f"{(tokens - self._tokens) / elapsed:,.0f} tokens/s")
        gained = done - self._done_at_start
        if gained > 0:
            parts.append(f"{_duration(elapsed * max(1.0 - done, 0.0) / gained)} left")
        return "  ".join(parts)


def about(seconds: float) -> str:
    """A rough duration for people.

    >>> about(20), about(754), about(7300)
    ('under a minute', 'about 13 min', 'about 2 h 2 min')
    """
    if seconds < 60:
        return "under a minute"
    whole = round(seconds / 60)
    return f"about {whole} min" if whole < 90 else f"about {whole // 60} h {whole % 60} min"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
