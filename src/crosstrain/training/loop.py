"""The one training loop: SFT, preference optimisation, RL and every hybrid run through `train_stage`.

    collect -> select -> columns -> advantage -> for each inner update: count -> score -> terms -> backward -> step -> record

It knows no method: what differs between methods is data (their plan, select, advantage and terms).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from crosstrain.errors import UserError, nearest
from crosstrain.objective.schedules import learning_rate_factor
from crosstrain.training.batching import distinct_demonstrations, distinct_tokens, to_batch, with_advantage
from crosstrain.training.beside import beside_cost, sampling_cost
from crosstrain.training.collect import Collected, collect
from crosstrain.training.columns import add_columns
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine, temperature_of
from crosstrain.training.gradient import PROBE, NonFinite, accumulate, denominators, measure_probes, names_of
from crosstrain.training.metrics import COMPUTED, TIME, merge, rollout_metrics, without_logp_difference
from crosstrain.training.optimizer import Optimizer
from crosstrain.training.probe import product_weights
from crosstrain.training.tally import Tally
from crosstrain.training.timing import clock
from crosstrain.types import Batch, Group, Method, State

COEF = "coef/"
"""What the name of a coefficient that follows from a method's state starts with; the name of a term follows."""

MOVED = "moved/"
"""What the name of a measured movement starts with; the name of a parameter follows."""


@dataclass(frozen=True)
class StageSettings:
    """One stage's numbers, as the recipe has them."""

    batch_size: int
    learning_rate: float
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    max_steps: int | None = None
    budget_unit: str | None = None
    budget_amount: float = math.inf


@dataclass
class Progress:
    """Where a run stands; everything here is in a checkpoint.

    step: collected batches of the whole run. stage_step: of this stage. optimizer_steps: AdamW steps of this stage.
    skipped: steps in which every term was empty. idle: steps in a row that brought the stage no nearer to its end.
    stage_cost: what had been spent when the stage began. tally: what the run's record adds up over all steps.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    idle: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    stage_cost: Cost = field(default_factory=Cost)
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Step:
    """What a step did: its metrics line and the groups it trained on."""

    metrics: Mapping[str, float]
    groups: list[Group]


def stage_progress(settings: StageSettings, progress: Progress) -> float:
    """Share of the stage that is done, 0 to 1: by steps or by budget, whichever is further."""
    by_steps = progress.stage_step / settings.max_steps if settings.max_steps else 0.0
    return max(by_steps, share_spent(settings, progress))


def share_spent(settings: StageSettings, progress: Progress) -> float:
    """Share of the stage's budget that is spent; 0 where it has none."""
    if settings.budget_unit is None:
        return 0.0
    spent = getattr(progress.cost, settings.budget_unit) - getattr(progress.stage_cost, settings.budget_unit)
    return float(spent / settings.budget_amount)


