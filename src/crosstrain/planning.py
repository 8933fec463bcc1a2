"""What a run will do and take, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from crosstrain import assemble, checks
from crosstrain.config import Recipe
from crosstrain.errors import UserError
from crosstrain.models import describe_model
from crosstrain.prediction import Prediction, StagePlan, plan_stages, predict
from crosstrain.prepare import base_engine, prepare
from crosstrain.training.gradient import NonFinite


@dataclass(frozen=True)
class RunPlan:
    """A whole run; `str` of it is what `--dry-run` prints."""

    model: str
    precision: str
    device: str
    rows: dict[str, int]
    warnings: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    predicted: Prediction

    def __str__(self) -> str:
        lines = [f"model: {self.model} on {self.device}, {self.precision}"]
        lines += [f"data: {name}, {n} rows" for name, n in self.rows.items()]
        lines += [f"warning: {text}" for text in self.warnings]
        alike: dict[str, tuple[list[int], StagePlan]] = {}  # repeated stages are said once
        for i, s in enumerate(self.stages):
            alike.setdefault(repr(s), ([], s))[0].append(i)
        for where, s in alike.values():
            c = s.cost
            lines.append(
                f"{_stages(where)}: {s.method}, about {s.steps} steps, {c.processed_tokens:,} tokens processed "
                f"({c.generated_tokens:,} generated), {c.flops:.2e} FLOPs"
            )
            lines += [f"    {term}" for term in s.terms]
        lines.append(f"predicted: {self.predicted} (without evaluation; measured on the first batch of each stage)")
        return "\n".join(lines)


def _stages(where: list[int]) -> str:
    """Which stages, and how many where there are many.

    >>> _stages([0]), _stages([1, 3, 5]), _stages([0, 2, 4, 6])
    ('stage 0', 'stages 1, 3, 5, each', 'stages 0, 2, ..., 6, each of 4')
    """
    if len(where) == 1:
        return f"stage {where[0]}"
    if len(where) <= 3:
        return f"stages {', '.join(map(str, where))}, each"
    return f"stages {where[0]}, {where[1]}, ..., {where[-1]}, each of {len(where)}"


def plan(recipe: Recipe) -> RunPlan:
    """Load and check everything a run needs, and predict what it takes; nothing is trained or written, and no server is asked.

    The first batch of each stage is sampled and scored, and one micro-batch of it goes through the model. UserError for
    whatever is wrong with the recipe, its data, its rewards or its first losses.
    """
    ready = prepare(recipe, ask=False)
    with assemble.reward_scorer(recipe, ready.tokenizer) as rewards:
        try:
            stages = plan_stages(recipe, ready, base_engine(recipe, ready, rewards))
        except NonFinite as error:
            raise UserError(f"the first step cannot be trained: {error}; look at these rows and at the precision") from error
    return RunPlan(
        model=describe_model(recipe.model.name),
        precision=ready.precision,
        device=str(ready.device),
        rows=dict(ready.loaded.rows),
        warnings=checks.warnings(recipe, ready.methods, ready.loaded),
        stages=stages,
        predicted=predict(stages, ready.data_cost),
    )
