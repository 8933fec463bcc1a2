"""What one training run is made of: the recipe and its parts, as strict models.

Every key a recipe file may contain is a field here, with its default and what it means. Names are TRL's where TRL has the
setting. Unknown keys are errors, and so is a setting that could have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from crosstrain.config.data import DataSpec, streams
from crosstrain.config.evaluation import EvaluationSpec
from crosstrain.config.fields import STRICT, Count, Flag, Number, Positive, Seed, Share, Temperature, Whole, named
from crosstrain.config.rewards import RewardsSpec
from crosstrain.config.stages import Stages, gather_stage


class LoraSpec(BaseModel):
    """Low-rank adapters trained instead of the full weights (peft's names)."""

    model_config = STRICT
    r: Count = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="Scale of the adapters; their output is multiplied by alpha / r.")
    dropout: Number = Field(0.0, ge=0, lt=1, description="Dropout before the adapters, in training.")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="Modules that get an adapter.")


class ModelSpec(BaseModel):
    """The model to train or evaluate. A bare string is its name."""

    model_config = STRICT
    name: str = Field("smollm2-135m-instruct", description="Bundled name, local Hugging Face folder, or hub id.")
    revision: str | None = Field(None, description="Hub revision: branch, tag or commit.")
    trust_remote_code: Flag = Field(False, description="Run Python code that comes with the model.")
    attn_implementation: str | None = Field(None, description="Attention code of transformers: eager, sdpa, ...")
    lora: LoraSpec | None = Field(None, description="Train low-rank adapters instead of all weights.")

    _short = model_validator(mode="before")(lambda value: named("name", value))


class SamplingSpec(BaseModel):
    """How completions are drawn in training."""

    model_config = STRICT
    temperature: Temperature = Field(1.0, description="Divides the logits before sampling.")
    top_p: Share = Field(1.0, description="Sample from the smallest set of tokens with this probability; 1 is all.")
    top_k: Whole = Field(0, description="Sample from the k most likely tokens; 0 is all.")
    max_completion_length: Count = Field(64, description="Tokens after which a completion is cut.")
    truncated: Literal["score", "mask", "penalise"] = Field(
        "score", description="A cut completion is scored as it is, left out of the loss, or loses `truncation_penalty`."
    )
    truncation_penalty: Number = Field(0.0, ge=0, description="Subtracted from a cut completion's reward.")
    overlong_buffer: Whole = Field(
        0,
        description="With `truncated: penalise`: the penalty grows over the last so many tokens before the limit, also for "
        "completions that end there (DAPO's soft overlong punishment); 0 penalises cut ones alone.",
    )

    @model_validator(mode="after")
    def _penalty_has_an_effect(self) -> Self:
        if self.overlong_buffer and self.truncated != "penalise":
            raise ValueError(f"'overlong_buffer' has no effect with truncated={self.truncated!r}; it is for 'penalise'")
        if self.overlong_buffer > self.max_completion_length:
            raise ValueError(
                f"'overlong_buffer' is {self.overlong_buffer}, more than the {self.max_completion_length} tokens of "
                "'max_completion_length'"
            )
        if (self.truncated == "penalise") != (self.truncation_penalty > 0):
            raise ValueError(
                f"'truncated: penalise' and a positive 'truncation_penalty' go together; got truncated={self.truncated!r} "
                f"and truncation_penalty={self.truncation_penalty:g}"
            )
        return self


class BudgetSpec(BaseModel):
    """What a run may spend."""

    model_config = STRICT
    unit: Literal["processed_tokens", "generated_tokens", "flops", "demonstrations"] = Field(
        "processed_tokens", description="What is counted."
    )
    amount: Positive = Field(description="How much of it.")


class SaveSpec(BaseModel):
    """Checkpoints."""

    model_config = STRICT
    save_steps: Count = Field(10, description="Steps between checkpoints.")
    save_total_limit: Count = Field(1, description="Checkpoints kept.")
    best_metric: str | None = Field(None, description="Development metric by which the best weights are kept as well.")
    best_mode: Literal["max", "min"] = Field("max", description="Whether higher (max) or lower (min) is better.")


def _not_a_server(value: Any) -> Any:
    """A teacher as it is; ValueError for a server, whose probabilities of all tokens nobody can ask for."""
    name = value.get("name") if isinstance(value, Mapping) else value
    server = isinstance(value, Mapping) and "base_url" in value
    if server or (isinstance(name, str) and name.lower().startswith(("http://", "https://"))):
        raise ValueError(
            "a server gives text only, and gkd, on_policy_distillation, sdft and whatever else compares distributions need "
            "log-probs of the whole vocabulary; name a model folder or hub id, or train on the server's answers, with any method "
            "for demonstrations: they are asked for by `data: {path: FILE, teacher: {base_url: URL, model: NAME}}` (docs/data.md)"
        )
    return value


