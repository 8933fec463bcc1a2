"""Every reasoning-gym dataset as a task: its questions, its own scorer, and splits that share no question."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crosstrain.errors import UserError, nearest
from crosstrain.tasks.arithmetic import SPLITS, split_of
from crosstrain.tasks.registry import Task, chat_row, completion_text

if TYPE_CHECKING:
    from crosstrain.data.rows import Row

Config = Mapping[str, Any]
_DRAWS_PER_ROW = 50
_TRIES = 1000


def reasoning_gym(dataset: str, config: Config | None = None) -> Task:
    """The reasoning-gym dataset `dataset`, made with `config` (its own settings, without seed and size).

    Splits: train, dev, test, by a hash of the question's text; no question occurs twice in a split. Rewards are the dataset's own
    `score_answer` for the reply (or for what stands in its last <answer> tags). Most datasets give a reply that only contains the
    right answer part of the reward, in proportion to how much of the reply it is; a reply counts as right at 1.

    Raises UserError when reasoning-gym is not installed, for an unknown dataset, and for settings that the dataset refuses.
    """
    config = dict(config or {})
    _make(dataset, config, seed=0, size=1)
    describe = f"reasoning-gym's {dataset}" + (f" with {json.dumps(config, sort_keys=True)}" if config else "")
    return Task(
        f"reasoning_gym/{dataset}",
        1,
        SPLITS,
        lambda split, size, seed: _rows(dataset, config, split, size, seed),
        functools.partial(_reward, dataset, config),
        parse_reply,
        describe,
    )


def parse_reply(text: str) -> str | None:
    """What the scorer is given: the content of the last <answer> tags, else the whole reply; None when that is empty.

    >>> parse_reply("so <answer> 42 </answer>"), parse_reply(" 42\\n"), parse_reply(" ")
    ('42', '42', None)
    """
    _, opened, inner = text.rpartition("<answer>")
    answer = inner.partition("</answer>")[0] if opened else text
    return answer.strip() or None


def _rows(dataset: str, config: Config, split: str, size: int, seed: int) -> list[Row]:
    rows: list[Row] = []
    for index, entry in _questions(dataset, config, split, size, seed):
        answer = entry["answer"]
        columns = {"answer": "" if answer is None else str(answer), "gym_seed": seed, "gym_size": size, "gym_index": index}
        where = f"reasoning_gym/{dataset}/{split}:{len(rows) + 1}"
        rows.append(chat_row([entry["question"]], None if answer is None else str(answer), columns, where))
        if len(rows) == size:
            return rows
    raise UserError(
        f"task reasoning_gym: {dataset} gave only {len(rows)} different questions for split {split!r} in "
        f"{_draws(size)} draws; got size {size}. Ask for fewer, or choose a wider config"
    )


def _questions(dataset: str, config: Config, split: str, size: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    made = _made(dataset, json.dumps(config, sort_keys=True), seed, size)
    seen: set[str] = set()
    for index in range(_draws(size)):
        entry = made[index]
        question = entry["question"]
        if question not in seen and split_of(f"reasoning_gym {question}") == split:
            seen.add(question)
            yield index, entry


def _reward(
    dataset: str,
    config: Config,
    completions: Sequence[Any],
    gym_seed: Sequence[int],
    gym_size: Sequence[int],
    gym_index: Sequence[int],
    **columns: Any,
) -> list[float | None]:
    """The dataset's score of each reply. Entries are made again from seed and index: not all of them survive JSON."""
    scores: list[float | None] = []
    for completion, seed, size, index in zip(completions, gym_seed, gym_size, gym_index, strict=True):
        score, entry = _scorer(dataset, json.dumps(config, sort_keys=True), seed, size, index)
        scores.append(float(score(parse_reply(completion_text(completion)), entry)))
    return scores


@functools.lru_cache(maxsize=256)
def _scorer(dataset: str, config: str, seed: int, size: int, index: int) -> tuple[Callable[..., float], dict[str, Any]]:
    made = _made(dataset, config, seed, size)
    return made.score_answer, made[index]


@functools.lru_cache(maxsize=8)
def _made(dataset: str, config: str, seed: int, size: int) -> Any:
    # reasoning-gym seeds question i with seed + i, so that neighbouring seeds would share nearly all questions
    spread = int.from_bytes(hashlib.blake2b(f"{dataset} {seed}".encode(), digest_size=4).digest(), "big") >> 1
    return _make(dataset, json.loads(config), seed=spread, size=_draws(size))


def _make(dataset: str, config: Config, *, seed: int, size: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise UserError("the task reasoning_gym needs the demo extra: pip install 'crosstrain[demo]'") from error
    if dataset not in DATASETS:
        raise UserError(f"task reasoning_gym: unknown dataset {dataset!r}; {nearest(dataset, DATASETS)}")
    if reserved := {"seed", "size"} & set(config):
        raise UserError(f"task reasoning_gym: {sorted(reserved)[0]!r} belongs beside the task, not in its config")
    try:
        return create_dataset(dataset, seed=seed, size=size, **config)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"task reasoning_gym: {dataset} refuses {json.dumps(dict(config))}: {error}") from error


def _draws(size: int) -> int:
    return size * _DRAWS_PER_ROW + _TRIES
