"""Filters: which rows they take, worked by hand and against plain definitions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.config import FilterSpec
from crosstrain.data.filters import Filtered, exact_copies, filter_rows, near_copies, normalised, number_of, runs
from crosstrain.data.rows import Row
from crosstrain.errors import UserError


def row(n: int, completion: str = "x", prompt: str | None = None, **columns: Any) -> Row:
    return Row("prompt_completion", prompt or f"p {n}", completion=completion, columns=columns, where=f"a.jsonl:{n}")


def letters(row: Row) -> list[int]:
    return [len(str(text)) for text in (row.completion, row.chosen, row.rejected) if text is not None]


def test_each_row_is_taken_under_the_first_reason_that_fits() -> None:
    rows = [
        row(1, "abc", grade=3),
        row(2, "abcdef", grade=1),  # too poor, and too long: the first counts
        row(3, "abcdef", grade=3),  # too long
        row(4, "a", grade=3),  # too short
        row(5, "ABC ", "p  1", grade=9),  # a copy of the first, but too good
        row(6, "Abc", "P 1", grade=3),  # a copy of the first
        row(7, "abd", grade=3.5),
    ]
    spec = FilterSpec(min_quality=2, max_quality=5, quality_column="grade", min_length=2, max_length=5, deduplicate="exact")
    found = filter_rows(rows, spec, letters)
    assert found.kept == (0, 6)
    assert found.dropped == {
        "min_quality": ("a.jsonl:2",),
        "max_quality": ("a.jsonl:5",),
        "min_length": ("a.jsonl:4",),
        "max_length": ("a.jsonl:3",),
        "deduplicate": ("a.jsonl:6",),
    }
    assert str(found).startswith("keeps 2 of 7 rows; min_quality took 1, first a.jsonl:2; max_quality took 1")


def test_a_copy_of_a_row_that_is_left_out_stays() -> None:
    rows = [row(1, "long answer", "p"), row(2, "Long  Answer", "p")]
    assert filter_rows(rows, FilterSpec(max_length=11, deduplicate="exact"), letters).kept == (0,)
    poor = [row(1, "b", "p", grade=0), row(2, "b", "p", grade=1)]
    spec = FilterSpec(min_quality=1, quality_column="grade", deduplicate="exact")
    assert filter_rows(poor, spec, letters).kept == (1,)


def test_lengths_are_those_of_every_answer() -> None:
    pair = Row("preference", "p", chosen="abc", rejected="abcdef", where="a.jsonl:1")
    assert filter_rows([pair], FilterSpec(max_length=5), letters).dropped == {"max_length": ("a.jsonl:1",)}
    assert filter_rows([pair], FilterSpec(min_length=4), letters).dropped == {"min_length": ("a.jsonl:1",)}
    assert filter_rows([pair], FilterSpec(min_length=3, max_length=6), letters).kept == (0,)


def test_limits_are_inside() -> None:
    rows = [row(i, "x" * i, grade=i) for i in (1, 2, 3, 4)]
    assert filter_rows(rows, FilterSpec(min_length=2, max_length=3), letters).kept == (1, 2)
    assert filter_rows(rows, FilterSpec(min_quality=2, max_quality=3, quality_column="grade"), letters).kept == (1, 2)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({}, r"a.jsonl:1: column 'grade' is missing; the row's other columns: none"),
        ({"grad": 1}, r"a.jsonl:1: column 'grade' is missing; the row's other columns: grad"),
        ({"grade": "good"}, r"a.jsonl:1: column 'grade' must be a finite number; got 'good'"),
        ({"grade": True}, r"a.jsonl:1: column 'grade' must be a finite number; got True"),
        ({"grade": float("nan")}, r"a.jsonl:1: column 'grade' must be a finite number; got nan"),
        ({"grade": [1]}, r"a.jsonl:1: column 'grade' must be a finite number; got \[1\]"),
    ],
)
def test_a_column_without_a_number_names_the_row(column: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        filter_rows([row(1, **column)], FilterSpec(min_quality=1, quality_column="grade"), letters)


def test_numbers_that_are_text_are_numbers() -> None:
    assert number_of(row(1, grade="2.5"), "grade") == 2.5  # every column of a CSV file is text


def test_a_length_limit_on_rows_without_answers_is_refused() -> None:
    with pytest.raises(UserError, match=r"a.jsonl:1: the row brings no answer, so filter.max_length has no effect"):
        filter_rows([Row("prompt", "p", where="a.jsonl:1")], FilterSpec(max_length=5), letters)


def test_what_is_compared_is_the_text() -> None:
    one = Row(
        "messages", messages=({"role": "user", "content": "Hi "}, {"role": "assistant", "content": "HO"}), columns={"id": 1}
    )
    other = Row(
        "messages", messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}), columns={"id": 2}
    )
    swapped = Row("messages", messages=({"role": "assistant", "content": "hi"}, {"role": "user", "content": "ho"}))
    assert normalised(one) == normalised(other) != normalised(swapped)
    assert normalised(row(1, "a", "p")) != normalised(row(1, "p", "a"))
    good = Row("unpaired", "p", completion="c", label=True)
    assert normalised(good) != normalised(Row("unpaired", "p", completion="c", label=False))
    called = [Row("messages", messages=({"role": "assistant", "tool_calls": [{"name": n}]},)) for n in ("f", "g")]
    assert normalised(called[0]) != normalised(called[1])


def test_near_copies_by_hand() -> None:
    a = "one two three four five six seven"  # 5 runs
    b = "one two three four five six eight"  # 4 of them, of 6 in both: 0.667
    assert len(runs(a) & runs(b)) / len(runs(a) | runs(b)) == 4 / 6
    assert near_copies([a, b], 2 / 3) == [1]
    assert near_copies([a, b], 0.7) == []
    assert near_copies([a, b, a], 0.7) == [2]
    assert near_copies(["a b", "a b", "a c"], 0.5) == [1]  # too few words for a run: the whole text is one
    assert near_copies(["12 + 7 = 19", "12 + 8 = 20"], 0.5) == []
    chinese = [
        "\u6211\u4eca\u5929\u53bb\u5317\u4eac",
        "\u6211\u4eca\u5929\u53bb\u5317\u6d77",
    ]  # 4 runs of characters each, 3 alike
    assert near_copies(chinese, 0.6) == [1] and near_copies(chinese, 0.61) == []


def test_what_is_like_a_copy_and_not_like_the_row_that_stays_stays() -> None:
    chain = ["a b c d e f", "b c d e f g", "c d e f g h"]  # neighbours share 3 of 5 runs, the ends 2 of 6
    assert near_copies(chain, 0.6) == [1]


def naive(texts: list[str], threshold: float) -> list[int]:
    """Every pair, as the definition says."""
    copies: list[int] = []
    for i, text in enumerate(texts):
        for j in range(i):
            shared, both = runs(text) & runs(texts[j]), runs(text) | runs(texts[j])
            if j not in copies and len(shared) / len(both) >= threshold - 1e-9:
                copies.append(i)
                break
    return copies


texts = st.lists(st.lists(st.sampled_from("abcd"), min_size=0, max_size=9).map(" ".join), max_size=12)


@given(texts, st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0]))
def test_near_copies_are_those_of_all_pairs(given_texts: list[str], threshold: float) -> None:
    assert near_copies(given_texts, threshold) == naive(given_texts, threshold)


@given(texts)
def test_filtered_texts_have_no_copies(given_texts: list[str]) -> None:
    kept = [t for i, t in enumerate(given_texts) if i not in exact_copies(given_texts)]
    assert sorted(kept) == sorted(set(given_texts))
    assert exact_copies(kept) == []


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 6), st.integers(1, 6))
def test_no_row_is_lost_between_kept_and_dropped(sizes: list[int], low: int, high: int) -> None:
    rows = [row(i, "x" * n, "p") for i, n in enumerate(sizes)]
    spec = FilterSpec(min_length=min(low, high), max_length=max(low, high), deduplicate="exact")
    found = filter_rows(rows, spec, letters)
    dropped = [where for taken in found.dropped.values() for where in taken]
    assert sorted([rows[i].where for i in found.kept] + dropped) == sorted(r.where for r in rows)
    assert found == filter_rows(
        rows, FilterSpec(min_length=min(low, high), max_length=max(low, high), deduplicate="exact"), letters
    )


def test_the_first_rows_of_each_reason_are_named() -> None:
    assert str(Filtered((0, 1), {"min_length": ("a:1", "a:2", "a:3", "a:4")})) == (
        "keeps 2 of 6 rows; min_length took 4, first a:1, a:2, a:3"
    )
