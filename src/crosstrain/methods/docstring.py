"""What a method's docstring says, in parts: what it is, its loss, the weight of a token, and each setting.

The shape, which a test holds every registered method to:

    One line that says what it is.

    Loss: the formula, on as many lines as it takes. Weight on grad log pi: the weight of a token, in the same paragraph or its own.

    setting: what it is, and where its default is from. other, another: what both are.

    Anything else, in paragraphs of its own.

A part starts a line or follows a full stop, and ends where the next one starts or at an empty line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

COMMON = {
    "num_generations": "Completions sampled for each prompt.",
    "num_iterations": "Passes over what was collected; the first has a ratio of 1 (TRL's name).",
    "minibatches": "Optimizer steps that a pass is cut into, by group.",
    "epsilon": "How far below and above 1 a ratio may be before PPO's clip closes it.",
    "epsilon_high": "The upper bound of the clip, where it is another than `epsilon`.",
    "solved_above": "A completion with a larger reward counts as solved.",
}
"""Settings that mean the same wherever they occur, unless a method's docstring says more."""


@dataclass(frozen=True)
class Said:
    """The parts of a docstring: texts without line breaks, but for lines that are set in (formulas).

    idea, notes: what stands before and after the loss, apart from the other parts.
    """

    summary: str = ""
    loss: str = ""
    weight: str = ""
    idea: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


def said(factory: Callable[..., Any], settings: Collection[str]) -> Said:
    """What the docstring of a factory says of its method and of `settings`; those that it leaves out are from `COMMON`.

    >>> def example(beta=0.1, n=2):
    ...     '''An example.
    ...
    ...     Loss: beta x. Weight: beta.
    ...
    ...     beta: how much of it. It may be 0.
    ...     '''
    >>> found = said(example, ("beta",))
    >>> found.loss, found.weight, found.settings
    ('beta x.', 'beta.', {'beta': 'how much of it. It may be 0.'})
    """
    summary, *paragraphs = (inspect.getdoc(factory) or "").split("\n\n")
    loss: list[str] = []
    weight: list[str] = []
    idea: list[str] = []
    notes: list[str] = []
    about: dict[str, str] = {}
    for paragraph in paragraphs:
        for head, text in _parts(paragraph, settings):
            if head.startswith("Loss"):
                loss.append(text)
            elif head.startswith("Weight"):
                weight.append(text)
            elif head:
                about.update(dict.fromkeys(re.split(r",\s", head), text))
            elif text:
                (notes if loss else idea).append(text)
    common = {name: COMMON[name] for name in settings if name in COMMON and name not in about}
    return Said(_joined(summary), "\n".join(loss), "\n".join(weight), tuple(idea), tuple(notes), {**common, **about})


def _parts(paragraph: str, settings: Collection[str]) -> list[tuple[str, str]]:
    """The heads of a paragraph, each with its text; what stands before the first has no head."""
    names = "|".join(sorted(map(re.escape, settings), key=len, reverse=True)) or r"(?!)"
    heads = rf"(?:Loss|Weight)[^:.]*?|(?:{names})(?:,\s(?:{names}))*"
    starts = list(re.finditer(rf"(?:^|(?<=[.)] )|(?<=\.\n))({heads}):(?=\s)", paragraph, re.MULTILINE))
    texts = [paragraph[: starts[0].start()] if starts else paragraph]
    ends = [*(m.start() for m in starts), len(paragraph)][1:]
    texts += [_qualified(m[1]) + paragraph[m.end() : end] for m, end in zip(starts, ends, strict=True)]
    return list(zip(["", *(m[1] for m in starts)], map(_joined, texts), strict=True))


def _qualified(head: str) -> str:
    """What a head says beyond its name: `Loss, summed over all tokens` -> `summed over all tokens:`."""
    more = re.sub(r"^(Loss|Weight)( \(logged\)|\s+on\s+grad\s+log\s+pi)?,?\s*", "", head) if head[:1].isupper() else ""
    return f"{more}:" if more else ""


def _joined(text: str) -> str:
    """The text with its lines joined, but for those that are set in."""
    lines: list[str] = []
    for line in text.strip("\n ").split("\n"):
        formula = line.startswith("    ")
        if lines and not formula and not lines[-1].startswith("    "):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.rstrip())
    return "\n".join(lines)
