"""How far a run is: which of the recipe's stages it has come to, the share that is done, and passes over the data."""

from __future__ import annotations

from crosstrain import assemble
from crosstrain.config import Recipe
from crosstrain.data.mixtures import Mixture
from crosstrain.training.loop import Progress, stage_progress
from crosstrain.training.switch import stage_after
from crosstrain.types import Method


def stage_of(recipe: Recipe, progress: Progress) -> int:
    """Which of the recipe's stages it is; `progress.stage` counts on through the rounds of repeated ones."""
    return stage_after(progress.stage, [stage.repeat_until_budget for stage in recipe.stages])


def is_trained(recipe: Recipe, progress: Progress, *, started: bool) -> bool:
    """Whether no stage is under way and none is left, or what is left are rounds until the budget is spent, and it is."""
    at = stage_of(recipe, progress)
    if started or at == len(recipe.stages):
        return not started
    budget = recipe.budget
    if budget is None or not recipe.stages[at].repeat_until_budget:
        return False
    return bool(getattr(progress.cost, budget.unit) >= budget.amount)


def share_done(recipe: Recipe, progress: Progress, *, started: bool) -> float:
    """Share of the whole run that is done. started: whether a stage is under way."""
    if is_trained(recipe, progress, started=started):
        return 1.0
    n, at, budget = len(recipe.stages), stage_of(recipe, progress), recipe.budget
    stage = recipe.stages[at]
    if stage.repeat_until_budget and budget is not None:
        rest = sum(one.repeat_until_budget for one in recipe.stages) / n
        return float(1 - rest + rest * min(getattr(progress.cost, budget.unit) / budget.amount, 1.0))
    settings = assemble.stage_settings(recipe, stage)
    inside = min(stage_progress(settings, progress), 1.0) if started else 0.0
    return (at + inside) / n


def epochs(loaded: assemble.Loaded, method: Method, progress: Progress) -> dict[str, float]:
    """Passes over the data that a stage draws from, those of stages before it counted in, and over each source of mixtures."""
    positions, streams = progress.positions, loaded.streams
    names = set(assemble.origins(method))
    passes = sum(positions.get(name, 0) for name in names) / sum(len(streams[name].examples) for name in names)
    mixed = {name: stream for name, stream in streams.items() if isinstance(stream, Mixture) and name in positions}
    sources = {f"epoch/{n}/{source}": x for n, s in mixed.items() for source, x in s.epochs(positions[n]).items()}
    return {"epoch": passes, **sources}
