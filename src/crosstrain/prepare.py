"""Everything that a run or its plan needs, loaded and checked before step 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from crosstrain import assemble, checks
from crosstrain.config import Recipe, Stage
from crosstrain.models import resolve_device
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine, Teacher
from crosstrain.training.optimizer import Optimizer, Precision
from crosstrain.training.reference import Known, kept_reference, known_reference
from crosstrain.types import Method
from crosstrain.value_head import make_value_head


@dataclass(frozen=True)
class Prepared:
    """A recipe's model under its precision policy, its data and its methods, one per stage; data_cost: what choosing them cost."""

    device: torch.device
    methods: tuple[Method, ...]
    model: Any
    tokenizer: Any
    loaded: assemble.Loaded
    precision: Precision
    optimizer: Optimizer
    data_cost: Cost
    value_head: nn.Linear | None = None
    teacher: Teacher | None = None


def prepare(recipe: Recipe, *, ask: bool = True) -> Prepared:
    """What the recipe names. ask: whether servers are asked for answers that are not there yet. UserError for everything that can
    be known to be wrong before training, rewards aside."""
    device = resolve_device(recipe.device)
    methods = tuple(assemble.stage_method(stage) for stage in recipe.stages)
    model, tokenizer = assemble.load_base(recipe, device)
    loaded = assemble.load_streams(recipe, tokenizer, model, methods, ask="later" if ask else "never")
    checks.check_before_asking(recipe, methods, loaded, tokenizer)
    checks.check_values(recipe, methods, model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    teacher = assemble.load_teacher(recipe, methods, tokenizer, vocabulary, device)
    precision = assemble.resolve_precision(recipe, device)
    if ask:
        loaded = with_answers(recipe, tokenizer, model, methods, loaded)
    head = make_value_head(model) if any("value" in method.needs for method in methods) else None
    cost = assemble.cost_of_data(recipe, loaded, model)
    optimizer = Optimizer(model, precision, head)
    return Prepared(device, methods, model, tokenizer, loaded, precision, optimizer, cost, head, teacher)


def with_answers(
    recipe: Recipe, tokenizer: Any, model: Any, methods: Sequence[Method], loaded: assemble.Loaded
) -> assemble.Loaded:
    """The data with the answers they wait for: servers are asked, and paid, so this comes when nothing else is wrong."""
    if not loaded.waiting:
        return loaded
    with assemble.reward_scorer(recipe, tokenizer) as rewards:
        for method in methods:
            checks.check_rewards(method, rewards)
    loaded = assemble.load_streams(recipe, tokenizer, model, methods, known=loaded)
    for method in methods:
        checks.check_data(method, loaded)
    return loaded


def base_engine(recipe: Recipe, ready: Prepared, rewards: Any) -> Engine:
    """The engine of a run, with the model as it is now for reference where any stage compares with that while it trains.

    UserError when a method samples and `rewards` is None.
    """
    for method in ready.methods:
        checks.check_rewards(method, rewards)
    samples = any(method.plan.samples for method in ready.methods)
    engine = assemble.make_engine(recipe, ready.model, ready.tokenizer, ready.loaded, rewards, ready.device, samples=samples)
    base = partial(assemble.base_weights, recipe, ready.device, ready.optimizer.masters)
    average = partial(nullcontext, ready.model)  # which starts as the model
    engine = replace(engine, value_head=ready.value_head, teacher=ready.teacher, base=base, average=average)
    if any(method.inputs is not None for method in ready.methods):
        engine = replace(engine, frozen_embeddings=deepcopy(ready.model.get_input_embeddings()).requires_grad_(False))
    if all(recipe.stages[i].precompute_ref_log_probs for i in _that_keep_base(ready)):
        return engine
    return replace(engine, reference=assemble.make_reference(ready.model, recipe.model.lora is not None))


def known_base(recipe: Recipe, ready: Prepared, engine: Engine) -> dict[int, Known]:
    """By stage, its data's log-probs under the model as it is now, before training, where they are asked for beforehand."""
    wanted = [i for i in _that_keep_base(ready) if recipe.stages[i].precompute_ref_log_probs]
    return {i: known_log_probs(engine, ready.methods[i], ready.model) for i in wanted}


def _that_keep_base(ready: Prepared) -> list[int]:
    """The stages, the first time that each comes, that compare with the weights that the run starts with."""
    return [i for i, method in enumerate(ready.methods) if kept_reference(method, first=i == 0) == "base"]


def with_reference(
    engine: Engine,
    stage: Stage,
    method: Method,
    *,
    first: bool,
    known: Known | None,
    at_start: Callable[[], Callable[[], AbstractContextManager[Any]]],
) -> Engine:
    """The run's engine with what a stage compares with: a model, or its log-probs of all data where they are asked for beforehand.

    first: whether it is the run's first stage. known: those log-probs under the weights that the run started with. at_start: makes
    the model with the weights that the stage started with.
    """
    if kept_reference(method, first=first) == "stage_start":
        engine, known = replace(engine, reference=at_start()), None
    if not stage.precompute_ref_log_probs:
        return engine
    if known is None:
        assert engine.reference is not None
        with engine.reference() as model:
            known = known_log_probs(engine, method, model)
    return replace(engine, reference=None, known_reference=known)


def known_log_probs(engine: Engine, method: Method, model: Any) -> Known:
    """The log-probs of all data that a method draws from, under `model`."""
    streams = [engine.streams[method.plan.origin(name)] for name in method.plan.streams(method.init())]
    examples = [e for stream in streams for e in stream.examples]
    return known_reference(model, examples, layout=engine.layout, tokens_per_micro_batch=engine.micro_batch_tokens)
