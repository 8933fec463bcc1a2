"""From what a recipe says of a stream to the stream: read, answer, filter, tokenize, choose, order, mix."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crosstrain.base_view import informative, mean_losses
from crosstrain.config import DataSpec, OrderSpec, Recipe, SelectSpec, TextTeacherSpec
from crosstrain.data import Stream, encode, read_rows
from crosstrain.data.chat import with_system
from crosstrain.data.curricula import Curriculum, ranking
from crosstrain.data.filters import NAMED, Filtered, filter_rows, number_of
from crosstrain.data.mixtures import Mixture
from crosstrain.data.rows import Row, data_hash
from crosstrain.data.selection import Chosen, any_rows, extreme
from crosstrain.errors import UserError
from crosstrain.tasks import get_task
from crosstrain.text_teacher import Taught, question, teach
from crosstrain.types import Example, Source

Asking = Literal["now", "later", "never"]
"""When servers are asked for answers that are not there yet. Words stand for them until then, or, in a dry run, for good."""


@dataclass(frozen=True)
class Part:
    """One source of a stream, ready to be drawn from, and what was done to its rows.

    rows: those that are drawn from. taught, filtered, chosen, difficulty (of each row): as the recipe asks for them, None where it
    does not. chosen_of: how many there were to choose from. chosen_where: file:row of the chosen, in the order in which they were.
    looked_at: tokens that went through the untrained model for it.
    """

    label: str
    stream: Stream | Curriculum
    rows: tuple[Row, ...]
    taught: Taught | None = None
    filtered: Filtered | None = None
    chosen: Chosen | None = None
    chosen_of: int = 0
    chosen_where: tuple[str, ...] = ()
    difficulty: tuple[float, ...] | None = None
    looked_at: int = 0


@dataclass(frozen=True)
class LoadedStream:
    """A stream and its parts. hash: of the rows that are drawn from, their order and shares where the recipe sets these."""

    stream: Stream | Curriculum | Mixture
    parts: tuple[Part, ...]
    hash: str
    warnings: tuple[str, ...] = ()
    report: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows are drawn from."""
        return sum(len(part.rows) for part in self.parts)

    @property
    def waiting(self) -> int:
        """How many requests would get the answers that are not there yet."""
        return sum(part.taught.waiting for part in self.parts if part.taught is not None)

    @property
    def looked_at(self) -> int:
        """Tokens that went through the untrained model to choose rows and to order them."""
        return sum(part.looked_at for part in self.parts)


@dataclass(frozen=True)
class _Place:
    """Where a source stands: what its examples are called by, its key in the recipe, and the seed of its order."""

    name: str
    key: str
    seed: int


def needs_model(spec: DataSpec) -> bool:
    """Whether rows of a stream are chosen or ordered by what the untrained model makes of them."""
    return any(
        (s.select is not None and s.select.rule != "random") or (s.order is not None and s.order.by == "loss")
        for s in spec.sources
    )


def judged_by_answers(spec: DataSpec) -> bool:
    """Whether a source's answers decide which of its rows are drawn, or when: by what they say, or by how many there are."""
    looks = spec.filter is not None and any(getattr(spec.filter, key) for key in ("min_length", "max_length", "deduplicate"))
    return looks or spec.select is not None or (spec.order is not None and spec.order.by in ("length", "loss"))


def unjudged(spec: DataSpec) -> DataSpec:
    """The stream with all rows of sources that have a teacher, as they are: none are answered, filtered, chosen or ordered."""
    if spec.mixture is not None:
        return spec.model_copy(update={"mixture": [unjudged(source) for source in spec.mixture]})
    idle = ("teacher", "filter", "select", "order") if spec.teacher is not None else ()
    return spec.model_copy(update=dict.fromkeys(idle))


