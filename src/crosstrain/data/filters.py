"""Rows that are left out of a stream, and why: quality, then length, then duplicates of a row that stays."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crosstrain.config.data import FilterSpec
from crosstrain.data.rows import Row
from crosstrain.errors import UserError

NAMED = 3
"""Rows of each reason that a message names."""

WORDS = 3
"""Words of a run by which near duplicates are told."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


@dataclass(frozen=True)
class Filtered:
    """What a filter leaves.

    kept: the rows' indices, in order. dropped: by reason (the filter's own key), where each row that it took stands.
    """

    kept: tuple[int, ...]
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people.

        >>> print(Filtered((0,), {"deduplicate": ("a.jsonl:2", "a.jsonl:3")}))
        keeps 1 of 3 rows; deduplicate took 2, first a.jsonl:2, a.jsonl:3
        """
        total = len(self.kept) + sum(map(len, self.dropped.values()))
        took = [f"{key} took {len(rows)}, first {', '.join(rows[:NAMED])}" for key, rows in self.dropped.items()]
        return "; ".join([f"keeps {len(self.kept)} of {total} rows", *took])


def filter_rows(rows: Sequence[Row], spec: FilterSpec, lengths: Callable[[Row], Sequence[int]]) -> Filtered:
    """The rows that `spec` leaves, each other one under the first reason that takes it.

    lengths: the tokens of each answer that a row brings, before any cut; asked only where a length is limited. Raises UserError
    with file:row for a row without a number in the quality column, or without an answer where lengths are limited.
    """
    reasons: dict[int, str] = {}
    for i, row in enumerate(rows):
        reason = _by_quality(row, spec) or _by_length(row, spec, lengths)
        if reason is not None:
            reasons[i] = reason
    if spec.deduplicate is not None:
        left = [i for i in range(len(rows)) if i not in reasons]
        texts = [normalised(rows[i]) for i in left]
        copies = exact_copies(texts) if spec.deduplicate == "exact" else near_copies(texts, spec.near_threshold)
        reasons |= {left[k]: "deduplicate" for k in copies}
    dropped = {
        key: tuple(rows[i].where for i in sorted(reasons) if reasons[i] == key)
        for key in FilterSpec.model_fields
        if key in reasons.values()
    }
    return Filtered(tuple(i for i in range(len(rows)) if i not in reasons), dropped)


def number_of(row: Row, column: str) -> float:
    """The number in a row's column; UserError with file:row where there is none."""
    if column not in row.columns:
        has = ", ".join(sorted(row.columns)) or "none"
        raise UserError(f"{row.where}: column {column!r} is missing; the row's other columns: {has}")
    value = row.columns[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{row.where}: column {column!r} must be a finite number; got {value!r:.60}")
    return number


def normalised(row: Row) -> str:
    """The text of a row's prompt and answers by which duplicates are told: letter case, white space and Unicode forms aside; its
    other columns are not looked at.

    >>> normalised(Row("prompt_completion", "What  is 2+2?", completion="Ｆour\\n"))
    'prompt: what is 2+2? completion: four'
    """
    parts: list[tuple[str, Any]] = [
        ("prompt", row.prompt),
        ("completion", row.completion),
        ("messages", row.messages),
        ("chosen", row.chosen),
        ("rejected", row.rejected),
        ("label", row.label),
    ]
    said = [f"{name}: {_text(value)}" for name, value in parts if value is not None and value != ()]
    return " ".join(unicodedata.normalize("NFKC", " ".join(said)).casefold().split())


def exact_copies(texts: Sequence[str]) -> list[int]:
    """The indices of the texts that an earlier one equals."""
    first: dict[str, int] = {}
    return [i for i, text in enumerate(texts) if first.setdefault(text, i) != i]


def near_copies(texts: Sequence[str], threshold: float) -> list[int]:
    """The indices of the texts whose runs of three words overlap with those of an earlier text, itself no copy, by `threshold` or
    more: |A and B| / |A or B|. Words are runs of letters and digits, single marks, and single characters of scripts without spaces.

    Exact, not by hashing. With t = threshold, sets that overlap so much share one of the first |A| - ceil(t |A|) + 1 runs of each,
    in an order that all share; so with the rarest first, few pairs are compared.
    """
    sets = [runs(text) for text in texts]
    frequency: dict[tuple[str, ...], int] = {}
    for found in sets:
        for run in found:
            frequency[run] = frequency.get(run, 0) + 1
    holders: dict[tuple[str, ...], list[int]] = {}
    copies = []
    for i, found in enumerate(sets):
        rare = sorted(found, key=lambda run: (frequency[run], run))
        # a little below the exact bound, which may come out a hair too high in floating point
        rare = rare[: len(rare) - math.ceil(threshold * len(rare) - 1e-9) + 1]
        near = {j for run in rare for j in holders.get(run, ())}
        if any(len(found & sets[j]) >= threshold * len(found | sets[j]) - 1e-9 for j in near):
            copies.append(i)
        else:
            for run in rare:
                holders.setdefault(run, []).append(i)
    return copies


def runs(text: str) -> frozenset[tuple[str, ...]]:
    """A text's runs of three words; the whole text where it has fewer.

    >>> sorted(runs("is 2+2 4?"))
    [('+', '2', '4'), ('2', '+', '2'), ('2', '4', '?'), ('is', '2', '+')]
    """
    words = _WORD.findall(text)
    return frozenset(tuple(words[i : i + WORDS]) for i in range(max(len(words) - WORDS, 0) + 1))


def _by_quality(row: Row, spec: FilterSpec) -> str | None:
    if spec.quality_column is None:
        return None
    quality = number_of(row, spec.quality_column)
    if spec.min_quality is not None and quality < spec.min_quality:
        return "min_quality"
    return "max_quality" if spec.max_quality is not None and quality > spec.max_quality else None


def _by_length(row: Row, spec: FilterSpec, lengths: Callable[[Row], Sequence[int]]) -> str | None:
    if spec.min_length is None and spec.max_length is None:
        return None
    found = lengths(row)
    if not found:
        key = "max_length" if spec.min_length is None else "min_length"
        raise UserError(f"{row.where}: the row brings no answer, so filter.{key} has no effect on it; remove it")
    if spec.min_length is not None and min(found) < spec.min_length:
        return "min_length"
    return "max_length" if spec.max_length is not None and max(found) > spec.max_length else None


def _text(value: Any) -> str:
    """Text as it is; messages as `role: content`, and what else they hold."""
    if isinstance(value, Mapping):
        content = [f"{value['role']}: {value.get('content') or ''}"] if "role" in value else []
        return " ".join(content + [f"{k}: {_text(v)}" for k, v in sorted(value.items()) if k not in ("role", "content")])
    return " ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
