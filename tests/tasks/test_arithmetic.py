"""Sums and pairs: splits that share nothing, demonstrations that are right, checks that cannot be talked round."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosstrain.data.rows import Row, data_hash
from crosstrain.errors import UserError
from crosstrain.tasks import Task, get_task
from crosstrain.tasks.arithmetic import LARGEST, parse_any, parse_equation, parse_number

ALL = {
    ("sums", "train"): 1298,
    ("sums", "dev"): 195,
    ("sums", "test"): 362,
    ("sums", "ood_words"): 362,
    ("sums", "ood_print"): 362,
    ("pairs", "train"): 1128,
    ("pairs", "dev"): 128,
    ("pairs", "test"): 334,
    ("pairs", "ood_words"): 334,
    ("pairs", "ood_request"): 334,
}
"""Every split in full: how many different questions it has."""


def every(task: str, split: str, seed: int = 0) -> list[Row]:
    return get_task(task).rows(split, ALL[task, split], seed)


def demonstration(row: Row) -> str:
    assert row.completion is not None and not isinstance(row.completion, str)
    return str(row.completion[0]["content"])


def question(row: Row) -> str:
    return str(row.prompt[-1]["content"])  # type: ignore[call-overload, index]


def shown(row: Row) -> tuple[int, int]:
    """The unordered operands as they stand in a demonstration."""
    first, _, second, _, _ = demonstration(row).split()
    return min(int(first), int(second)), max(int(first), int(second))


def reward(task: Task, row: Row, reply: str) -> float | None:
    chat = [[{"role": "assistant", "content": reply}]]
    columns = {key: [value] for key, value in row.columns.items()}
    return task.reward(prompts=[row.prompt], completions=chat, completion_ids=[[0]], **columns)[0]


@pytest.mark.parametrize(("task", "split"), ALL)
def test_a_split_has_as_many_different_questions_as_it_says(task: str, split: str) -> None:
    rows = every(task, split)
    assert len({question(r) for r in rows}) == len(rows)
    with pytest.raises(UserError, match=f"{split!r} has {len(rows)} different questions; got size {len(rows) + 1}"):
        get_task(task).rows(split, len(rows) + 1, 0)


@pytest.mark.parametrize(("one", "other"), combinations(("train", "dev", "test"), 2))
def test_splits_of_sums_share_no_operands_in_either_order(one: str, other: str) -> None:
    assert {shown(r) for r in every("sums", one)} & {shown(r) for r in every("sums", other)} == set()


@pytest.mark.parametrize(("one", "other"), combinations(("train", "dev", "test"), 2))
def test_splits_of_pairs_share_no_given_number_with_the_same_limit(one: str, other: str) -> None:
    def keys(split: str) -> set[tuple[object, ...]]:
        return {(r.columns["given"], r.columns["limit"]) for r in every("pairs", split)}

    assert keys(one) & keys(other) == set()


@pytest.mark.parametrize(("task", "split"), [key for key in ALL if key[1].startswith("ood")])
def test_out_of_distribution_questions_have_the_numbers_of_the_test_split_in_words_training_never_uses(
    task: str, split: str
) -> None:
    test, shifted, trained = every(task, "test"), every(task, split), every(task, "train") + every(task, "dev")
    if task == "sums":
        assert {shown(r) for r in shifted} == {shown(r) for r in test}
    else:
        assert {(r.columns["given"], r.columns["limit"]) for r in shifted} == {
            (r.columns["given"], r.columns["limit"]) for r in test
        }
    assert {question(r) for r in shifted} & {question(r) for r in trained + test} == set()


@pytest.mark.parametrize("seed", [0, 1])
def test_no_text_of_training_states_the_answer_to_a_held_out_sum(seed: int) -> None:
    held_out = {shown(r) for split in ("dev", "test") for r in every("sums", split)}
    taught = {shown(r) for task in ("sums", "pairs") for r in every(task, "train", seed)}
    assert taught & held_out == set()
    assert (3, 4) not in held_out, "every prompt shows 3 + 4 = 7"


@pytest.mark.parametrize(("task", "split"), ALL)
def test_every_demonstration_earns_the_reward_and_is_parsed(task: str, split: str) -> None:
    made = get_task(task)
    for row in every(task, split):
        assert reward(made, row, demonstration(row)) == 1.0
        assert made.parse(demonstration(row)) is not None


def test_a_sum_has_one_right_answer_alone_or_at_the_end_of_an_equation() -> None:
    task = get_task("sums")
    for row in every("sums", "test")[:40]:
        answer = str(row.columns["answer"])
        for right in (answer, f" {answer}.", f"The answer is {answer}", f"{question(row)} {answer}\n"):
            assert reward(task, row, right) == 1.0, right
        for wrong in (str(int(answer) + 1), f"{answer}1", f"-{answer}1", f"{answer} or 1", f"not {answer}", f"{answer}.5", ""):
            assert reward(task, row, wrong) == 0.0, wrong


def test_repeating_the_question_is_no_answer_even_where_its_last_number_is_right() -> None:
    halves = [r for r in every("sums", "train") if int(str(r.columns["answer"])) == int(question(r).split()[2])]
    assert halves
    for row in halves:
        assert reward(get_task("sums"), row, question(row).removesuffix(" =")) == 0.0


@pytest.mark.parametrize("split", ["test", "ood_request"])
def test_every_right_addition_within_the_limit_passes_and_nothing_else_does(split: str) -> None:
    task = get_task("pairs")
    for row in every("pairs", split)[:25]:
        n, limit = int(row.columns["given"]), int(row.columns["limit"])
        for m in range(60):
            right = float(m >= 1 and n + m < limit)
            assert reward(task, row, f"{n} + {m} = {n + m}") == reward(task, row, f" {m}+{n} = {n + m}.\n") == right
            assert reward(task, row, f"{n} + {m} = {n + m + 1}") == 0.0
            assert reward(task, row, f"{n} + {m} = {n + m} and more") == 0.0
            assert reward(task, row, f"{n + 1} + {m} = {n + m + 1}") == float(m == n and n + m + 1 < limit)
        assert reward(task, row, f"{limit - 1} - {n} = {limit - 1 - n}") == 0.0
        assert reward(task, row, f"{n + 2} + -1 = {n + 1}") == reward(task, row, f"{n} + 1") == 0.0


def test_demonstrations_of_pairs_are_one_of_many_right_answers() -> None:
    partners = {demonstration(r).split()[2] for r in every("pairs", "train")}
    assert partners == {str(m) for m in range(1, LARGEST + 1)}
    one, other = ([demonstration(r) for r in sorted(every("pairs", "train", s), key=question)] for s in (0, 1))
    assert sum(a != b for a, b in zip(one, other, strict=True)) > len(one) / 2


@pytest.mark.parametrize(("task", "split"), [*ALL, ("arithmetic", "train"), ("arithmetic", "ood")])
def test_rows_depend_on_the_seed_alone(task: str, split: str) -> None:
    made = get_task(task)
    first = data_hash(made.rows(split, 50, 3))
    assert first == data_hash(made.rows(split, 50, 3))
    assert first != data_hash(made.rows(split, 50, 4))


def test_arithmetic_takes_sums_and_pairs_in_turn() -> None:
    task = get_task("arithmetic")
    rows = task.rows("train", 7, 0)
    assert [bool(r.columns["answer"]) for r in rows] == [True, False, True, False, True, False, True]
    assert len({frozenset(r.columns) for r in task.rows("ood", 9, 0)}) == 1, (
        "one set of columns, so that rewards can be batched"
    )
    for split in task.splits:
        for row in task.rows(split, 60, 0):
            assert reward(task, row, demonstration(row)) == 1.0
            assert reward(task, row, "0 + 0 = 99") == 0.0
    wheres = [r.where.split(":")[0] for r in task.rows("ood", 4, 0)]
    assert wheres == ["sums/ood_words", "pairs/ood_words", "sums/ood_print", "pairs/ood_request"]


def test_splits_of_arithmetic_share_no_question() -> None:
    sets = [{question(r) for r in get_task("arithmetic").rows(split, 250, 0)} for split in ("train", "dev", "test", "ood")]
    assert all(not a & b for a, b in combinations(sets, 2))


@given(st.integers(-(10**8), 10**8), st.sampled_from(["{}", " {}. ", "x = {}", "It is {}.", "Answer: {}"]))
def test_a_number_is_read_back_from_any_form(number: int, form: str) -> None:
    assert parse_number(form.format(number)) == str(number)


@pytest.mark.parametrize("parse", [parse_number, parse_equation, parse_any])
@given(text=st.text(alphabet="0123456789 +-=.,:isequal\n", max_size=30))
def test_parsing_any_text_gives_its_own_spelling_or_nothing(parse: Callable[[str], str | None], text: str) -> None:
    found = parse(text)
    assert found is None or parse(found) == found


@pytest.mark.parametrize("text", ["1,234", "= 1,234", "3.5", "= 3.5", "5-3", "12 34", "1e5", "١٢ ٣", "= 1234567890123"])
def test_what_is_not_one_whole_number_is_no_answer(text: str) -> None:
    assert parse_number(text) is None


def test_unknown_splits_and_sizes_are_errors() -> None:
    with pytest.raises(UserError, match="did you mean 'ood_words'"):
        get_task("sums").rows("ood_word", 4, 0)
    with pytest.raises(UserError, match="at least 1; got 0"):
        get_task("pairs").rows("test", 0, 0)