def load_stream(
    name: str,
    spec: DataSpec,
    recipe: Recipe,
    tokenizer: Any,
    model: Any,
    contexts: Mapping[str, str] | None = None,
    *,
    ask: Asking = "now",
    learned: bool = True,
) -> LoadedStream:
    """The stream `name`. model: the untrained one, for what `needs_model`; None else. contexts: other texts of its prompts, see
    `Method.contexts`. ask: when servers are asked for answers that are not there yet; where words stand for them, rows are not
    filtered, chosen or ordered, a warning says so, and where the answers are still to come, so are contexts that tell them.
    learned: whether anybody learns from answers. Where nobody does, a teacher's prompts stay prompts, unless its answers
    decide which rows are drawn. Whether answers happen to be there then changes nothing, the rows' hash among it.

    UserError for a row that cannot be used, with file:row, and for a setting that leaves no row or has no effect.
    """
    labels = _labels(spec)
    places = [_Place(name, f"data.{name}", recipe.seed)]
    if spec.mixture is not None:
        # a seed for each source, so that sources of one size do not come in one order
        places = [_Place(f"{name}.{k}", f"data.{name}.mixture.{k}", _seed(recipe.seed, k)) for k in range(len(labels))]
    parts = tuple(
        _part(*given, recipe, tokenizer, model, contexts, ask=ask, learned=learned)
        for given in zip(places, labels, spec.sources, strict=True)
    )
    hashes = [_hash(part) for part in parts]
    there = [part for part in parts if part.taught is None or not part.taught.waiting]
    warnings = [w for part in there for w in _look(name, part.stream.examples, tokenizer)]
    for part, source in zip(parts, spec.sources, strict=True):
        called = name if len(parts) == 1 else f"{name}, {part.label}"
        if part.taught is not None and source.teacher is not None:
            warnings += [f"{called}: {text}" for text in _on_answers(part.taught, source.teacher)]
        if part.filtered is not None and part.filtered.dropped:
            warnings.append(f"{called}: filter {part.filtered}")
    report = _report(spec, parts)
    if spec.mixture is None:
        return LoadedStream(parts[0].stream, parts, hashes[0], tuple(warnings), report)
    weights = tuple(1.0 if s.weight is None else s.weight for s in spec.sources)
    mixed = Mixture(name, labels, tuple(part.stream for part in parts), weights)
    return LoadedStream(mixed, parts, _digest([hashes, weights]), tuple(warnings), report)


def rows_of(spec: DataSpec) -> list[Row]:
    """The rows of a source: from its file, or made by its task."""
    if spec.path is not None:
        rows = read_rows(spec.path)
        return rows[: spec.size] if spec.size is not None else rows
    assert spec.task is not None
    return get_task(spec.task, **spec.task_config).rows(spec.split, spec.size or 1024, spec.seed)


def _part(
    at: _Place,
    label: str,
    spec: DataSpec,
    recipe: Recipe,
    tokenizer: Any,
    model: Any,
    contexts: Mapping[str, str] | None,
    *,
    ask: Asking,
    learned: bool,
) -> Part:
    """One source, whose examples are called `name:row` by the rows that it had before any was left out, `name:row#2` where a
    teacher gave several answers."""
    rows = rows_of(spec)
    taught, names = None, tuple(map(str, range(len(rows))))
    if spec.teacher is not None and not (learned or judged_by_answers(spec)):
        rows = [question(row, spec.teacher) for row in rows]
    elif spec.teacher is not None:
        taught = _taught(at, rows, spec, recipe, tokenizer, contexts, ask=ask)
        rows, names = list(taught.rows), taught.names
        if taught.waiting:
            spec = unjudged(spec)
            if ask == "later":  # words that stand for an answer may be too long for a context
                contexts = {name: text for name, text in (contexts or {}).items() if "{completion}" not in text}
    filtered = None
    if spec.filter is not None:
        filtered = filter_rows(rows, spec.filter, lambda row: _trained(encode(row, tokenizer, id="")))
    kept = range(len(rows)) if filtered is None else _kept(at, filtered)
    examples = tuple(
        encode(
            rows[i],
            tokenizer,
            id=f"{at.name}:{names[i]}",
            max_prompt_length=recipe.max_prompt_length,
            max_length=recipe.max_length,
            system_prompt=spec.system_prompt,
            contexts=contexts,
        )
        for i in kept
    )
    pool = tuple(rows[i] for i in kept)
    chosen = None if spec.select is None else _choose(at, spec.select, examples, recipe, model)
    looked_at = _tokens(examples) if spec.select is not None and spec.select.rule != "random" else 0
    indices = range(len(pool)) if chosen is None else sorted(chosen.rows)
    left, examples = tuple(pool[i] for i in indices), tuple(examples[i] for i in indices)
    where = () if chosen is None else tuple(pool[i].where for i in chosen.rows)
    if spec.order is None:
        return Part(
            label, Stream(at.name, examples, at.seed), left, taught, filtered, chosen, len(pool), where, None, looked_at
        )
    o, difficulty = spec.order, _difficulty(at, spec.order, left, examples, recipe, model)
    looked_at += _tokens(examples) if o.by == "loss" else 0
    stream = Curriculum(at.name, examples, ranking(difficulty, o.direction), o.pacing, o.start, o.until, at.seed)
    return Part(label, stream, left, taught, filtered, chosen, len(pool), where, difficulty, looked_at)


