"""The distributions that a method compares the policy's with: which model, which prompt, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosstrain.errors import UserError
from crosstrain.head import evaluation_mode, head_logits
from crosstrain.prefix import common_start
from crosstrain.training.batching import distinct_tokens
from crosstrain.training.collect import Usage
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine
from crosstrain.training.score import Beside, trained_states
from crosstrain.types import Batch, Comparison, Method, Source, Weights


def beside(engine: Engine, method: Method, batch: Batch) -> list[Beside]:
    """What stands beside the policy's distribution at the trained tokens of a (micro-)batch, one for each model and prompt."""
    return [_beside(engine, of, context, batch, found) for (of, context), found in _others(method).items()]


def beside_cost(engine: Engine, method: Method, batch: Batch) -> Cost:
    """What the other distributions cost in one pass over a batch: a forward of each model with the prompt that it reads."""
    cost = Cost()
    for of, context in _others(method):
        cost = cost.forward(distinct_tokens(in_context(batch, context)), parameters_of(engine, of))
    return cost


def sampling_cost(engine: Engine, usage: Usage) -> Cost:
    """What sampling cost: the policy's tokens, and those that its teacher wrote."""
    cost = Cost().sampled(usage.prefill_tokens, usage.generated_tokens, engine.parameters)
    return cost.sampled(usage.teacher_prefill_tokens, usage.teacher_generated_tokens, parameters_of(engine, "teacher"))


def parameters_of(engine: Engine, of: Weights) -> int:
    """How many parameters a model has, for FLOPs."""
    return engine.teacher.parameters if of == "teacher" and engine.teacher is not None else engine.parameters


@contextmanager
def opened(engine: Engine, of: Weights) -> Iterator[Any]:
    """The model with these weights, in evaluation mode and without gradient. UserError where the run has none."""
    with _given(engine, of) as model, evaluation_mode(model):
        yield model


def in_context(batch: Batch, context: str) -> Batch:
    """The batch with another prompt before every row's response; the batch itself for "".

    Only what a model reads is kept: tokens, authors and the trained mask. UserError for a row that has no such prompt.
    """
    if not context:
        return batch
    prompts = batch.contexts.get(context, ((),) * len(batch))
    lacking = [name for name, prompt in zip(batch.example_ids, prompts, strict=True) if not prompt]
    if lacking:
        raise UserError(f"{lacking[0]}: the row has no demonstration to show to its teacher, and the method needs one")
    starts = [_response_start(batch, r) for r in range(len(batch))]
    lengths = [len(prompt) + n - start for prompt, start, n in zip(prompts, starts, batch.length.tolist(), strict=True)]
    shape = (len(batch), max(lengths, default=0))
    tokens, source = (torch.zeros(shape, dtype=torch.long, device=batch.tokens.device) for _ in range(2))
    trained = torch.zeros(shape, dtype=torch.bool, device=batch.tokens.device)
    source.fill_(int(Source.PROMPT))
    for r, (prompt, start, n) in enumerate(zip(prompts, starts, lengths, strict=True)):
        m, own = len(prompt), slice(start, int(batch.length[r]))
        tokens[r, :m] = torch.tensor(prompt, device=tokens.device)
        for new, old in ((tokens, batch.tokens), (source, batch.source), (trained, batch.trained)):
            new[r, m:n] = old[r, own]
    return replace(
        batch,
        tokens=tokens,
        source=source,
        trained=trained,
        advantage=torch.full(shape, float("nan"), device=tokens.device),
        columns={},
        prompt_length=_shared(batch, prompts),
        length=torch.tensor(lengths, dtype=torch.long, device=tokens.device),
        contexts={},
    )


def _others(method: Method) -> dict[tuple[Weights, str], dict[str, Comparison]]:
    """The comparisons that terms read, by the distribution they need: two of one distribution share its pass."""
    found: dict[tuple[Weights, str], dict[str, Comparison]] = {}
    for name in sorted(method.needs & method.comparisons.keys()):
        comparison = method.comparisons[name]
        found.setdefault((comparison.of, comparison.context), {})[name] = comparison
    return found


def _beside(engine: Engine, of: Weights, context: str, batch: Batch, found: Mapping[str, Comparison]) -> Beside:
    layout = engine.teacher.layout if of == "teacher" and engine.teacher is not None else engine.layout
    with opened(engine, of) as model:
        hidden = trained_states(model, in_context(batch, context), layout)

    def logits(states: Tensor) -> Tensor:
        with opened(engine, of) as model:
            return head_logits(model, states)

    return Beside(hidden, logits, {name: (c.divergence, c.temperature) for name, c in found.items()})


def _given(engine: Engine, of: Weights) -> AbstractContextManager[Any]:
    if of == "teacher":
        if engine.teacher is None:
            raise UserError("the method learns from a teacher, and the recipe names none: add `teacher: MODEL`")
        return engine.teacher.opened()
    if of == "reference":
        if engine.reference is None:
            raise UserError("the method compares with a reference model, and none was set up")
        return engine.reference()
    if of == "average":
        if engine.average is None:
            raise UserError("the method compares with an average of past weights, and none was set up")
        return engine.average()
    return nullcontext(engine.model)


def _response_start(batch: Batch, row: int) -> int:
    """Where the row's response starts; its length where there is none."""
    written = torch.nonzero(batch.source[row] != int(Source.PROMPT)).flatten()
    return int(written[0]) if len(written) else int(batch.length[row])


def _shared(batch: Batch, prompts: tuple[tuple[int, ...], ...]) -> Tensor:
    """[B]: how many tokens the prompts of a row's group start with alike."""
    members: dict[int, list[int]] = {}
    for r, g in enumerate(batch.group.tolist()):
        members.setdefault(g, []).append(r)
    shared = torch.zeros_like(batch.prompt_length)
    for rows in members.values():
        ordered = sorted(prompts[r] for r in rows)
        shared[rows] = common_start(ordered[0], ordered[-1])
    return shared
