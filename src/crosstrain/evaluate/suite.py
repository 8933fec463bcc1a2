"""The bundled forgetting suite: general questions with gold answers, and passages of general prose."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

SUITE_VERSION = 1
"""Goes up whenever a question, an answer, a passage or the matching changes; numbers of different versions do not compare."""

HINT = "Answer briefly."
"""Follows every question, so that a model that likes full sentences knows what is wanted."""


@dataclass(frozen=True)
class Question:
    """A question with one right answer.

    accept: other wordings that count as right. other: wrong options that the question itself names; the first one that a reply
    mentions decides. match_case: upper and lower case matter.
    """

    id: str
    topic: str
    question: str
    answer: str
    accept: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    match_case: bool = False

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The question as chat messages."""
        return ({"role": "user", "content": f"{self.question} {HINT}"},)


@dataclass(frozen=True)
class Passage:
    """A few sentences of prose; register is the kind of text."""

    id: str
    register: str
    text: str


@cache
def questions() -> tuple[Question, ...]:
    """The suite's questions, always in the same order."""
    return tuple(
        Question(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})
        for record in _records("general_knowledge.jsonl")
    )


def some_questions(n: int | None) -> tuple[Question, ...]:
    """n of the questions at equal distances in their order, which is by topic; all of them when n is None or there are no more.

    >>> len(some_questions(None)), [q.topic for q in some_questions(3)]
    (168, ['geography', 'language', 'culture'])
    """
    every = questions()
    return every if n is None or n >= len(every) else tuple(every[i * len(every) // n] for i in range(n))


@cache
def passages() -> tuple[Passage, ...]:
    """The suite's passages, always in the same order."""
    return tuple(Passage(**record) for record in _records("prose.jsonl"))


def is_right(question: Question, reply: str) -> bool:
    """Whether a reply gives the gold answer or an accepted one: it mentions it, as whole words, before any wrong option.

    Case, punctuation, articles and typographic variants (H₂O) do not matter. A mention is enough because a model that answers in a
    sentence knows no less than one that answers in a word.

    >>> q = Question("x", "", "Which is larger, an elephant or a mouse?", "An elephant", other=("mouse",))
    >>> is_right(q, "The elephant is larger than the mouse."), is_right(q, "A mouse, not an elephant"), is_right(q, "Elephants?")
    (True, False, False)
    """
    text = normalise(reply, question.match_case)
    right = [at for a in (question.answer, *question.accept) if (at := _mention(text, normalise(a, question.match_case))) >= 0]
    wrong = [at for a in question.other if (at := _mention(text, normalise(a, question.match_case))) >= 0]
    return bool(right) and min(right) < min(wrong, default=len(text) + 1)


def normalise(text: str, match_case: bool = False) -> str:
    """Words separated by single spaces, without punctuation, articles and (unless match_case) capitals.

    >>> normalise("  The U.S.A. -- don’t!")
    'usa dont'
    """
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"['’`.]", "", text if match_case else text.casefold())
    words = re.sub(r"[\W_]+", " ", text).split()
    return " ".join(w for w in words if w.casefold() not in {"a", "an", "the"})


def _mention(text: str, words: str) -> int:
    """Where `words` starts in `text` as whole words, -1 if nowhere."""
    return f" {text} ".find(f" {words} ")


def _records(name: str) -> Iterator[dict[str, Any]]:
    text = resources.files("crosstrain.evaluate").joinpath(name).read_text(encoding="utf-8")
    return (json.loads(line) for line in text.splitlines())
