"""What a study is: one shared part, arms that differ in method, stages and learning rate, seeds and an equal budget."""

from __future__ import annotations

from typing import Annotated, Any, Self, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from crosstrain.config.fields import STRICT, Flag, Positive, Seed, Share
from crosstrain.config.files import parse, set_path
from crosstrain.config.recipe import BudgetSpec, Recipe
from crosstrain.config.stages import MethodSpec, Stage, Stages, gather_stage
from crosstrain.errors import UserError, nearest

_OWN = ("stages", "seed", "budget", "output_dir")
_HINTS = get_type_hints(Recipe, include_extras=True)

# Made from Recipe's fields rather than written again, so that a setting added there can be shared here.
SharedSpec: Any = create_model(
    "SharedSpec",
    __config__=STRICT,
    __doc__="The recipe fields that all arms of a study have in common: all but stages, seed, budget and output_dir.",
    **{name: (_HINTS[name], info) for name, info in Recipe.model_fields.items() if name not in _OWN},
)


class ArmSpec(BaseModel):
    """One way of training: its stages, or one method with the stage's keys beside it."""

    model_config = STRICT
    name: str = Field(description="Name in the report; the methods joined by ' -> ' when not given.")
    stages: Stages = Field(min_length=1, description="What to do, in order.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        arm = gather_stage(value, own=frozenset())
        if isinstance(arm, dict) and "name" not in arm and isinstance(arm.get("stages"), list):
            return {"name": " -> ".join(map(_method_name, arm["stages"])), **arm}
        return arm


def _method_name(stage: Any) -> str:
    """The name of a stage's method, or "?" where the stage is so wrong that it will be refused anyway; of a repetition, "(a -> b) x
    N" (an asterisk where the budget says how often)."""
    if isinstance(stage, Stage):
        return stage.method.name
    if isinstance(stage, dict) and isinstance(stage.get("stages"), list):
        times = "*" if stage.get("repeat") == "until_budget" else stage.get("repeat")
        return f"({' -> '.join(map(_method_name, stage['stages']))}) x {times}"
    try:
        return MethodSpec.model_validate(stage["method"]).name
    except (KeyError, TypeError, ValidationError):
        return "?"


class TuneSpec(BaseModel):
    """The learning-rate search that every arm gets, on development questions."""

    model_config = STRICT
    learning_rates: list[Positive] = Field(min_length=1, description="Rates to try.")
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1, description="Training seeds per rate.")
    budget_share: Share = Field(1.0, description="Share of the study's budget that each trial gets.")
    metric: str = Field("accuracy", description="Development metric, higher is better.")


class ContrastsSpec(BaseModel):
    """Which comparisons are planned; only these enter the correction for many tests."""

    model_config = STRICT
    against: list[str] = Field(
        default_factory=lambda: ["base", "sft", "sft -> grpo"], description="Arms that the other arms are compared with."
    )


class StudySpec(BaseModel):
    """Several ways of training the same model on the same data under the same budget."""

    model_config = STRICT
    name: str = Field(description="Short name, for files and folders.")
    title: str = Field("", description="Title of the report; the name when not given.")
    shared: Annotated[SharedSpec, Field(description="What all arms have in common.")]
    arms: list[ArmSpec] = Field(min_length=1, description="The ways of training.")
    seeds: list[Seed] = Field(default_factory=lambda: [0, 1, 2], min_length=1, description="Training seeds of each arm.")
    budget: BudgetSpec = Field(description="What each run may spend.")
    base: Flag = Field(True, description="Evaluate the untrained model as well.")
    tune: TuneSpec | None = Field(None, description="The learning-rate search of `study --tune`.")
    contrasts: ContrastsSpec = Field(default_factory=ContrastsSpec)
    quick: dict[str, Any] = Field(
        default_factory=dict, description="Settings that differ with `--quick`: dotted keys as in `--set`, and values."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"arms need different names, got {twice[0]!r} more than once")
        if "base" in names:
            raise ValueError("'base' is the untrained model; give the arm another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"'seeds' has a repeated seed: {self.seeds}")
        if "contrasts" in self.model_fields_set:
            for name in self.contrasts.against:
                if name not in names and not (name == "base" and self.base):
                    raise ValueError(f"'contrasts.against' names {name!r}, which is no arm; arms: {', '.join(names)}")
        for arm in self.arms:
            try:
                self.recipe(arm.name, self.seeds[0])
            except ValidationError as error:
                raise ValueError(f"arm {arm.name!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        if self.quick:
            self.quickened()
        return self

    def recipe(self, arm: str, seed: int) -> Recipe:
        """The recipe of one run: the shared part, the arm's stages, the study's budget, and `seed`."""
        stages = {a.name: a.stages for a in self.arms}
        if arm not in stages:
            raise UserError(f"the study has no arm {arm!r}; {nearest(arm, stages)}")
        return Recipe(**dict(self.shared), stages=stages[arm], seed=seed, budget=self.budget)

    def against(self) -> list[str]:
        """The arms (and `base`) of the planned contrasts that this study has."""
        names = {arm.name for arm in self.arms} | ({"base"} if self.base else set())
        return [name for name in self.contrasts.against if name in names]

    def quickened(self) -> StudySpec:
        """The study with its `quick` settings applied, for `--quick`."""
        data = self.model_dump(exclude={"quick"})
        if "contrasts" not in self.model_fields_set:
            data.pop("contrasts")  # the default names arms a study need not have
        for dotted, value in self.quick.items():
            path = dotted.split(".")
            if len(path) == 3 and path[0] == "arms" and path[2] in Stage.model_fields:
                path = [*path[:2], "stages", "0", path[2]]
            data = set_path(data, path, value, where=f"quick.{dotted}")
        return parse(StudySpec, data, where="quick")