def train_stage(
    engine: Engine, method: Method, settings: StageSettings, optimizer: Optimizer, progress: Progress
) -> Iterator[Step]:
    """Run a stage to its end, one step per item; `progress` is at a step boundary whenever an item is out.

    Raises NonFinite when a loss or gradient is not a number, UserError when data or rewards cannot serve the method.
    """
    _check_ends(method, settings)
    _check_probes(method)
    body, head = product_weights(engine.model)
    while stage_progress(settings, progress) < 1.0:
        started = time.perf_counter()
        torch.manual_seed(step_seed(engine.seed, progress.step))  # dropout depends on (seed, step), not on history
        collected = draw(engine, method, settings.batch_size, progress)
        usage = collected.usage
        cost = progress.cost + sampling_cost(engine, usage)
        if method.movement is not None and (method.movement(progress.state) or not optimizer.marked):
            optimizer.mark()
        times = {"sampling": usage.sampling_seconds, "reward": usage.reward_seconds, "batch": 0.0}
        lines: list[Mapping[str, float]] = []
        trained, others = 0, Cost()
        if collected.groups:
            drawn = clock(engine.device)
            batch, cost = make_batch(engine, method, collected, progress.optimizer_steps, cost)
            times["batch"] = clock(engine.device) - drawn
            if method.start_from == "base" and any(denominators(method, batch, collected).values()):
                start_from_base(engine, method, optimizer)
            for minibatch in minibatches(batch, method, engine.seed, progress.step):
                share, taken = stage_progress(settings, progress), progress.optimizer_steps
                if method.start_from == "base":  # then every step is a training of its own
                    share, taken = len(lines) / method.updates.steps, len(lines)
                factor = learning_rate_factor(settings.lr_scheduler_type, share, taken, settings.warmup_steps)
                learning_rate = settings.learning_rate * factor
                line = update(engine, method, minibatch, optimizer, settings, learning_rate, progress, collected)
                if line is not None:
                    trained += distinct_tokens(minibatch) * passes(method, progress.state)
                    others += beside_cost(engine, method, minibatch) * passes(method, progress.state)
                    moved = sampled_otherwise(engine, method) or (bool(lines) and "old_logp" not in batch.columns)
                    lines.append(without_logp_difference(line) if moved else line)
                    progress.optimizer_steps += 1
        updates = Cost().forward_backward(trained, engine.parameters) + others
        demonstrations = used_demonstrations(method, collected.groups)
        progress.skipped += not lines
        scored = method.plan.scored or engine.rewards is not None
        completions = rollout_metrics(collected.rewarded, scored=scored)
        metrics = {TIME + "backward": 0.0, TIME + "optimizer": 0.0, **merge(lines), **completions}
        metrics |= {TIME + name: seconds for name, seconds in times.items()}
        metrics["frac_groups_dropped"] = 1 - len(collected.groups) / collected.drawn
        if method.plan.wants is not None:
            metrics["examples_skipped"] = float(collected.skipped)
        metrics["step_time"] = time.perf_counter() - started
        moved = {} if method.movement is None else {MOVED + name: far for name, far in optimizer.moved().items()}
        if method.coefs is not None:
            metrics |= {COEF + name: factor for name, factor in method.coefs(progress.state).items()}
        remembered = method.remember(progress.state, collected.rewarded)
        progress.state = method.update(remembered, {**metrics, **moved})
        progress.positions = dict(collected.positions)
        progress.cost = (cost + updates).used_demonstrations(demonstrations).took(metrics["step_time"])
        products = body * metrics.get(COMPUTED + "tokens", 0.0) + head * metrics.get(COMPUTED + "predictions", 0.0)
        progress.tally = progress.tally.step(metrics, 6.0 * products)
        progress.step += 1
        progress.stage_step += 1
        yield Step({**metrics, "skipped_steps": float(progress.skipped), **progress.cost.as_metrics()}, collected.groups)


def draw(engine: Engine, method: Method, batch_size: int, progress: Progress) -> Collected:
    """The groups of the step that `progress` has come to, sampled and scored as the method wants them."""
    engine.model.eval()
    return collect(
        method,
        progress.state,
        engine.streams,
        progress.positions,
        batch_size=batch_size,
        sampler=engine.sampler,
        sampling=engine.sampling,
        rewards=engine.rewards,
        decode=engine.decode,
        truncation=engine.truncation,
        seed=engine.seed,
        step=progress.step,
        teacher=None if engine.teacher is None else engine.teacher.sampler,
    )


def make_batch(engine: Engine, method: Method, collected: Collected, optimizer_steps: int, cost: Cost) -> tuple[Batch, Cost]:
    """The collected groups, of which there must be some, as a batch with its columns and advantages, and the cost after that."""
    mask = engine.truncation.rule == "mask"
    batch = to_batch(collected.groups, step=optimizer_steps, seed=engine.seed, mask_truncated=mask)
    batch, cost = add_columns(engine, method, batch.to(engine.device), cost)
    return with_advantage(batch, method.advantage(batch)), cost


def used_demonstrations(method: Method, groups: Sequence[Group]) -> int:
    """How many demonstrations a step uses, each as often as it has epochs; one that a teacher is shown is used too."""
    shown = int(any("{completion}" in text for text in method.contexts.values()))
    return sum(max(distinct_demonstrations(g), shown) for g in groups) * method.updates.epochs


