"""`crosstrain data check`: what a file holds and what would be trained, or which rows cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crosstrain.data.chat import encode
from crosstrain.data.rows import BadRows, Kind, Row, data_hash, look_at_rows, usable
from crosstrain.data.streams import Stream
from crosstrain.errors import UserError, visible
from crosstrain.models import load_tokenizer
from crosstrain.types import Example, Source, Trajectory

KINDS: Mapping[Kind, str] = {
    "prompt": "prompt: to sample completions from, scored by a reward",
    "prompt_completion": "prompt + completion: a demonstration each",
    "messages": "messages: a conversation each, its assistant turns the demonstration",
    "preference": "prompt + chosen + rejected: a preference pair each",
    "unpaired": "prompt + completion + label: a good or bad answer each",
}
PROBLEMS_SHOWN = 20
BATCH = 8
PIECE = 300
"""Characters of one prompt or answer that are shown; the middle of a longer one is left out."""


@dataclass(frozen=True)
class Checked:
    """A file that can be used: its rows and their tokens, under the limits it was read with."""

    rows: Sequence[Row]
    examples: Sequence[Example]
    max_length: int

    @property
    def answers(self) -> list[Trajectory]:
        """Every demonstration, chosen, rejected or labelled answer."""
        return [t for e in self.examples for t in e.expert]


def check(file: Path, model: str, *, max_prompt_length: int, max_length: int, console: Console | None = None) -> None:
    """Print what a file holds: row type, counts, lengths, what would be cut, duplicates, what would be trained, the first batch.

    Raises UserError after printing the rows that cannot be used, each with file:row.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    tokenizer = load_tokenizer(model)
    try:
        checked = read(file, tokenizer, max_prompt_length=max_prompt_length, max_length=max_length)
    except BadRows as error:
        print_problems(error, console)
        raise
    _print(checked, file, tokenizer, console)


def print_problems(error: BadRows, console: Console) -> None:
    """Print the rows that cannot be used, unless there is only one, which is the error's own message."""
    shown = error.problems[:PROBLEMS_SHOWN] if len(error.problems) > 1 else ()
    for text in shown:
        console.print(Text(visible(text)))
    if len(error.problems) > PROBLEMS_SHOWN:
        console.print(f"... and {len(error.problems) - PROBLEMS_SHOWN} more")


def read(file: Path, tokenizer: Any, *, max_prompt_length: int, max_length: int) -> Checked:
    """The file's rows and their tokens; BadRows with every message when some cannot be used."""
    found = look_at_rows(file)
    examples: list[Example] = []
    for i, row in enumerate(found):
        try:
            if isinstance(row, Row):
                examples.append(
                    encode(row, tokenizer, id=f"train:{i}", max_prompt_length=max_prompt_length, max_length=max_length)
                )
        except UserError as error:
            found[i] = error
    return Checked(usable(found, str(file)), examples, max_length)


def repeated(rows: Sequence[Row]) -> list[Row]:
    """The rows whose content an earlier row already had."""
    seen: set[str] = set()
    found = []
    for row in rows:
        content = data_hash([row])
        if content in seen:
            found.append(row)
        seen.add(content)
    return found


def _print(checked: Checked, file: Path, tokenizer: Any, console: Console) -> None:
    rows, answers = checked.rows, checked.answers
    chat = rows[0].kind == "messages" or not isinstance(rows[0].prompt, str)
    console.print(f"{file}: {len(rows):,} rows, {'chat' if chat else 'plain text'}")
    console.print(f"type: {KINDS[rows[0].kind]}")
    columns = sorted({name for row in rows for name in row.columns})
    console.print(Text(visible(f"columns for the reward: {', '.join(columns) or 'none'}")))
    console.print(_lengths(checked.examples))
    cut = [e.where for e in checked.examples for t in e.expert if not t.finished]
    if answers:
        cut_text = f"{len(cut)} of {len(answers)} answers are longer than max_length {checked.max_length} and would be cut"
        console.print(f"truncation: {cut_text}, first {cut[0]}" if cut else "truncation: none")
    copies = repeated(rows)
    first = f", first {copies[0].where}" if copies else ""
    console.print(f"duplicates: {len(copies)}{first}" if copies else "duplicates: none")
    trained = sum(s != Source.PROMPT for t in answers for s in t.source)
    total = sum(len(t.tokens) for t in answers)
    if answers:
        console.print(f"trained: {trained:,} of {total:,} tokens ({trained / total:.1%}), the answers and what ends them")
    else:
        console.print("trained: completions that the model samples; the rows bring no demonstration")
    drawn, _ = Stream("train", tuple(checked.examples)).draw(0, min(BATCH, len(checked.examples)))
    print_batch(drawn, 0, tokenizer, console)


def _lengths(examples: Sequence[Example]) -> Table:
    """Quantiles of the token counts."""
    table = Table("tokens", "min", "median", "95%", "max", box=None)
    counts = {
        "prompt": [len(e.prompt_tokens) for e in examples],
        "answer": [len(t.tokens) - len(e.prompt_tokens) for e in examples for t in e.expert],
        "together": [len(t.tokens) for e in examples for t in e.expert],
    }
    for name, values in counts.items():
        if values:
            low, middle, high, most = (f"{q:.0f}" for q in np.quantile(values, [0, 0.5, 0.95, 1]))
            table.add_row(name, low, middle, high, most)
    return table


def print_batch(drawn: Sequence[Example], seed: int, tokenizer: Any, console: Console) -> None:
    """Print the first step's rows: what is trained in colour, or between [[ and ]] where there is none."""
    coloured = console.is_terminal and console.color_system is not None
    how = "in green" if coloured else "between [[ and ]]"
    console.print(f"\nfirst batch of {len(drawn)} at seed {seed}; what is trained stands {how}:")
    for example in drawn:
        prompt = Trajectory(example.prompt_tokens, (Source.PROMPT,) * len(example.prompt_tokens))
        for trajectory in example.expert or (prompt,):
            label = "" if trajectory.reward is None else f" (reward {trajectory.reward:g})"
            console.print(Text(f"{example.where}{label}", style="bold"))
            console.print(marked(trajectory, tokenizer, coloured=coloured))


def marked(trajectory: Trajectory, tokenizer: Any, *, coloured: bool) -> Text:
    """A trajectory's text with its trained parts in green, or between [[ and ]]."""
    text = Text()
    position = 0
    for trained, run in groupby(trajectory.source, key=lambda s: s != Source.PROMPT):
        n = len(list(run))
        piece = visible(_shortened(tokenizer.decode(list(trajectory.tokens[position : position + n]))))
        position += n
        if trained:
            text.append(piece if coloured else f"[[{piece}]]", style="bold green")
        else:
            text.append(piece, style="dim")
    return text


def _shortened(text: str) -> str:
    if len(text) <= PIECE:
        return text
    half = PIECE // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
