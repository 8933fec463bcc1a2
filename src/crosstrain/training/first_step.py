"""What a step takes, from a part of a stage's real first one: nothing is updated, and no later random number changes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from crosstrain.memory import give_back
from crosstrain.training.batching import distinct_tokens, to_batch
from crosstrain.training.beside import beside_cost, sampling_cost
from crosstrain.training.collect import Collected
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine
from crosstrain.training.gradient import backward, denominators, micro_batches
from crosstrain.training.loop import Progress, draw, make_batch, minibatches, used_demonstrations
from crosstrain.training.metrics import Meter
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.probe import optimizer_seconds
from crosstrain.training.record import held_memory_gb, peak_memory_gb, reset_peak_memory
from crosstrain.training.timing import clock
from crosstrain.types import Batch, Method

LOOK_AHEAD = 16
"""Batches whose lengths are looked at where nothing is sampled: one alone may be far from the mean."""

REPEATS, LONG_ENOUGH = 3, 0.5
"""A micro-batch is run this often, or until it took so many seconds."""


@dataclass(frozen=True)
class FirstStep:
    """The expected cost of a step of a stage, its seconds among it, and the most memory it needs, in GB."""

    cost: Cost
    memory_gb: float


def measure_first_step(engine: Engine, method: Method, optimizer: Optimizer, batch_size: int) -> FirstStep:
    """What a step of this stage takes.

    Sampled, scored and gone through once without gradient is the whole first batch, since that is what tells lengths; forward and
    backward are run on its largest micro-batch and scaled by tokens; AdamW's step is scaled from a short one by parameters.
    Memory is the highest of the parts, with the gradients and moments that training will hold by then.

    Weights, moments, gradients and the state of torch's random numbers are afterwards what they were. Raises what the step itself
    would raise: NonFinite, UserError, FloatingPointError.
    """
    cards = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        try:
            return _measure(engine, method, optimizer, batch_size)
        finally:
            optimizer.zero_grad()
            engine.model.eval()
            give_back()


def _measure(engine: Engine, method: Method, optimizer: Optimizer, batch_size: int) -> FirstStep:
    device, progress = engine.device, Progress(state=method.init())
    getattr(engine.sampler, "path", None)  # how to sample is found out once per run, not in every step
    per_parameter = optimizer_seconds(optimizer.precision, device)
    give_back()
    held = held_memory_gb(device)
    reset_peak_memory(device)
    started = clock(device)
    collected = draw(engine, method, batch_size, progress)
    cost = sampling_cost(engine, collected.usage)
    if not collected.groups:
        return FirstStep(cost.took(clock(device) - started), peak_memory_gb(device))
    batch, cost = make_batch(engine, method, collected, 0, cost)
    cost = cost.took(clock(device) - started)
    peak = peak_memory_gb(device)
    update, most = _measure_update(engine, method, optimizer, batch, collected)
    demonstrations = used_demonstrations(method, collected.groups)
    cost = (cost + update) * _longer(engine, method, batch_size, batch, collected)
    masters = optimizer.masters.values()
    gradients = sum(m.numel() * m.element_size() for m in masters) / 2**30
    adamw = per_parameter * sum(m.numel() for m in masters) * method.updates.steps if update.flops else 0.0
    cost = cost.used_demonstrations(demonstrations).took(adamw)
    marked = gradients if method.movement is not None else 0.0  # a copy of the weights
    sampling = peak + optimizer.kept_bytes / 2**30  # which was measured before there were any gradients
    return FirstStep(cost, max(sampling, most, held + gradients) + 2 * gradients + marked)  # AdamW has two moments


def _measure_update(
    engine: Engine, method: Method, optimizer: Optimizer, batch: Batch, collected: Collected
) -> tuple[Cost, float]:
    """The cost of all forward and backward passes on a batch, and the most memory that one takes."""
    minibatch = next(minibatches(batch, method, engine.seed, 0))
    counts = denominators(method, minibatch, collected)
    if not any(counts.values()):
        return Cost(), 0.0
    pieces = [minibatch.rows(index) for index in micro_batches(engine, method, minibatch, engine.micro_batch_tokens)]
    largest = max(pieces, key=distinct_tokens)
    smallest = minibatch.rows(micro_batches(engine, method, minibatch, 1)[-1])
    engine.model.train()
    backward(engine, method, smallest, counts, Meter())  # what takes longer the first time, and memory that stays
    reset_peak_memory(engine.device)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < LONG_ENOUGH:
        if len(pieces) == 1:  # then it meets no gradients of those before it
            optimizer.zero_grad()
        started = clock(engine.device)
        backward(engine, method, largest, counts, Meter())
        seconds.append(clock(engine.device) - started)
    times_gone_through = method.updates.epochs * (1 + len(method.probes) * method.probe_share)
    tokens = distinct_tokens(batch) * times_gone_through
    again = sum(map(distinct_tokens, pieces)) / distinct_tokens(minibatch)  # parts of a group each compute its prompt
    times = tokens * again / distinct_tokens(largest)
    cost = Cost().forward_backward(tokens, engine.parameters).took(statistics.median(seconds) * times)
    cost += beside_cost(engine, method, batch) * times_gone_through
    return cost, peak_memory_gb(engine.device)


def _longer(engine: Engine, method: Method, batch_size: int, batch: Batch, collected: Collected) -> float:
    """How many times longer the stage's batches are on average than its first; 1 where only sampling could tell."""
    if method.plan.samples:
        return 1.0
    lengths = [distinct_tokens(batch)]
    for _ in range(LOOK_AHEAD - 1):
        collected = draw(engine, method, batch_size, Progress(state=method.init(), positions=dict(collected.positions)))
        lengths.append(distinct_tokens(to_batch(collected.groups)))
    return statistics.fmean(lengths) / lengths[0]
