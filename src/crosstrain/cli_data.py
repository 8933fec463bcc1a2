"""`crosstrain data check RECIPE.yaml`: what a recipe does to its data before it trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from crosstrain import assemble, checks
from crosstrain.config import DataSpec, Recipe, load_recipe
from crosstrain.data.check import BATCH, print_batch, print_problems
from crosstrain.data.curricula import Curriculum
from crosstrain.data.filters import NAMED
from crosstrain.data.mixtures import Mixture
from crosstrain.data.rows import BadRows
from crosstrain.errors import UserError, visible
from crosstrain.load_data import LoadedStream, Part, needs_model
from crosstrain.models import load_tokenizer, resolve_device
from crosstrain.prepare import with_answers
from crosstrain.training.collect import shares
from crosstrain.types import Method


def check_recipe(file: Path, given: Sequence[str] = (), console: Console | None = None, *, ask: bool = False) -> None:
    """Print, of each stream: its sources, what filters took, which rows are chosen, what comes first, and the first batch.

    The model is loaded where rows are chosen or ordered by what it makes of them. given: options of the command line, which a
    recipe has of its own. ask: ask servers for answers that are not there yet and that a run would ask for, when nothing else is
    wrong; words stand for them else. Raises UserError for what a run would refuse in its data, after printing what there is to see
    where the rows could be read.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    if given:
        option = given[0].replace("_", "-")
        raise UserError(f"--{option} has no effect on a recipe, which says it itself; change {given[0]!r} in {file}")
    recipe = load_recipe(file)
    if ask and not any(source.teacher for data in recipe.data.values() for source in data.sources):
        raise UserError(f"--ask is for a recipe whose data have a `teacher`; those of {file} have none, so leave it out")
    spec = recipe.model
    tokenizer = load_tokenizer(spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    model = None
    if any(map(needs_model, recipe.data.values())):
        model, _ = assemble.load_base(recipe, resolve_device(recipe.device))
    methods = [assemble.stage_method(stage) for stage in recipe.stages]
    try:
        loaded = assemble.load_streams(recipe, tokenizer, model, methods, ask="later" if ask else "never")
    except BadRows as error:
        print_problems(error, console)
        raise
    if ask:
        try:
            checks.check_before_asking(recipe, methods, loaded, tokenizer)
        except UserError:
            _print_streams(loaded, recipe, methods, tokenizer, console)
            raise
        loaded = with_answers(recipe, tokenizer, model, methods, loaded)
    _print_streams(loaded, recipe, methods, tokenizer, console)
    for method in methods:
        checks.check_data(method, loaded)


def first_batch(name: str, recipe: Recipe) -> int:
    """How many examples the first stage that draws from a stream takes for its first step; a few where none does."""
    for stage in recipe.stages:
        method = assemble.stage_method(stage)
        wanted = shares(method.plan.streams(method.init()), stage.batch_size)
        if drawn := sum(n for stream, n in wanted.items() if method.plan.origin(stream) == name):
            return drawn
    return BATCH


def _print_streams(
    loaded: assemble.Loaded, recipe: Recipe, methods: Sequence[Method], tokenizer: Any, console: Console
) -> None:
    unused = checks.unused_settings(recipe, methods)
    for name, found in loaded.found.items():
        said = [text for text in unused if text.startswith((f"data.{name}:", f"data.{name}."))]
        _print_stream(name, found, said, recipe, tokenizer, console)


def _print_stream(
    name: str, loaded: LoadedStream, unused: Sequence[str], recipe: Recipe, tokenizer: Any, console: Console
) -> None:
    spec, n = recipe.data[name], first_batch(name, recipe)
    said = [f"{name}: {loaded.rows:,} rows"]
    counts = loaded.stream.counts(0, n) if isinstance(loaded.stream, Mixture) else {}
    weights = [1.0 if s.weight is None else s.weight for s in spec.sources]
    for part, source, weight in zip(loaded.parts, spec.sources, weights, strict=True):
        mixed = f", share {weight / sum(weights):.1%}, {counts[part.label]} of the first {n}" if counts else ""
        said += [f"  {part.label}: {len(part.rows):,} rows{mixed}", *(f"    {line}" for line in _done(part, source))]
    shown = [text for text in loaded.warnings if not any(f": {what} keeps" in text for what in ("teacher", "filter"))]
    said += [f"warning: {text}" for text in (*shown, *unused)]
    for line in said:
        console.print(Text(visible(line)))
    print_batch(loaded.stream.draw(0, n)[0], recipe.seed, tokenizer, console)
    console.print()


def _done(part: Part, spec: DataSpec) -> list[str]:
    """What was done to a source's rows, a line each."""
    said = []
    if part.taught is not None and spec.teacher is not None and not part.taught.waiting:
        said.append(f"teacher {part.taught.kept}; {spec.teacher.model}'s answers are in {part.taught.file}")
    if part.filtered is not None:
        said.append(f"filter {part.filtered}")
    if spec.select is not None and part.chosen is not None:
        said.append(
            f"select: {spec.select.rule} takes {len(part.rows)} of {part.chosen_of}, first {', '.join(part.chosen_where[:NAMED])}"
        )
    if spec.order is not None and part.difficulty is not None and isinstance(part.stream, Curriculum):
        by = spec.order.column if spec.order.by == "column" else spec.order.by
        pace = f"{spec.order.pacing}, a pool of {part.stream.pool(0)} that grows to all over {part.stream.paced} draws"
        pace = pace if part.stream.paced else "sorted"
        first = ", ".join(f"{part.rows[i].where} ({part.difficulty[i]:g})" for i in part.stream.ranking[:NAMED])
        said.append(f"order: by {by}, {spec.order.direction.replace('_', ' ')}, {pace}; first {first}")
    return said