def _taught(
    at: _Place,
    rows: Sequence[Row],
    spec: DataSpec,
    recipe: Recipe,
    tokenizer: Any,
    contexts: Mapping[str, str] | None,
    *,
    ask: Asking,
) -> Taught:
    """The rows with their teacher's answers, who reads the prompts that the model will read."""
    assert spec.teacher is not None
    questions = [question(row, spec.teacher) for row in rows]
    if spec.system_prompt is not None:
        questions = [with_system(row, spec.system_prompt) for row in questions]
    for row in questions if ask == "now" else ():  # what the run would refuse is refused before anything is paid for
        limits = {"max_prompt_length": recipe.max_prompt_length, "max_length": recipe.max_length}
        encode(row, tokenizer, id="", **limits, contexts=contexts)
    _check_columns(at, questions, spec, spec.teacher.n)
    return teach(f"{at.key}.teacher", questions, spec.teacher, ask=ask == "now")


def _check_columns(at: _Place, questions: Sequence[Row], spec: DataSpec, n: int) -> None:
    """UserError for what the filter, `select` and `order` would refuse whatever `n` answers each question gets."""
    left: Sequence[int] = range(len(questions))
    if spec.filter is not None:
        by_quality = spec.filter.model_copy(update=dict.fromkeys(("min_length", "max_length", "deduplicate")))
        left = _kept(at, filter_rows(questions, by_quality, lambda row: ()))
    if spec.select is not None:
        _check_size(at, spec.select, len(left) * n)
    elif spec.order is not None and spec.order.column is not None:  # rows that are not chosen need not have the column
        for i in left:
            number_of(questions[i], spec.order.column)


def _on_answers(taught: Taught, teacher: TextTeacherSpec) -> list[str]:
    """A warning for answers that are left out, or are not there yet."""
    if taught.waiting:
        return [
            f"the run will make {taught.waiting} requests to {teacher.model} at {teacher.base_url}; nothing was asked now, and "
            f"{teacher.max_completion_length} words stand for each answer; filter, select and order wait for the answers"
        ]
    return [f"teacher {taught.kept}; all are in {taught.file}"] if taught.kept.dropped else []


def _choose(at: _Place, select: SelectSpec, examples: Sequence[Example], recipe: Recipe, model: Any) -> Chosen:
    _check_size(at, select, len(examples))
    if select.rule == "random":
        return any_rows(len(examples), select.size, _seed(recipe.seed, at.name))
    _check_answers(f"{at.key}.select", examples)
    tokens = recipe.micro_batch_tokens
    if select.rule == "loss":
        return extreme(mean_losses(model, examples, tokens_per_micro_batch=tokens), select.size, select.direction)
    return informative(model, examples, select.size, select.ridge, tokens_per_micro_batch=tokens)


def _check_size(at: _Place, select: SelectSpec, rows: int) -> None:
    if select.size >= rows:
        raise UserError(f"{at.key}.select.size: got {select.size} of {rows} rows, which leaves nothing to choose; take fewer")


def _kept(at: _Place, filtered: Filtered) -> tuple[int, ...]:
    """The rows that a filter leaves; UserError where there are none."""
    if not filtered.kept:
        raise UserError(f"{at.key}.filter leaves no row: it {filtered}")
    return filtered.kept


