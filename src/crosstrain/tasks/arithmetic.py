"""The bundled study's tasks: *sums*, with one right answer, and *pairs*, with many.

Operands are 1 to 35 and every prompt shows one solved example, because there SmolLM2-135M-Instruct is right often enough for a
reward to say something (docs/log.md has the measurements): without the example its samples hardly ever contain an answer.

Numbers decide which split a question belongs to, by a hash that never changes, so splits are disjoint whatever the seeds: the
unordered pair of operands for sums, the given number and the limit for pairs. A demonstration of pairs shows an addition whose
operands belong to the same split of sums, so that no training text of either task states the answer to a held-out sum.
Out-of-distribution splits put the numbers of the test split in other words.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from crosstrain.errors import UserError
from crosstrain.tasks.registry import Task, chat_row, completion_text

if TYPE_CHECKING:
    from crosstrain.data.rows import Row

LARGEST = 35
SPLITS = ("train", "dev", "test")
_SHARES = {"train": range(0, 70), "dev": range(70, 80), "test": range(80, 100)}

SYSTEM = "Complete the equation."
SUMS_EXAMPLE = ("3 + 4 =", "3 + 4 = 7")
PAIRS_EXAMPLE = ("3 + _ < 9", "3 + 4 = 7")
_SHOWN = (3, 4)
SUMS_WORDINGS = {
    "train": "{a} {op} {b} =",
    "ood_words": "What is {a} {word} {b}?",
    "ood_print": "print({a} {op} {b})",
}
PAIRS_WORDINGS = {
    "train": "{n} + _ < {limit}",
    "ood_words": "{n} plus _ is less than {limit}",
    "ood_request": "Add something to {n} and stay below {limit}.",
}


def sums() -> Task:
    """Adding two numbers or subtracting the smaller one; the right number passes, alone or at the end of an equation.

    Splits: train, dev, test, and with test's numbers ood_words ("What is 12 plus 3?") and ood_print ("print(12 + 3)").
    """
    describe = f"One right answer: sums and differences of numbers from 1 to {LARGEST}."
    return Task("sums", 1, (*SPLITS, "ood_words", "ood_print"), _sums_rows, sums_reward, parse_number, describe)


def pairs() -> Task:
    """A right addition of one's own choice, with a given number and a sum below a limit; a demonstration shows one at random.

    Splits: train, dev, test, and with test's numbers ood_words ("17 plus _ is less than 30") and ood_request ("Add something to
    17 and stay below 30.").
    """
    describe = f"Many right answers: add any number to a given one (2 to {LARGEST}) and stay below a limit."
    return Task("pairs", 1, (*SPLITS, "ood_words", "ood_request"), _pairs_rows, pairs_reward, parse_equation, describe)


def arithmetic() -> Task:
    """Sums and pairs in turn: train, dev and test of both, and ood, the four out-of-distribution splits of both in turn."""
    describe = "Half sums (one right answer), half pairs (many right answers)."
    return Task("arithmetic", 1, (*SPLITS, "ood"), _arithmetic_rows, arithmetic_reward, parse_any, describe)


def split_of(key: str) -> str:
    """The split that a question's numbers belong to, for ever.

    >>> split_of("sums 3 5")
    'test'
    """
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 100
    return next(name for name, buckets in _SHARES.items() if bucket in buckets)


def parse_number(text: str) -> str | None:
    """The number that a reply is, or that it ends with after =, :, "is" or "equals"; a full stop may follow.

    >>> parse_number(" 42. "), parse_number("12 + 34 = 46"), parse_number("The answer is -3."), parse_number("46 or 47")
    ('42', '46', '-3', None)
    """
    found = re.search(r"(?:^|(?:=|:|\bis|\bequals)\s*)(-?\d{1,9})\.?$", text.strip())
    return str(int(found.group(1))) if found else None


def parse_equation(text: str) -> str | None:
    """The addition of two whole numbers that a reply is, in one spelling; it need not be right.

    >>> parse_equation("8+9 = 17."), parse_equation("8 and 9"), parse_equation("8 + 9 = 17 because")
    ('8 + 9 = 17', None, None)
    """
    found = re.fullmatch(r"(\d{1,9})\s*\+\s*(\d{1,9})\s*=\s*(\d{1,9})\.?", text.strip())
    if found is None:
        return None
    a, b, total = map(int, found.groups())
    return f"{a} + {b} = {total}"


def parse_any(text: str) -> str | None:
    """What `parse_equation` or else `parse_number` finds."""
    return parse_equation(text) or parse_number(text)


def sums_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the reply's number is the answer, else 0."""
    return [float(parse_number(completion_text(c)) == a) for c, a in zip(completions, answer, strict=True)]


