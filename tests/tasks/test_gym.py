"""reasoning-gym's datasets as tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from crosstrain.data.rows import Row, data_hash
from crosstrain.errors import UserError
from crosstrain.tasks import Task, get_task

reasoning_gym = pytest.importorskip("reasoning_gym")

CONFIG = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def scores(task: Task, rows: Sequence[Row], replies: Sequence[str]) -> list[float | None]:
    """The reward of a reply to each row, after the columns went through JSON as they do on the way to a child process."""
    columns: list[dict[str, Any]] = json.loads(json.dumps([dict(r.columns) for r in rows]))
    return task.reward(completions=list(replies), **{key: [c[key] for c in columns] for key in columns[0]})


@pytest.mark.parametrize(
    ("dataset", "config"), [("chain_sum", CONFIG), ("gcd", {}), ("arc_agi", {}), ("countdown", {}), ("leg_counting", {})]
)
def test_reference_answers_get_full_marks(dataset: str, config: dict[str, int]) -> None:
    task = get_task("reasoning_gym", dataset=dataset, config=config)
    rows = task.rows("test", 5, 0)
    right = [str(r.completion[0]["content"]) if r.completion else "" for r in rows]  # type: ignore[index, call-overload]
    if dataset == "countdown":
        right = [entry["metadata"]["expression"] for entry in entries(dataset, rows)]
    assert scores(task, rows, right) == [1.0] * 5
    assert max(s for s in scores(task, rows, ["no idea"] * 5) if s is not None) < 0.5


def entries(dataset: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """reasoning-gym's own entries of the rows' questions, searched by text."""
    from crosstrain.tasks.gym import _made

    c = rows[0].columns
    return [_made(dataset, "{}", c["gym_seed"], c["gym_size"])[r.columns["gym_index"]] for r in rows]


def test_scores_are_the_datasets_own_with_part_of_the_marks_for_a_longer_reply() -> None:
    task = get_task("reasoning_gym", dataset="chain_sum", config=CONFIG)
    [row] = task.rows("test", 1, 0)
    answer = str(row.columns["answer"])
    long = f"I think that it is {answer}"
    [partial] = scores(task, [row], [long])
    assert partial == pytest.approx(len(answer) / len(long))
    assert scores(task, [row], [f"hm <answer>{answer}</answer>"]) == [1.0]


def test_splits_share_no_question_for_any_pair_of_seeds_and_repeat_none() -> None:
    task = get_task("reasoning_gym", dataset="chain_sum", config=CONFIG)
    made = {s: [str(r.prompt[0]["content"]) for seed in (0, 1) for r in task.rows(s, 60, seed)] for s in task.splits}  # type: ignore[index, call-overload]
    for one, other in combinations(task.splits, 2):
        assert set(made[one]) & set(made[other]) == set()
    for questions in made.values():
        assert len(set(questions[:60])) == len(set(questions[60:])) == 60


def test_seeds_give_different_questions_and_one_seed_the_same() -> None:
    task = get_task("reasoning_gym", dataset="gcd")
    assert data_hash(task.rows("train", 20, 5)) == data_hash(task.rows("train", 20, 5))
    zero, one = ({str(r.prompt) for r in task.rows("train", 200, seed)} for seed in (0, 1))
    assert len(zero & one) < 20, "reasoning-gym's own neighbouring seeds share nearly all"


def test_a_dataset_with_too_few_questions_says_how_many_it_gave() -> None:
    task = get_task("reasoning_gym", dataset="chain_sum", config={"max_terms": 2, "max_digits": 1})
    with pytest.raises(UserError, match=r"chain_sum gave only \d+ different questions for split 'dev'.*got size 500"):
        task.rows("dev", 500, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "chain_summ"}, "did you mean 'chain_sum'"),
        ({"dataset": "chain_sum", "config": {"max_term": 2}}, "chain_sum refuses"),
        ({"dataset": "chain_sum", "config": {"min_terms": -1}}, "min_terms must be positive"),
        ({"dataset": "chain_sum", "config": {"seed": 1}}, "'seed' belongs beside the task"),
    ],
)
def test_a_dataset_or_setting_that_does_not_exist_is_an_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task("reasoning_gym", **config)
