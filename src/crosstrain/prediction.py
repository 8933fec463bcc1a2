"""What a run will take, measured: a part of the first step of each stage, times the steps that its budget makes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from crosstrain import assemble
from crosstrain.config import Recipe, Stage
from crosstrain.prepare import Prepared
from crosstrain.training.cost import Cost
from crosstrain.training.display import about
from crosstrain.training.engine import Engine
from crosstrain.training.first_step import FirstStep, measure_first_step
from crosstrain.training.reference import kept_reference
from crosstrain.types import Method


@dataclass(frozen=True)
class StagePlan:
    """One stage: its method and terms, its expected steps, and what they cost together.

    memory_gb: the most memory that is held in it.
    """

    method: str
    steps: int
    cost: Cost
    memory_gb: float
    terms: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Of a whole run: seconds of training, sampling and grading, and the most memory held meanwhile, in GB (on a CUDA device that
    of the device, else that of the process). Loading, saving and evaluation are not part of it."""

    seconds: float
    peak_memory_gb: float
    flops: float
    steps: int

    def __str__(self) -> str:
        """One line for people.

        >>> print(Prediction(seconds=170.0, peak_memory_gb=3.14, flops=4.9e12, steps=12))
        12 steps, 4.9e+12 FLOPs, about 3 min, peak memory 3.1 GB
        """
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{steps}, {self.flops:.2g} FLOPs, {about(self.seconds)}, peak memory {self.peak_memory_gb:.1f} GB"


def predict(stages: Sequence[StagePlan], data: Cost) -> Prediction:
    """What all stages take together, and what choosing and ordering rows took before them."""
    return Prediction(
        seconds=sum(stage.cost.seconds for stage in stages),
        peak_memory_gb=round(max(stage.memory_gb for stage in stages), 3),
        flops=sum(stage.cost.flops for stage in stages) + data.flops,
        steps=sum(stage.steps for stage in stages),
    )


def plan_stages(recipe: Recipe, ready: Prepared, engine: Engine) -> tuple[StagePlan, ...]:
    """The stages' expected steps, cost and memory. A later stage is measured with the weights that the run starts with.

    What a step takes is measured once per process for all recipes that differ in nothing that matters to it, such as the seed.
    Raises what a first step may raise.
    """
    if engine.reference is None:  # what is computed beforehand costs about what it would in the steps
        engine = replace(engine, reference=lambda: nullcontext(ready.model))
    trained = [p for p in ready.model.parameters() if p.requires_grad]
    plans = []
    for i, (stage, method) in enumerate(zip(recipe.stages, ready.methods, strict=True)):
        one = _first_step(recipe, stage, method, ready, engine)
        cost, memory = one.cost, one.memory_gb
        if method.plan.needs_expert is not None and not cost.demonstrations:
            # a gate may have no use for any in one batch; that it never will cannot be meant, and steps could not be told
            cost = cost.used_demonstrations(stage.batch_size)
        again = i > 0 or stage.repeat_until_budget
        if kept_reference(method, first=not again) == "stage_start":  # which is not there yet
            memory += sum(p.numel() * p.element_size() for p in trained) / 2**30
        if method.start_from == "base":  # which is loaded anew for every step
            memory += sum(4 * p.numel() for p in ready.model.parameters()) / 2**30
        if method.average is not None:  # at full precision, and a model that computes with it
            memory += sum(p.numel() * (4 + p.element_size()) for p in trained) / 2**30
        steps = expected_steps(recipe, stage, cost, Cost() if i else ready.data_cost)
        terms = tuple(f"{t.name}: {t.describe} per {t.per}" for t in method.terms)
        plans.append(StagePlan(method.name, steps, cost * steps, memory, terms))
    return _all_rounds(recipe, plans)


def _all_rounds(recipe: Recipe, plans: Sequence[StagePlan]) -> tuple[StagePlan, ...]:
    """The plans with as many steps and costs as the rounds until the budget is spent have; partial rounds count as such."""
    budget, marks = recipe.budget, [stage.repeat_until_budget for stage in recipe.stages]
    if budget is None or not any(marks):
        return tuple(plans)
    round_costs = [(getattr(p.cost, budget.unit), m) for p, m in zip(plans, marks, strict=True)]
    before, one = (sum(cost for cost, m in round_costs if m == again) for again in (False, True))
    rounds = max(budget.amount - before, 0.0) / one
    return tuple(
        replace(p, steps=math.ceil(p.steps * rounds), cost=p.cost * rounds) if m else p
        for p, m in zip(plans, marks, strict=True)
    )


def expected_steps(recipe: Recipe, stage: Stage, one: Cost, spent: Cost) -> int:
    """Steps until the stage's budget, of which `spent` is gone, or its `max_steps` ends it, when each costs `one`; a metric may
    end it sooner."""
    settings = assemble.stage_settings(recipe, stage)
    limits = [stage.max_steps] if stage.max_steps is not None else []
    if settings.budget_unit is not None:
        each = getattr(one, settings.budget_unit)
        left = settings.budget_amount - getattr(spent, settings.budget_unit)
        limits += [max(math.ceil(left / each), 1)] if each else []
    return min(limits) if limits else 1


_MEASURED: dict[str, FirstStep] = {}
"""First steps by all that they depend on: the seeds of a study's arm, and the trials of its search, share one measurement."""

_MATTERS = (
    "model",
    "teacher",
    "data",
    "rewards",
    "sampling",
    "precision",
    "device",
    "gradient_checkpointing",
    "micro_batch_tokens",
    "max_prompt_length",
    "max_length",
)


def _first_step(recipe: Recipe, stage: Stage, method: Method, ready: Prepared, engine: Engine) -> FirstStep:
    key = json.dumps(
        {
            "recipe": recipe.model_dump(mode="json", include=set(_MATTERS)),
            "method": stage.method.model_dump(mode="json"),
            "data": stage.data,
            "batch_size": stage.batch_size,
            "content": dict(ready.loaded.hashes),
            "precompute_ref_log_probs": stage.precompute_ref_log_probs,
            "threads": torch.get_num_threads(),
        },
        sort_keys=True,
    )
    if key not in _MEASURED:
        _MEASURED[key] = measure_first_step(engine, method, ready.optimizer, stage.batch_size)
    return _MEASURED[key]