def _difficulty(
    at: _Place, order: OrderSpec, rows: Sequence[Row], examples: Sequence[Example], recipe: Recipe, model: Any
) -> tuple[float, ...]:
    if order.column is not None:
        return tuple(number_of(row, order.column) for row in rows)
    _check_answers(f"{at.key}.order", examples)
    if order.by == "length":
        return tuple(float(max(_trained(e))) for e in examples)
    return tuple(mean_losses(model, examples, tokens_per_micro_batch=recipe.micro_batch_tokens))


def _check_answers(where: str, examples: Sequence[Example]) -> None:
    lacking = [e.where for e in examples if not e.expert]
    if lacking:
        raise UserError(f"{where}: {len(lacking)} of {len(examples)} rows bring no answer to look at, first {lacking[0]}")


def _trained(example: Example) -> list[int]:
    """Trained tokens of each answer."""
    return [sum(s != Source.PROMPT for s in t.source) for t in example.expert]


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(t.tokens) for e in examples for t in e.expert)


def _labels(spec: DataSpec) -> tuple[str, ...]:
    """A name for each source: its file's or task's, numbered where several have the same."""
    names = [Path(s.path).name if s.path is not None else str(s.task) for s in spec.sources]
    return tuple(n if names.count(n) == 1 else f"{n}#{names[:k].count(n) + 1}" for k, n in enumerate(names))


def _seed(seed: int, key: Any) -> int:
    return zlib.crc32(f"{seed} {key}".encode())


def _hash(part: Part) -> str:
    """The content's hash; a curriculum's has the ranking in it, which may come from the model."""
    content = data_hash(part.rows)
    return _digest([content, part.stream.ranking]) if isinstance(part.stream, Curriculum) else content


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _report(spec: DataSpec, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What was done to the rows, for records; nothing where nothing was."""
    if spec.mixture is None and not (parts[0].taught or spec.filter or spec.select or spec.order):
        return []
    total = sum(s.weight or 1.0 for s in spec.sources)
    found = []
    for part, source in zip(parts, spec.sources, strict=True):
        one: dict[str, Any] = {"source": part.label, "rows": len(part.rows), "share": (source.weight or 1.0) / total}
        if part.taught is not None and source.teacher is not None:
            one["teacher"] = {"model": source.teacher.model, "base_url": source.teacher.base_url, **_took(part.taught.kept)}
            one["teacher"] |= {key: getattr(part.taught, key) for key in ("prompt_tokens", "completion_tokens")}
            one["teacher"]["answers"] = str(part.taught.file)
        if part.filtered is not None:
            one["filter"] = _took(part.filtered)
        if part.chosen is not None and source.select is not None:
            one["select"] = {"rule": source.select.rule, "of": part.chosen_of, "rows": list(part.chosen_where)}
            one["select"] |= {"gains": list(part.chosen.gains)} if part.chosen.gains else {}
        if part.difficulty is not None and isinstance(part.stream, Curriculum):
            first = [part.rows[i].where for i in part.stream.ranking[:NAMED]]
            one["order"] = {"first": first, "difficulty": [min(part.difficulty), max(part.difficulty)]}
        found.append(one)
    return found


def _took(filtered: Filtered) -> dict[str, Any]:
    dropped = {key: {"rows": len(rows), "first": list(rows[:NAMED])} for key, rows in filtered.dropped.items()}
    return {"kept": len(filtered.kept), "dropped": dropped}


def _look(name: str, examples: Sequence[Example], tokenizer: Any) -> list[str]:
    """Counted warnings about a stream's labels, before step 1."""
    expert = [(e, t) for e in examples for t in e.expert]
    cut = [e.where for e, t in expert if not t.finished]
    endless = [e.where for e, t in expert if t.finished and t.tokens[-1] != tokenizer.eos_token_id]
    found = []
    if cut:
        found.append(f"{name}: {len(cut)} of {len(expert)} answers are cut at max_length, first {cut[0]}")
    if endless:
        found.append(f"{name}: {len(endless)} of {len(expert)} answers do not end in the end token, first {endless[0]}")
    return found
