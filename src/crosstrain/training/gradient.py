"""The gradient of a batch: score, terms, backward, micro-batch by micro-batch, under counts of the whole optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from crosstrain.attention import of_any_shape
from crosstrain.objective.reduce import count, term_loss
from crosstrain.training.batching import cut
from crosstrain.training.beside import beside
from crosstrain.training.collect import Collected
from crosstrain.training.columns import inputs_of
from crosstrain.training.engine import Engine, temperature_of, values_of
from crosstrain.training.metrics import Meter
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.score import CHANNELS, score
from crosstrain.types import Batch, Method, Scores

PROBE = "grad_norm/"
"""What the name of a probe starts with; the name of a term follows."""


See = Callable[[str, Batch, Scores, Mapping[str, Tensor]], None]
"""Is shown what each term does to a micro-batch: its name, the micro-batch, its scores, and minus the term's gradient on `logp` and
on every other channel that it has one on, [B, T]."""


class NonFinite(RuntimeError):
    """A loss or gradient was NaN or infinite; the message names the step, the term and the examples."""


def denominators(method: Method, batch: Batch, collected: Collected) -> dict[str, float]:
    """What each term of an update on `batch`, a part of what was collected, is divided by."""
    groups = len(torch.unique(batch.group))
    before = round(groups * collected.drawn / max(len(collected.groups), 1))
    return count(method.terms, batch, groups=groups, groups_before_select=before)


def accumulate(
    engine: Engine,
    method: Method,
    batch: Batch,
    counts: Mapping[str, float],
    optimizer: Optimizer,
    see: See | None = None,
) -> Meter:
    """The gradient of a whole batch, micro-batch by micro-batch, in place of what was there; and what was metered on the way."""
    optimizer.zero_grad()
    meter = Meter()
    for index in micro_batches(engine, method, batch, engine.micro_batch_tokens):
        backward(engine, method, batch.rows(index), counts, meter, see)
    return meter


def micro_batches(engine: Engine, method: Method, batch: Batch, tokens: int) -> list[Tensor]:
    """Row indices of the micro-batches that the method's terms allow, each of at most `tokens` unless one unit is larger."""
    unit = "group" if any(t.unit == "group" for t in method.terms) else "token"
    pieces = cut(batch, tokens, unit, shared=engine.layout == "shared")
    return [index.to(engine.device) for index in pieces]


def measure_probes(
    engine: Engine, method: Method, batch: Batch, counts: Mapping[str, float], optimizer: Optimizer
) -> dict[str, float]:
    """What the method asked to be measured: `grad_norm/<term>`, the norm of that term's gradient alone, at a pass each; and what
    the passes computed. Each pass has the dropout that the step itself will have."""
    found: dict[str, float] = {}
    cards = [engine.device] if engine.device.type == "cuda" else []
    for name in method.probes:
        term = next(t for t in method.terms if name == PROBE + t.name)
        with torch.random.fork_rng(devices=cards):
            meter = accumulate(engine, replace(method, terms=(term,)), batch, counts, optimizer)
        found[name] = optimizer.clip(0.0)
        for what, computed in meter.computed().items():
            found[what] = found.get(what, 0.0) + computed
    return found


def backward(
    engine: Engine, method: Method, batch: Batch, counts: Mapping[str, float], meter: Meter, see: See | None = None
) -> None:
    """Score a micro-batch, add up the gradient of every term, and read off the weight each token got.

    Terms see the model only through the channels of `scores`. So each term's gradient is taken on the channels first (which is
    the negative weight of every token), and the model's backward runs once, on their sum.
    """
    known = {**CHANNELS, **method.channels}
    channels = {name: known[name] for name in sorted(method.needs & known.keys())}
    others = beside(engine, method, batch)
    scores = score(
        engine.model,
        batch,
        channels=channels,
        beside=others,
        watch=True,
        temperature=temperature_of(engine, method),
        layout=engine.layout,
        embed=inputs_of(engine, method) or method.embed,
        value_head=values_of(engine, method),
    )
    measured = [*channels, *(name for other in others for name in other.measures)]
    values = scores.channels.get("value")
    measured += [] if values is None else ["value"]
    inputs = [scores.logp, *(scores.channels[name] for name in measured)]
    gradients: list[Tensor] = [torch.zeros_like(x) for x in inputs]
    used = torch.zeros_like(batch.trained)
    policy_weights = torch.zeros_like(scores.logp)
    logp = scores.logp.detach()
    for term in method.terms:
        part = term_loss(term, scores, batch, counts)
        if part is None:
            continue
        if not torch.isfinite(part.loss) or not math.isfinite(part.logged):
            raise NonFinite(f"loss/{term.name} is {part.logged}; examples: {names_of(batch)}")
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if part.loss.requires_grad:  # false for a term that reads no score on this micro-batch
            found = torch.autograd.grad(part.loss, inputs, allow_unused=True, retain_graph=True)
        for total, gradient in zip(gradients, found, strict=True):
            if gradient is not None:
                total += gradient
        if see is not None:
            named = zip(("logp", *measured), found, strict=True)
            see(term.name, batch, scores, {name: -gradient for name, gradient in named if gradient is not None})
        if "value" not in term.needs:  # what reads values alone says nothing about the policy's words
            used |= term.on(batch)
        meter.add_loss(term.name, part.logged)
        if found[0] is not None:
            meter.add_weights(term.name, -found[0], batch)
            # a gate belongs to a ratio: what other terms add to the same token says nothing about it
            policy_weights += found[0] if "old_logp" in term.needs else 0.0
    with of_any_shape(engine.device):  # gradient checkpointing runs the forward again
        torch.autograd.backward(inputs, gradients)
    meter.add_computed(scores)
    meter.add_scores(batch, logp, scores.channels["entropy"].detach(), scores.channels["correct"], used)
    if "old_logp" in batch.columns:
        meter.add_clipped(batch, policy_weights, used)
    if paired := [term.on(batch) for term in method.terms if "pairs" in term.per.counts and "value" not in term.needs]:
        meter.add_pairs(batch, logp, paired, float(method.settings.get("beta", 1.0)))
    for term in method.terms:
        if "value" in term.needs and values is not None:
            meter.add_values(batch, values.detach(), term.on(batch), pairs="pairs" in term.per.counts)


def names_of(batch: Batch) -> str:
    return ", ".join(dict.fromkeys(batch.example_ids))