class Recipe(BaseModel):
    """Everything that determines one run. Stage keys may stand at the top level when there is one stage."""

    model_config = STRICT
    model: ModelSpec = Field(default_factory=ModelSpec)
    teacher: Annotated[ModelSpec | None, BeforeValidator(_not_a_server)] = Field(
        None, description="Model to learn from, for the methods that distil one; never trained."
    )
    data: Annotated[dict[str, DataSpec], BeforeValidator(streams)] = Field(
        min_length=1, description="Named streams of examples; a single one is called `train`."
    )
    rewards: RewardsSpec | None = Field(None, description="How completions are scored; the task's reward when not given.")
    stages: Stages = Field(min_length=1, description="What to do, in order; `{repeat: N, stages: [...]}` repeats some.")
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    budget: BudgetSpec | None = Field(None, description="What the run may spend.")
    save: SaveSpec = Field(default_factory=SaveSpec)
    seed: Seed = 0
    precision: Literal["auto", "fp32", "mixed", "bf16"] = Field(
        "auto",
        description="fp32; mixed: fp32 weights, bf16 compute; bf16: weights too; auto: mixed where the hardware has bf16.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to compute.")
    gradient_checkpointing: Flag = Field(False, description="Recompute activations in backward to save memory.")
    micro_batch_tokens: Count = Field(2048, description="Tokens per forward pass; changes memory and speed, not results.")
    max_prompt_length: Count = Field(512, description="Longer prompts are errors.")
    max_length: Count = Field(1024, description="Longer prompt + answer rows are cut, with a counted warning.")
    logging_steps: Count = Field(1, description="Steps between lines of metrics.jsonl.")
    log_completions: Flag = Field(True, description="Write sampled completions to the run's folder.")
    report_to: list[Literal["trackio", "wandb"]] = Field(
        default_factory=list, description="Trackers to send metrics to; none by default."
    )
    output_dir: str | None = Field(None, description="The run's folder; the command line's --out wins.")

    _gather = model_validator(mode="before")(gather_stage)

    @model_validator(mode="after")
    def _teacher_is_not_trained(self) -> Self:
        if self.teacher is not None and self.teacher.lora is not None:
            raise ValueError("'teacher.lora' has no effect: a teacher is never trained; leave it out")
        return self

    @model_validator(mode="after")
    def _weights_are_of_mixtures(self) -> Self:
        if heavy := [name for name, spec in self.data.items() if spec.weight is not None]:
            raise ValueError(f"data.{heavy[0]}: 'weight' has no effect outside a mixture; remove it")
        return self

    @model_validator(mode="after")
    def _stages_end(self) -> Self:
        for i, stage in enumerate(self.stages):
            if stage.budget_share is not None and self.budget is None:
                raise ValueError(f"stage {i} has a 'budget_share' but the recipe has no 'budget'")
            alone = self.budget is not None and len(self.stages) == 1
            if stage.max_steps is None and stage.budget_share is None and not alone:
                raise ValueError(f"stage {i} ({stage.method.name}) never ends: give it 'max_steps' or 'budget_share'")
            if stage.init_from == "best" and self.save.best_metric is None:
                raise ValueError(f"stage {i} has 'init_from: best' but 'save.best_metric' is not set")
            names = [stage.data] if isinstance(stage.data, str) else list((stage.data or {}).values())
            for name in names:
                if name not in self.data:
                    raise ValueError(f"stage {i} draws from a data stream {name!r}; the recipe has {', '.join(self.data)}")
        self._repeats_end()
        spends = any(s.budget_share is not None or s.repeat_until_budget for s in self.stages)
        if self.budget is not None and len(self.stages) > 1 and not spends:
            raise ValueError("'budget' has no effect: no stage has a 'budget_share'")
        if (total := sum(stage.budget_share or 0.0 for stage in self.stages)) > 1 + 1e-9:
            raise ValueError(f"the stages' 'budget_share' add up to {total:g}; at most 1 is allowed")
        return self

    def _repeats_end(self) -> None:
        marks = [stage.repeat_until_budget for stage in self.stages]
        if not any(marks):
            return
        if not all(marks[marks.index(True) :]):
            raise ValueError("'repeat: until_budget' spends what is left of the budget, so no stage can come after it")
        if self.budget is None or self.budget.unit not in ("processed_tokens", "flops"):
            got = "no budget" if self.budget is None else f"budget.unit {self.budget.unit!r}"
            raise ValueError(
                f"'repeat: until_budget' needs a budget of processed_tokens or flops, which every step spends; got {got}"
            )

    @model_validator(mode="after")
    def _lengths_and_metrics(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"'max_prompt_length' ({self.max_prompt_length}) leaves no room for an answer within 'max_length' "
                f"({self.max_length})"
            )
        for i, stage in enumerate(self.stages):
            if stage.until is not None and stage.until.metric.startswith("eval_"):
                self._is_measured(f"stage {i}: 'until.metric'", stage.until.metric)
            if i and not stage.restart_schedule and stage.lr_scheduler_type != "constant":
                raise ValueError(
                    f"stage {i}: 'restart_schedule: false' keeps the warmup of a constant schedule from coming again; a "
                    f"{stage.lr_scheduler_type} one belongs to its stage"
                )
        if self.stages[0].init_from == "best":
            raise ValueError("stage 0 has 'init_from: best', and nothing was trained before it")
        if self.save.best_metric is not None:
            self._is_measured("'save.best_metric'", self.save.best_metric)
        return self

    def _is_measured(self, where: str, metric: str) -> None:
        shifted = metric.startswith("eval_ood_")
        if not self.evaluation.eval_steps:
            raise ValueError(f"{where} needs 'evaluation.eval_steps' above 0, or it is never measured")
        if (self.evaluation.dev_ood if shifted else self.evaluation.dev) is None:
            raise ValueError(f"{where} needs 'evaluation.{'dev_ood' if shifted else 'dev'}', or it is never measured")
