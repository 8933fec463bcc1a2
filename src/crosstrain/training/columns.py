"""What a batch is given before its updates, without gradient: log-probs and values of the old policy, log-probs of the reference,
and whatever a method builds of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from crosstrain.errors import UserError
from crosstrain.training.batching import cut, distinct_tokens
from crosstrain.training.beside import opened, parameters_of
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine, temperature_of, values_of
from crosstrain.training.reference import reference_column
from crosstrain.training.score import CHANNELS, score
from crosstrain.types import Batch, Channel, Method, Scores, Weights


def add_columns(engine: Engine, method: Method, batch: Batch, cost: Cost) -> tuple[Batch, Cost]:
    """The batch with every no-gradient column the method needs, and what computing them cost.

    `old_logp` is made only when the batch is used more than once: with one update it equals the current policy by construction.
    The same batch is scored once, whatever columns are read off it.
    """
    passes: list[tuple[int, int]] = []
    seen: dict[str, Scores] = {}
    tokens = batch.tokens

    def look(other: Batch, *, of: Weights = "current", channels: Mapping[str, Channel] | None = None) -> Scores:
        if of == "reference" and method.reference == "previous":
            of = "current"  # the policy as it is now, before the step's updates
        known = other.tokens is tokens and not channels
        if known and of in seen:
            return seen[of]
        passes.append((distinct_tokens(other), parameters_of(engine, of)))
        if of != "current" and channels:
            raise ValueError(f"channels of the {of} are not computed; ask for its log-probs alone")
        if of == "current":
            scores = no_grad_scores(engine, method, other, watch=True, channels=channels)
        else:
            scores = reference_scores(engine, method, other) if of == "reference" else other_scores(engine, method, other, of)
        if known:
            seen[of] = scores
        return scores

    if "old_logp" in method.needs and method.updates.steps > 1:
        batch = batch.with_columns(old_logp=look(batch).logp)
    if "old_value" in method.needs:
        batch = batch.with_columns(old_value=look(batch).channels["value"])
    if "ref_logp" in method.needs:
        batch = batch.with_columns(ref_logp=look(batch, of="reference").logp)
    if "teacher_logp" in method.needs:
        batch = batch.with_columns(teacher_logp=look(batch, of="teacher").logp)
    for name, build in method.columns.items():
        batch = batch.with_columns(**{name: build(look, batch)})
    for scored, parameters in passes:
        cost = cost.forward(scored, parameters)
    missing = method.needs - {*batch.columns, *CHANNELS, *method.channels, *method.comparisons, "old_logp", "value"}
    if missing:
        raise UserError(f"method {method.name} reads {', '.join(sorted(missing))}, which nothing provides")
    return batch, cost


def reference_scores(engine: Engine, method: Method, batch: Batch) -> Scores:
    """The frozen reference's log-probs of a whole batch. UserError where the stage has none, or does not know a row of it."""
    if engine.known_reference is not None:
        return Scores(reference_column(batch, engine.known_reference))
    if engine.reference is None:
        raise UserError(f"method {method.name} compares with a reference model, and none was set up")
    return other_scores(engine, method, batch, "reference")


def other_scores(engine: Engine, method: Method, batch: Batch, of: Weights) -> Scores:
    """The log-probs of a whole batch by other weights, at the policy's temperature. UserError where the run has none."""
    layout = engine.teacher.layout if of == "teacher" and engine.teacher is not None else engine.layout
    with opened(engine, of) as model:
        return no_grad_scores(replace(engine, model=model, layout=layout), method, batch)


def inputs_of(engine: Engine, method: Method) -> Callable[[Tensor, Batch], Tensor] | None:
    """What puts a method's own inputs in place of the embeddings [N, L, D] of a batch's lines; None where it makes none."""
    make, table = method.inputs, engine.frozen_embeddings
    if make is None:
        return None
    if table is None:
        raise UserError(f"method {method.name} takes its inputs from the table that the run started with, and none was kept")
    return lambda embeddings, batch: make(table, batch)[:, : embeddings.shape[1]].to(embeddings)


@torch.no_grad()
def no_grad_scores(
    engine: Engine,
    method: Method,
    batch: Batch,
    *,
    watch: bool = False,
    channels: Mapping[str, Channel] | None = None,
) -> Scores:
    """The model's log-probs of a whole batch, in micro-batches, without gradient; with `watch` the channels of `score`'s
    `watch`, and the values that the method reads."""
    whole: dict[str, Tensor] = {}
    for index in cut(batch, engine.micro_batch_tokens, "token", shared=engine.layout == "shared"):
        rows = index.to(engine.device)
        temperature = temperature_of(engine, method)
        part = score(
            engine.model,
            batch.rows(rows),
            channels=channels,
            watch=watch,
            temperature=temperature,
            layout=engine.layout,
            embed=inputs_of(engine, method),
            value_head=values_of(engine, method) if watch else None,
        )
        for name, values in {"logp": part.logp, **part.channels}.items():
            whole.setdefault(name, values.new_zeros(batch.tokens.shape))[rows] = values
    return Scores(whole.pop("logp"), whole)