def start_from_base(engine: Engine, method: Method, optimizer: Optimizer) -> None:
    """Put the recipe's own weights in place of the current ones, with fresh moments."""
    if engine.base is None:
        raise UserError(f"method {method.name} starts every step from the base model, and none was set up")
    optimizer.start_again(engine.base())


def sampled_otherwise(engine: Engine, method: Method) -> bool:
    """Whether completions are sampled with other weights, or at another temperature, than a step's first update has: log-probs of
    the two are then no measure of a mismatch."""
    other = method.plan.samples and temperature_of(engine, method) != (engine.sampling.temperature or 1.0)
    return method.start_from == "base" or other


def passes(method: Method, state: State) -> int:
    """Forward and backward passes of an update: its own, and one for each probe that is measured at this state."""
    return 1 + len(method.at(state).probes)


def _check_ends(method: Method, settings: StageSettings) -> None:
    """UserError when the only thing that could end the stage is a budget that the method never spends."""
    spends = {"generated_tokens": method.plan.samples, "demonstrations": method.plan.needs_expert is not None}
    if settings.max_steps is None and not spends.get(settings.budget_unit or "", settings.budget_unit is not None):
        raise UserError(
            f"budget.unit: a stage of {method.name} spends no {settings.budget_unit} and would never end; "
            "use processed_tokens or flops, or give the stage max_steps"
        )


def _check_probes(method: Method) -> None:
    known = [PROBE + term.name for term in method.terms]
    for name in method.probes:
        if name not in known:
            raise UserError(f"method {method.name}: unknown probe {name!r}; {nearest(name, known)}")


def minibatches(batch: Batch, method: Method, seed: int, step: int) -> Iterator[Batch]:
    """The batch cut by group into the method's inner updates; each epoch shuffles anew, keyed by (seed, step, epoch)."""
    if method.updates.steps == 1:
        yield batch
        return
    groups = torch.unique(batch.group)
    for epoch in range(method.updates.epochs):
        generator = torch.Generator().manual_seed(step_seed(seed, step) + epoch)
        order = groups[torch.randperm(len(groups), generator=generator).to(groups.device)]
        # as even as can be: chunk(4) would cut six groups into three parts, which is an optimizer step too few
        for part in order.tensor_split(min(method.updates.minibatches, len(groups))):
            yield batch.rows(torch.nonzero(torch.isin(batch.group, part)).flatten())


def update(
    engine: Engine,
    method: Method,
    batch: Batch,
    optimizer: Optimizer,
    settings: StageSettings,
    learning_rate: float,
    progress: Progress,
    collected: Collected,
) -> dict[str, float] | None:
    """One optimizer step on a batch: its metrics, or None when every term is empty (Adam's momentum must not move weights)."""
    batch, method = replace(batch, step=progress.optimizer_steps), method.at(progress.state)
    counts = denominators(method, batch, collected)
    if not any(counts.values()):
        return None
    engine.model.train()
    started = clock(engine.device)
    probed = measure_probes(engine, method, batch, counts, optimizer)
    meter = accumulate(engine, method, batch, counts, optimizer)
    accumulated = clock(engine.device)
    if method.grad_mask is not None:
        optimizer.freeze(method.grad_mask(progress.state))
    grad_norm = optimizer.clip(settings.max_grad_norm)
    if not math.isfinite(grad_norm):
        raise NonFinite(f"step {progress.step}: the gradient norm is {grad_norm}; examples: {names_of(batch)}")
    optimizer.step(learning_rate)
    if engine.after_update is not None:
        engine.after_update()
    times = {TIME + "backward": accumulated - started, TIME + "optimizer": clock(engine.device) - accumulated}
    clipped = float(settings.max_grad_norm > 0 and grad_norm > settings.max_grad_norm)
    found = {**meter.metrics(), **probed, "grad_norm": grad_norm, "grad_clipped": clipped, "learning_rate": learning_rate}
    computed = {name: value + probed.get(name, 0.0) for name, value in meter.computed().items()}
    return {**found, **computed, **times}


def step_seed(seed: int, step: int) -> int:
    """What torch's own random numbers (dropout) of a step start from."""
    return (seed * 1_000_003 + step) % (2**63)
