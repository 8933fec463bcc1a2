"""What a run will do and roughly cost, said before it starts."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass

import torch

from crosstrain import assemble
from crosstrain.config import Recipe, Stage
from crosstrain.models import describe_model, resolve_device
from crosstrain.training.cost import Cost
from crosstrain.types import Example, Method

UTILISATION = 0.5
"""Share of the processor's matmul speed that training reaches, roughly; the plan says that its minutes are rough."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: its method, expected steps and expected cost. `steps` is None when only a metric ends it."""

    method: str
    steps: int
    cost: Cost
    terms: tuple[str, ...]


@dataclass(frozen=True)
class RunPlan:
    """A whole run; `str` of it is what `--dry-run` prints."""

    model: str
    precision: str
    device: str
    rows: dict[str, int]
    warnings: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    minutes: float

    def __str__(self) -> str:
        lines = [f"model: {self.model} on {self.device}, {self.precision}"]
        lines += [f"data: {name}, {n} rows" for name, n in self.rows.items()]
        lines += [f"warning: {text}" for text in self.warnings]
        for i, s in enumerate(self.stages):
            c = s.cost
            lines.append(
                f"stage {i}: {s.method}, about {s.steps} steps, {c.processed_tokens:,} tokens processed "
                f"({c.generated_tokens:,} generated), {c.flops:.2e} FLOPs"
            )
            lines += [f"    {term}" for term in s.terms]
        lines.append(f"estimated time without evaluation: {self.minutes:.0f} min (rough: from a short matmul probe)")
        return "\n".join(lines)


def plan(recipe: Recipe) -> RunPlan:
    """Load and check everything a run needs, and estimate its cost; nothing is trained or written."""
    device = resolve_device(recipe.device)
    methods = [assemble.stage_method(stage) for stage in recipe.stages]
    model, tokenizer = assemble.load_base(recipe, device)
    parameters = sum(p.numel() for p in model.parameters())
    loaded = assemble.load_streams(recipe, tokenizer)
    for i, method in enumerate(methods):
        assemble.check_data(method, loaded)
        assemble.check_reference(recipe, method, i)
    assemble.check_evaluation(recipe, tokenizer)
    with assemble.reward_scorer(recipe, tokenizer) as rewards:
        for method in methods:
            assemble.check_rewards(method, rewards)
    precision = assemble.resolve_precision(recipe, device)
    stages = []
    for stage, method in zip(recipe.stages, methods, strict=True):
        examples = [e for s in loaded.streams.values() for e in s.examples]
        one = step_cost(recipe, stage, method, examples, parameters)
        steps = _steps(recipe, stage, one)
        total = Cost(
            processed_tokens=one.processed_tokens * steps,
            generated_tokens=one.generated_tokens * steps,
            flops=one.flops * steps,
            demonstrations=one.demonstrations * steps,
        )
        terms = tuple(f"{t.name}: {t.describe} per {t.per}" for t in method.terms)
        stages.append(StagePlan(method.name, steps, total, terms))
    dtype = assemble.computing_dtype(recipe, device)
    seconds = sum(s.cost.flops for s in stages) / (UTILISATION * matmul_speed(dtype, device))
    return RunPlan(
        model=describe_model(recipe.model.name),
        precision=precision,
        device=str(device),
        rows=dict(loaded.rows),
        warnings=(*loaded.warnings, *assemble.unused_settings(recipe, methods)),
        stages=tuple(stages),
        minutes=seconds / 60,
    )


def step_cost(recipe: Recipe, stage: Stage, method: Method, examples: list[Example], parameters: int) -> Cost:
    """The expected cost of one step: mean lengths of the data, completions at half their limit."""
    prompt = round(statistics.fmean(len(e.prompt_tokens) for e in examples))
    answer = statistics.fmean([sum(len(t.tokens) - len(e.prompt_tokens) for t in e.expert) for e in examples])
    n = stage.batch_size
    cost, rows_tokens = Cost(), 0.0
    requests = 0
    if method.plan.samples:
        requests = int(method.settings.get("num_generations", 1))
        generated = n * requests * max(recipe.sampling.max_completion_length // 2, 1)
        cost = cost.sampled(n * prompt, generated, parameters)
        rows_tokens += generated / n
    if method.plan.needs_expert is not None:
        rows_tokens += answer
        cost = cost.used_demonstrations(n)
    tokens = round(n * (prompt + rows_tokens))
    passes = int("ref_logp" in method.needs) + int("old_logp" in method.needs and method.updates.steps > 1)
    cost = cost.forward(tokens * passes, parameters)
    return cost.forward_backward(tokens * method.updates.epochs, parameters)


def _steps(recipe: Recipe, stage: Stage, one: Cost) -> int:
    settings = assemble.stage_settings(recipe, stage)
    limits = [stage.max_steps] if stage.max_steps is not None else []
    if settings.budget_unit is not None:
        each = getattr(one, settings.budget_unit)
        limits += [max(round(settings.budget_amount / each), 1)] if each else []
    return min(limits) if limits else 1


@functools.cache
def matmul_speed(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 10) -> float:
    """FLOP/s of a square matmul on this machine: the best of a few short trials, measured once, so that a study's arms compare."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        c = a @ b
        c[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
