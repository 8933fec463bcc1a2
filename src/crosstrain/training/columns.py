"""What a batch is given before its updates, without gradient: log-probs of the old policy and of the reference, and whatever a
method builds of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from crosstrain.errors import UserError
from crosstrain.training.batching import cut, distinct_tokens
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine, temperature_of
from crosstrain.training.reference import reference_column
from crosstrain.training.score import CHANNELS, score
from crosstrain.types import Batch, Channel, Method, Scores


def add_columns(engine: Engine, method: Method, batch: Batch, cost: Cost) -> tuple[Batch, Cost]:
    """The batch with every no-gradient column the method needs, and what computing them cost.

    `old_logp` is made only when the batch is used more than once: with one update it equals the current policy by construction.
    """
    passes: list[int] = []

    def look(
        other: Batch, *, of: Literal["current", "reference"] = "current", channels: Mapping[str, Channel] | None = None
    ) -> Scores:
        passes.append(distinct_tokens(other))
        if of == "reference":
            return reference_scores(engine, method, other)
        return no_grad_scores(engine, method, other, watch=True, channels=channels)

    if "old_logp" in method.needs and method.updates.steps > 1:
        batch = batch.with_columns(old_logp=look(batch).logp)
    if "ref_logp" in method.needs:
        batch = batch.with_columns(ref_logp=look(batch, of="reference").logp)
    for name, build in method.columns.items():
        batch = batch.with_columns(**{name: build(look, batch)})
    for scored in passes:
        cost = cost.forward(scored, engine.parameters)
    missing = method.needs - set(batch.columns) - set(CHANNELS) - set(method.channels) - {"old_logp"}
    if missing:
        raise UserError(f"method {method.name} reads {', '.join(sorted(missing))}, which nothing provides")
    return batch, cost


def reference_scores(engine: Engine, method: Method, batch: Batch) -> Scores:
    """The frozen reference's log-probs of a whole batch. UserError where the stage has none, or does not know a row of it."""
    if engine.known_reference is not None:
        return Scores(reference_column(batch, engine.known_reference))
    if engine.reference is None:
        raise UserError(f"method {method.name} compares with a reference model, and none was set up")
    with engine.reference() as model:
        return no_grad_scores(replace(engine, model=model), method, batch)


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
    `watch`."""
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
        )
        for name, values in {"logp": part.logp, **part.channels}.items():
            whole.setdefault(name, values.new_zeros(batch.tokens.shape))[rows] = values
    return Scores(whole.pop("logp"), whole)
