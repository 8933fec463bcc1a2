"""What a task is, and tasks by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crosstrain.errors import UserError, nearest

if TYPE_CHECKING:
    from crosstrain.data.rows import Row

Reward = Callable[..., list[float | None]]
"""TRL's signature: (prompts, completions, completion_ids, **columns) -> one score per completion, None where not applicable."""


@dataclass(frozen=True)
class Task:
    """Questions and how answers are checked.

    version: goes up when questions or checks change; stands beside every reported score. splits: what `rows` accepts.
    make_rows: (split, size, seed) -> that many rows. reward: scores completions. parse: a completion's answer in one spelling,
    None when it has none. describe: one sentence for people.
    """

    name: str
    version: int
    splits: tuple[str, ...]
    make_rows: Callable[[str, int, int], list[Row]]
    reward: Reward
    parse: Callable[[str], str | None]
    describe: str = ""

    def rows(self, split: str, size: int, seed: int) -> list[Row]:
        """`size` rows of a split, the same for the same seed.

        Raises UserError for an unknown split, a size below 1, and more rows than the split has different questions.
        """
        if split not in self.splits:
            raise UserError(f"task {self.name}: unknown split {split!r}; {nearest(split, self.splits)}")
        if size < 1:
            raise UserError(f"task {self.name}: size must be at least 1; got {size}")
        return self.make_rows(split, size, seed)


TASKS: Mapping[str, str] = {
    "arithmetic": "crosstrain.tasks.arithmetic:arithmetic",
    "sums": "crosstrain.tasks.arithmetic:sums",
    "pairs": "crosstrain.tasks.arithmetic:pairs",
    "reasoning_gym": "crosstrain.tasks.gym:reasoning_gym",
}


def get_task(name: str, **config: Any) -> Task:
    """The task called `name`, made with its settings.

    Raises UserError for an unknown name or setting, with the nearest valid one, and for a setting that is missing.

    >>> get_task("sums").splits
    ('train', 'dev', 'test', 'ood_words', 'ood_print')
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; {nearest(name, TASKS)}")
    module, _, function = TASKS[name].partition(":")
    factory = getattr(importlib.import_module(module), function)
    allowed = inspect.signature(factory).parameters
    for key in config:
        if key not in allowed:
            raise UserError(f"task {name}: unknown setting {key!r}; {nearest(key, allowed) if allowed else 'it has none'}")
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in config:
            raise UserError(f"task {name}: the setting {key!r} is missing (`task_config: {{{key}: ...}}`)")
    made: Task = factory(**config)
    return made


def completion_text(completion: Any) -> str:
    """The text of a completion as reward functions receive it: plain text, or a list of chat messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def chat_row(turns: Sequence[str], answer: str | None, columns: Mapping[str, Any], where: str, system: str = "") -> Row:
    """A row whose prompt is a chat (user and assistant by turns, user last), with a demonstration unless `answer` is None."""
    from crosstrain.data.rows import Row  # not at the top: the processes that score import this module, and need no torch

    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    prompt = tuple([{"role": "system", "content": system}, *messages] if system else messages)
    if answer is None:
        return Row("prompt", prompt, columns=columns, where=where)
    demonstration = ({"role": "assistant", "content": answer},)
    return Row("prompt_completion", prompt, completion=demonstration, columns=columns, where=where)
