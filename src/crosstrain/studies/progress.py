"""What a study shows while it runs: which run, how far, and how long until all is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from crosstrain.studies.estimate import expected_seconds
from crosstrain.training.display import Display, about


@dataclass
class Clock:
    """What is known of a study's times: planned and measured seconds per arm, and those of one evaluation.

    waiting: the arms of the runs that have not begun, one entry per run.
    """

    planned: Mapping[str, float]
    measured: dict[str, list[float]] = field(default_factory=dict)
    evaluation: float = 0.0
    waiting: Sequence[str] = ()

    def left(self, running: str | None = None, done: float = 0.0) -> float:
        """Expected seconds until all runs are done, of which `running` is one, its training done to the share `done`."""
        rest = sum(self._expected(arm) for arm in self.waiting)
        return rest + (self._expected(running) * (1 - min(done, 1.0)) if running is not None else 0.0)

    def note(self, arm: str, seconds: float) -> None:
        """One more run of an arm was measured."""
        self.measured.setdefault(arm, []).append(seconds)

    def _expected(self, arm: str) -> float:
        return expected_seconds(arm, self.planned, self.measured, self.evaluation)


class StudyDisplay:
    """A run's display under the study's own title, such as `run 4 of 18 (sft, seed 0), about 12 min left`.

    It has the methods of `Display`, so that a run inside a study reports to it as to any display.
    """

    def __init__(self, console: Console) -> None:
        self.title = ""
        self.running: str | None = None
        self.clock: Clock | None = None
        self._run = Display(console)
        self._console = console

    def begin(self, title: str, running: str | None = None) -> None:
        """What comes next is called `title`; it is a run of the arm `running`, if it is one of the study's runs."""
        self.title, self.running = title, running

    def start(self, title: str, done: float = 0.0) -> None:
        """The run's training begins; its own name, the folder's, gives way to the study's."""
        self._run.start(self._heading(done), done)

    def step(self, done: float, metrics: Mapping[str, float]) -> None:
        """After a step of the run: `done` is the share of its training."""
        self._run.title = self._heading(done)
        self._run.step(done, metrics)

    def say(self, text: str) -> None:
        """A message on a line of its own."""
        self._run.say(text)

    def note(self, text: str) -> None:
        """A message about the run that is going on."""
        self.say(f"{self.title}: {text}")

    def finish(self) -> None:
        """End the run's display."""
        self._run.finish()

    def _heading(self, done: float) -> str:
        if self.clock is None:
            return self.title
        return f"{self.title}, {about(self.clock.left(self.running, done))} left in all"
