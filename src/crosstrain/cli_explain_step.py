"""What `crosstrain explain --model` does: one step of a method on real rows, without updating anything."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from crosstrain import assemble
from crosstrain.cli_model import model_of
from crosstrain.config import Recipe, parse
from crosstrain.config.files import override
from crosstrain.data import Stream
from crosstrain.errors import UserError
from crosstrain.explain_page import page
from crosstrain.explain_step import explain_step
from crosstrain.explain_text import notes, sentence, show
from crosstrain.methods import load_method
from crosstrain.models import load_weights
from crosstrain.prepare import Prepared, base_engine, prepare
from crosstrain.training.engine import Engine
from crosstrain.training.reference import kept_reference
from crosstrain.training.score import choose_layout
from crosstrain.types import Method


@dataclass(frozen=True)
class Asked:
    """What the command line asked for.

    data, tasks: `FILE` or `STREAM=FILE`, `TASK` or `STREAM=TASK`. example: the id of the one row to look at. reference, old: models
    in the place of the model itself. teacher: a model to learn from.
    """

    method: str
    model: str
    data: Sequence[str] = ()
    tasks: Sequence[str] = ()
    task_config: Sequence[str] = ()
    settings: Sequence[str] = ()
    rewards: Sequence[str] = ()
    example: str | None = None
    reference: str | None = None
    old: str | None = None
    teacher: str | None = None
    batch_size: int | None = None
    max_completion_length: int | None = None
    seed: int = 0
    streams: Mapping[str, Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", _streams(self))


def explain_model(asked: Asked, out: Path | None, *, as_json: bool, console: Console | None = None) -> None:
    """Print what a step of the method would do to every token, and write it as a page to `out`."""
    found = looked_at(asked)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(found), encoding="utf-8")
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return
    show(found, console or Console())
    if out is not None:
        print(f"page: {out}")


def looked_at(asked: Asked) -> dict[str, Any]:
    """The step, with the sentence and notes on it. UserError for everything about the request that cannot be."""
    method = load_method(asked.method, **override({}, asked.settings))
    _check(asked, method)
    recipe = _recipe(asked, method)
    ready = prepare(recipe)
    batch_size = recipe.stages[0].batch_size
    if asked.example is not None:
        ready = _only(ready, asked.example)
    with assemble.reward_scorer(recipe, ready.tokenizer) as rewards:
        engine = base_engine(recipe, ready, rewards)
        if asked.reference is not None:
            model = _frozen("--reference", asked.reference, recipe, ready)
            engine = replace(engine, reference=lambda: contextlib.nullcontext(model))
        old = None
        if asked.old is not None:  # sampled by other weights, and compared with the same ones
            old = replace(_sampling_from(asked.old, recipe, ready, rewards), reference=engine.reference)

        def decode(tokens: Sequence[int]) -> str:
            return str(ready.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        found = explain_step(engine, method, ready.optimizer, decode, batch_size, old=old)
    return {
        **found,
        "model": asked.model,
        "data": [f"{stream}: {spec.path or spec.task}" for stream, spec in recipe.data.items()],
        "summary": sentence(found),
        "notes": notes(found, old_given=asked.old is not None),
    }


def _check(asked: Asked, method: Method) -> None:
    """UserError for what the method lacks, and for an option that could have no effect on it."""
    wanted = method.plan.streams(method.init())
    missing = [name for name in wanted if name not in asked.streams]
    if missing:
        raise UserError(
            f"method {method.name} draws from the data stream{'s' * (len(wanted) > 1)} {' and '.join(wanted)}, and {missing[0]} is "
            f"not given; name {'each' if len(wanted) > 1 else 'it'}, as --data {missing[0]}=FILE or --task {missing[0]}=TASK"
        )
    unused = [name for name in asked.streams if name not in wanted]
    if unused:
        raise UserError(f"method {method.name} draws nothing from {unused[0]}; its data streams are {', '.join(wanted)}")
    samples = method.plan.samples
    if method.plan.asks_for_rewards and not asked.rewards and not asked.tasks:
        raise UserError(
            f"method {method.name} samples completions, and nothing scores them; add --reward NAME (built in or file.py:function), "
            "or take the rows from a task with --task NAME"
        )
    if method.reads("teacher") and asked.teacher is None:
        raise UserError(f"method {method.name} learns from a teacher; name one with --teacher MODEL")
    useless = {
        "--reward": bool(asked.rewards) and not method.plan.asks_for_rewards,
        "--max-completion-length": asked.max_completion_length is not None and not samples,
        "--reference": asked.reference is not None and kept_reference(method, first=True) is None,
        "--teacher": asked.teacher is not None and not method.reads("teacher"),
        "--old": asked.old is not None and "old_logp" not in method.needs and not samples,
    }
    for option, true in useless.items():
        if true:
            why = {"--reference": "compares with no reference", "--teacher": "learns from no teacher"}
            why["--reward"] = "learns from no reward" if samples else "samples nothing"
            what = why.get(option, "samples nothing")
            raise UserError(f"{option} has no effect: {method.name} {what}; leave it out")


def _streams(asked: Asked) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    config = override({}, asked.task_config)
    if config and not asked.tasks:
        raise UserError("--task-config has no effect without --task")
    for key, texts in (("path", asked.data), ("task", asked.tasks)):
        for text in texts:
            name, equals, value = text.partition("=")
            named = bool(equals) and name.isidentifier() and not Path(text).exists()
            stream, what = (name, value) if named else ("train", text)
            if stream in found:
                raise UserError(f"the data stream {stream!r} is given twice; name others as --data NAME=FILE")
            found[stream] = {key: what} | ({"task_config": config} if key == "task" and config else {})
    return found


def _recipe(asked: Asked, method: Method) -> Recipe:
    """The run whose first step this is."""
    several = len(asked.streams) > 1
    default = 1 if asked.example is not None and not several else 4
    sampling = {} if asked.max_completion_length is None else {"max_completion_length": asked.max_completion_length}
    return parse(
        Recipe,
        {
            "model": model_of(asked.model),
            "data": dict(asked.streams),
            "method": {"name": asked.method, "settings": override({}, asked.settings)},
            "learning_rate": 1e-5,
            "max_steps": 1,
            "batch_size": asked.batch_size or default,
            "sampling": sampling,
            "seed": asked.seed,
            "evaluation": {"forgetting": False, "divergence": False},
            **({"rewards": list(asked.rewards)} if asked.rewards else {}),
            **({"teacher": model_of(asked.teacher)} if asked.teacher is not None else {}),
        },
    )


def _only(ready: Prepared, wanted: str) -> Prepared:
    """Everything with the stream that holds the example reduced to it."""
    streams = ready.loaded.streams
    for name, stream in streams.items():
        for i, example in enumerate(stream.examples):
            if wanted in (example.id, str(example.columns.get("id", ""))) or (len(streams) == 1 and wanted == str(i)):
                chosen = Stream(name, (example,), stream.seed)
                return replace(ready, loaded=replace(ready.loaded, streams={**streams, name: chosen}))
    ids = [example.id for stream in streams.values() for example in stream.examples]
    close = get_close_matches(wanted, ids, n=1, cutoff=0.3)
    near = f"did you mean {close[0]!r}? " if close else ""
    known = ", ".join(f"{s.examples[0].id} to {s.examples[-1].id}" for s in streams.values())
    raise UserError(f"--example {wanted}: there is no such row; {near}Rows are {known}")


def _frozen(option: str, name: str, recipe: Recipe, ready: Prepared) -> Any:
    """Another model to compare with. UserError where it does not have the model's vocabulary."""
    dtype = assemble.computing_dtype(recipe, ready.device)
    model = load_weights(model_of(name), dtype=dtype, device=ready.device).requires_grad_(False)
    has, wanted = (m.get_input_embeddings().weight.shape[0] for m in (model, ready.model))
    if has != wanted:
        raise UserError(
            f"{option} {name}: its vocabulary has {has} tokens, and that of {recipe.model.name} {wanted}; give a relative"
        )
    return model


def _sampling_from(name: str, recipe: Recipe, ready: Prepared, rewards: Any) -> Engine:
    """The engine that collects the step with other weights than those that are looked at."""
    model = _frozen("--old", name, recipe, ready)
    engine = base_engine(recipe, replace(ready, model=model), rewards)
    return replace(engine, layout=choose_layout(model), parameters=sum(p.numel() for p in model.parameters()))
