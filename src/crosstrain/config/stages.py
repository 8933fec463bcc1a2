"""The stages of a recipe: a method each, its data, its optimizer and its end; and rounds of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, model_validator

from crosstrain.config.fields import STRICT, Count, Flag, Number, Positive, Share, Whole


class MethodSpec(BaseModel):
    """A method and its settings: `grpo`, `{grpo: {beta: 0.0}}` or `{name: grpo, settings: {beta: 0.0}}`."""

    model_config = STRICT
    name: str = Field(description="Method name (see `crosstrain methods`) or `file.py:function`.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings that differ from the published ones.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and len(value) == 1 and not {"name", "settings"} & set(value):
            [(name, settings)] = value.items()
            return {"name": name, "settings": {} if settings is None else settings}
        return value


class SwitchSpec(BaseModel):
    """End a stage early, by a metric that is looked at every time it is measured."""

    model_config = STRICT
    rule: Literal["plateau", "peak", "threshold"] = Field(
        "plateau",
        description="plateau: no improvement for `patience` looks. peak: worse than the best by more than `min_delta` for "
        "`patience` looks in a row; `init_from: best` in the next stage goes back to the peak. threshold: at `value` or better for "
        "`patience` looks in a row (a solve rate).",
    )
    metric: str = Field(description="Name of the metric in metrics.jsonl.")
    mode: Literal["min", "max"] = Field(description="Whether lower (min) or higher (max) is better.")
    patience: Count = Field(description="Looks after which the stage ends.")
    min_delta: Number = Field(
        0.0, ge=0, description="Smallest change that counts: as improvement (plateau), as a fall from the best (peak)."
    )
    value: Number | None = Field(None, description="What the metric has to reach; for `rule: threshold` alone.")

    @model_validator(mode="after")
    def _value_belongs_to_threshold(self) -> Self:
        if (self.rule == "threshold") != (self.value is not None):
            raise ValueError(f"'rule: threshold' and a 'value' go together; got rule={self.rule!r} and value={self.value}")
        if self.rule == "threshold" and self.min_delta:
            raise ValueError("'min_delta' has no effect with 'rule: threshold'; move 'value' instead")
        return self


class Stage(BaseModel):
    """One method with its optimizer, for a number of steps or a share of the budget."""

    model_config = STRICT
    method: MethodSpec
    data: str | dict[str, str] | None = Field(
        None,
        description="Which of the recipe's streams the stage draws from: a name for a method of one stream, or a mapping from "
        "the method's streams to the recipe's; by default those of the same names. Stages that share a stream go on in it.",
    )
    max_steps: Count | None = Field(None, description="Collections of data after which the stage ends.")
    budget_share: Share | None = Field(None, description="Share of the recipe's budget after which the stage ends.")
    batch_size: Count = Field(8, description="Examples collected per step.")
    learning_rate: Positive = Field(description="Peak learning rate of AdamW.")
    value_learning_rate: Positive | None = Field(
        None, description="Peak learning rate of the value head, of methods that have one; `learning_rate` when not given."
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("constant", description="Schedule after warmup.")
    warmup_steps: Whole = Field(0, description="Steps over which the learning rate rises from 0.")
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    adam_beta1: Number = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_beta2: Number = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    adam_epsilon: Positive = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    until: SwitchSpec | None = Field(None, description="End earlier, by a metric.")
    init_from: Literal["previous", "base", "best"] = Field(
        "previous", description="Weights to start from: the stage before, the base model, or the best checkpoint."
    )
    precompute_ref_log_probs: Flag = Field(
        False, description="Compute the reference's log-probs of all rows before the stage, and keep them for later runs."
    )
    restart_optimizer: Flag = Field(True, description="Start with fresh optimizer moments.")
    restart_schedule: Flag = Field(True, description="Start the learning-rate schedule anew.")
    repeat_until_budget: Flag = Field(
        False,
        description="One of the last stages, which come again in turn until the budget is spent; see `repeat: until_budget`.",
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.repeat_until_budget and (self.max_steps is None or self.budget_share is not None):
            raise ValueError("a stage that is repeated until the budget is spent needs 'max_steps', and no 'budget_share'")
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"'warmup_steps' ({self.warmup_steps}) is more than 'max_steps' ({self.max_steps})")
        return self


def _which(value: Any) -> str:
    return "Repeat" if isinstance(value, Repeat) or (isinstance(value, Mapping) and "repeat" in value) else "Stage"


def _written_out(entries: list[Any]) -> list[Any]:
    return [stage for entry in entries for stage in (entry.written_out() if isinstance(entry, Repeat) else [entry])]


class Repeat(BaseModel):
    """Stages that come again in turn: k:1 interleaving, alternation. Optimizer moments go on where `restart_optimizer: false`.

    >>> sft = {"method": "sft", "learning_rate": 1e-5, "max_steps": 4}
    >>> grpo = {"method": "grpo", "learning_rate": 1e-6, "max_steps": 1}
    >>> [stage.method.name for stage in Repeat(repeat=2, stages=[sft, grpo]).written_out()]
    ['sft', 'grpo', 'sft', 'grpo']
    """

    model_config = STRICT
    repeat: Count | Literal["until_budget"] = Field(
        description="How many rounds. until_budget: as many as the rest of the recipe's budget pays for; at the end of the list."
    )
    stages: Stages = Field(
        min_length=1, description="The stages of a round. A `budget_share` is for all rounds together, `max_steps` for each."
    )

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if any(stage.repeat_until_budget for stage in self.stages):
            raise ValueError("'repeat: until_budget' cannot stand inside another 'repeat'")
        if self.repeat == "until_budget":
            for stage in self.stages:
                if stage.max_steps is None or stage.budget_share is not None:
                    raise ValueError("in 'repeat: until_budget' every stage needs 'max_steps', and no 'budget_share'")
        return self

    def written_out(self) -> list[Stage]:
        """The stages of all rounds, each with its part of the budget; of one round for `until_budget`, marked."""
        if self.repeat == "until_budget":
            return [stage.model_copy(update={"repeat_until_budget": True}) for stage in self.stages]
        n = self.repeat
        one = [
            stage if stage.budget_share is None else stage.model_copy(update={"budget_share": stage.budget_share / n})
            for stage in self.stages
        ]
        return one * n


if TYPE_CHECKING:
    Stages = list[Stage]
else:
    Stages = Annotated[
        list[Annotated[Annotated[Stage, Tag("Stage")] | Annotated[Repeat, Tag("Repeat")], Discriminator(_which)]],
        AfterValidator(_written_out),
    ]
    Repeat.model_rebuild()
"""Stages in order; an entry may be a `Repeat`, in whose place its stages stand as often as it says."""


def gather_stage(value: Any, own: frozenset[str] = frozenset({"data"})) -> Any:
    """The same mapping with the stage keys of its top level, if any, gathered into its one stage; `own` are not the stage's.

    >>> gather_stage({"method": "sft", "learning_rate": 1e-5, "seed": 3})
    {'seed': 3, 'stages': [{'method': 'sft', 'learning_rate': 1e-05}]}
    """
    if not isinstance(value, Mapping):
        return value
    flat = [key for key in value if key in Stage.model_fields and key not in own]
    if flat and "stages" in value:
        raise ValueError(f"{flat[0]!r} stands beside 'stages'; write it inside the stage it is for")
    if not flat:
        return value
    return {k: v for k, v in value.items() if k not in flat} | {"stages": [{key: value[key] for key in flat}]}