def pairs_reward(completions: Sequence[Any], given: Sequence[int], limit: Sequence[int], **columns: Any) -> list[float | None]:
    """1 where the reply is a right addition of the given number and another from 1 up, with a sum below the limit, else 0."""
    rows = zip(completions, given, limit, strict=True)
    return [float(_keeps_to(completion_text(c), n, below)) for c, n, below in rows]


def arithmetic_reward(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float | None]:
    """`sums_reward` for rows with an answer, `pairs_reward` for the others."""
    scores = zip(answer, sums_reward(completions, answer), pairs_reward(completions, **columns), strict=True)
    return [from_sums if a else from_pairs for a, from_sums, from_pairs in scores]


def _keeps_to(text: str, given: int, limit: int) -> bool:
    equation = parse_equation(text)
    if equation is None:
        return False
    a, b, total = (int(number) for number in re.findall(r"\d+", equation))
    return a + b == total < limit and given in (a, b) and min(a, b) >= 1


def _sums_rows(split: str, size: int, seed: int) -> list[Row]:
    """Questions without repetition: each unordered pair of operands in both orders with +, and larger minus smaller."""
    numbers = _numbers_of(split)
    questions = [
        question
        for a in range(1, LARGEST + 1)
        for b in range(1, a + 1)
        if _sums_split(a, b) == numbers
        for question in dict.fromkeys([(a, "+", b), (b, "+", a), (a, "-", b)])
    ]
    rows = []
    for number, (a, op, b) in enumerate(_draw("sums", split, questions, size, seed), start=1):
        answer = str(a + b if op == "+" else a - b)
        wording = SUMS_WORDINGS.get(split, SUMS_WORDINGS["train"])
        question = wording.format(a=a, b=b, op=op, word={"+": "plus", "-": "minus"}[op])
        turns = (*SUMS_EXAMPLE, question)
        rows.append(chat_row(turns, f"{a} {op} {b} = {answer}", {"answer": answer}, f"sums/{split}:{number}", SYSTEM))
    return rows


def _pairs_rows(split: str, size: int, seed: int) -> list[Row]:
    """Questions without repetition: a given number and a limit 3 to 50 above it that leaves a demonstration to show."""
    numbers = _numbers_of(split)
    questions = [
        (n, limit, partners)
        for n in range(2, LARGEST + 1)
        for limit in range(n + 3, n + 51)
        if split_of(f"pairs {n} {limit}") == numbers
        and (partners := [m for m in range(1, min(limit - n, LARGEST + 1)) if _sums_split(n, m) == numbers])
    ]
    rng = random.Random(f"pairs demonstrations {split} {seed}")
    rows = []
    for number, (n, limit, partners) in enumerate(_draw("pairs", split, questions, size, seed), start=1):
        m = rng.choice(partners)
        wording = PAIRS_WORDINGS.get(split, PAIRS_WORDINGS["train"])
        turns = (*PAIRS_EXAMPLE, wording.format(n=n, limit=limit))
        columns = {"given": n, "limit": limit}
        rows.append(chat_row(turns, f"{n} + {m} = {n + m}", columns, f"pairs/{split}:{number}", SYSTEM))
    return rows


def _arithmetic_rows(split: str, size: int, seed: int) -> list[Row]:
    ood = [(_sums_rows, "ood_words"), (_pairs_rows, "ood_words"), (_sums_rows, "ood_print"), (_pairs_rows, "ood_request")]
    parts = ood if split == "ood" else [(_sums_rows, split), (_pairs_rows, split)]
    shares = [len(range(i, size, len(parts))) for i in range(len(parts))]
    made = [make(part, n, seed) if n else [] for (make, part), n in zip(parts, shares, strict=True)]
    every = {"answer": "", "given": 0, "limit": 0}
    in_turn = [row for several in zip_longest(*made) for row in several if row is not None]
    return [replace(row, columns={**every, **row.columns}) for row in in_turn]


def _numbers_of(split: str) -> str:
    return "test" if split.startswith("ood") else split


def _sums_split(a: int, b: int) -> str:
    """The split of an unordered pair of operands; the solved example's pair is never held out."""
    pair = (min(a, b), max(a, b))
    return "train" if pair == _SHOWN else split_of(f"sums {pair[0]} {pair[1]}")


def _draw(task: str, split: str, questions: Sequence[Any], size: int, seed: int) -> list[Any]:
    if size > len(questions):
        raise UserError(f"task {task}: split {split!r} has {len(questions)} different questions; got size {size}")
    return random.Random(f"{task} {split} {seed}").sample(questions, size)
