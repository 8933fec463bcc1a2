"""What one training run is made of: the recipe and its parts, as strict models.

Every key a recipe file may contain is a field here, with its default and what it means. Names are TRL's where TRL has the
setting. Unknown keys are errors, and so is a setting that could have no effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from crosstrain.cache import keep_rows
from crosstrain.config.data import FilterSpec, OrderSpec, SelectSpec
from crosstrain.config.fields import STRICT, Count, Flag, Number, Positive, Seed, Share, TaskConfig, Whole, named


def _rows(value: Any) -> Any:
    """A list of rows or a `datasets.Dataset` as the path of a file that holds them; any other value as it is."""
    rows = value.to_list() if hasattr(value, "to_list") else value
    if not isinstance(rows, list):
        return value
    if names := [row for row in rows if isinstance(row, str)]:
        raise ValueError(f"got the list {names!r:.80}; a stream is one file each: {{train: FILE, other: FILE}}")
    return str(keep_rows(rows))


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


class DataSpec(BaseModel):
    """One stream of examples: a file, a task that makes them, or a mixture of such. A bare string is a path; in Python, rows may be
    given."""

    model_config = STRICT
    path: str | None = Field(None, description="JSONL, JSON, CSV, Parquet file or `datasets` folder.")
    task: str | None = Field(None, description="Name of a task, instead of a path.")
    mixture: list[DataSpec] | None = Field(
        None, min_length=2, description="Sources that the stream draws from by `weight`, each with settings of its own."
    )
    weight: Positive | None = Field(
        None, description="In a mixture: the source's share, relative to the others; 1 if not given."
    )
    task_config: TaskConfig = {}
    split: str = Field("train", description="Split of the task.")
    size: Count | None = Field(
        None, description="How many rows of the source, from its first; all of them (or the task's default) when not given."
    )
    seed: Seed = 0
    system_prompt: str | None = Field(None, description="System message put before every prompt that has none.")
    filter: FilterSpec | None = Field(None, description="Rows that are left out.")
    select: SelectSpec | None = Field(None, description="Rows that are chosen of the others, as the untrained model sees them.")
    order: OrderSpec | None = Field(None, description="A curriculum; rows are shuffled anew each epoch when not given.")

    _short = model_validator(mode="before")(lambda value: named("path", _rows(value)))

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = [key for key in ("path", "task", "mixture") if getattr(self, key) is not None]
        if len(origins) != 1:
            got = " and ".join(f"{key}={getattr(self, key)!r:.60}" for key in origins) or "none"
            raise ValueError(f"needs exactly one of 'path', 'task' and 'mixture', got {got}")
        own = {"path": ("task_config", "split", "seed"), "task": (), "mixture": tuple(type(self).model_fields)}[origins[0]]
        useless = [key for key in own if key not in origins and getattr(self, key) != type(self).model_fields[key].default]
        if useless and self.mixture is not None:
            raise ValueError(f"{useless[0]!r} stands beside 'mixture'; write it inside the source it is for")
        if useless:
            raise ValueError(f"{useless[0]!r} has no effect beside 'path'; remove it or name a 'task'")
        if self.mixture is not None and any(part.mixture is not None for part in self.mixture):
            raise ValueError("a source of a mixture is a file or a task, not another mixture; list its sources here")
        return self

    @property
    def sources(self) -> tuple[DataSpec, ...]:
        """The files and tasks that it is made of."""
        return (self,) if self.mixture is None else tuple(self.mixture)


def _function_name(value: Any) -> Any:
    """A function as `file.py:function`: rewards run in processes of their own, which load it from there."""
    if not callable(value):
        return value
    function = inspect.unwrap(value)
    name = getattr(function, "__qualname__", repr(function))
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    if not (file.endswith(".py") and Path(file).is_file() and name.isidentifier()):
        raise ValueError(
            f"got {name} from {file or 'nowhere'}; a reward runs in another process, which loads it from a .py file: "
            "give a function that stands at the top level of one"
        )
    return f"{Path(file).resolve()}:{name}"


class RewardSpec(BaseModel):
    """One reward function and its weight. A bare string is its name."""

    model_config = STRICT
    name: Annotated[str, BeforeValidator(_function_name)] = Field(
        description="Built-in reward, `file.py:function`, `task` (the reward of the data's task), or a reward model: the folder or "
        "hub id of a sequence classifier with one label. In Python, a function."
    )
    weight: Number = Field(1.0, description="Factor of this score in the weighted sum.")

    _short = model_validator(mode="before")(lambda value: {"name": value} if callable(value) else named("name", value))


class RewardsSpec(BaseModel):
    """How completions are scored. A bare list (or a single one) is the list of functions."""

    model_config = STRICT
    functions: list[RewardSpec] = Field(default_factory=lambda: [RewardSpec(name="task")], min_length=1)
    timeout_s: Positive = Field(10.0, description="Seconds one reward call may take before its process is killed.")
    on_error: Literal["raise", "missing"] = Field(
        "raise", description="A failing reward stops the run (raise) or counts as no score (missing)."
    )
    workers: Count = Field(1, description="Child processes that score.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str) or callable(value) or (isinstance(value, Mapping) and "name" in value):
            return {"functions": [value]}
        return {"functions": value} if isinstance(value, list) else value


class SamplingSpec(BaseModel):
    """How completions are drawn in training."""

    model_config = STRICT
    temperature: Positive = Field(1.0, description="Divides the logits before sampling.")
    top_p: Share = Field(1.0, description="Sample from the smallest set of tokens with this probability; 1 is all.")
    top_k: Whole = Field(0, description="Sample from the k most likely tokens; 0 is all.")
    max_completion_length: Count = Field(64, description="Tokens after which a completion is cut.")
    truncated: Literal["score", "mask", "penalise"] = Field(
        "score", description="A cut completion is scored as it is, left out of the loss, or loses `truncation_penalty`."
    )
    truncation_penalty: Number = Field(0.0, ge=0, description="Subtracted from a cut completion's reward.")

    @model_validator(mode="after")
    def _penalty_has_an_effect(self) -> Self:
        if (self.truncated == "penalise") != (self.truncation_penalty > 0):
            raise ValueError(
                f"'truncated: penalise' and a positive 'truncation_penalty' go together; got truncated={self.truncated!r} "
                f"and truncation_penalty={self.truncation_penalty:g}"
            )
        return self


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


class EvalSetSpec(BaseModel):
    """One set of held-out questions."""

    model_config = STRICT
    name: str = Field(description="Name in metrics and reports.")
    task: str = Field(description="Name of a task.")
    task_config: TaskConfig = {}
    split: str = Field("test", description="Split of the task.")
    size: Count = Field(128, description="How many questions.")
    seed: Seed = 0


class EvaluationSpec(BaseModel):
    """What is measured on held-out questions."""

    model_config = STRICT
    in_distribution: list[EvalSetSpec] = Field(default_factory=list, description="Questions like the training data.")
    out_of_distribution: list[EvalSetSpec] = Field(default_factory=list, description="Questions shifted away from it.")
    samples_per_question: Count = Field(8, description="Completions sampled per question.")
    pass_at_k: list[Count] = Field(default_factory=lambda: [1, 2, 4], description="The k of pass@k.")
    forgetting: Flag = Field(True, description="Measure what the model lost on the bundled general suite.")
    forgetting_questions: Count | None = Field(
        None, description="How many questions of that suite, spread over its topics; all of them when not given."
    )
    divergence: Flag = Field(True, description="Measure KL to the base model, both ways.")
    temperature: Positive = Field(1.0, description="Temperature of the evaluation's samples.")
    eval_steps: Whole = Field(0, description="Steps between evaluations on `dev`; 0 is only at the end.")
    dev: EvalSetSpec | None = Field(
        None, description="Development questions, looked at during training (`eval_accuracy`, ...)."
    )
    dev_ood: EvalSetSpec | None = Field(
        None, description="Development questions shifted away from the training data, looked at too (`eval_ood_accuracy`, ...)."
    )
    dev_samples: Count = Field(1, description="Completions sampled per development question.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.pass_at_k and self.samples_per_question < 2 * max(self.pass_at_k):
            raise ValueError(
                f"'samples_per_question' is {self.samples_per_question} but pass@{max(self.pass_at_k)} needs at least "
                f"{2 * max(self.pass_at_k)} (twice the largest k)"
            )
        names = [s.name for s in (*self.in_distribution, *self.out_of_distribution)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluation sets need different names, got {twice[0]!r} more than once")
        if self.forgetting_questions is not None and not self.forgetting:
            raise ValueError("'forgetting_questions' has no effect: 'forgetting' is false")
        if self.dev_ood is not None and not self.eval_steps:
            raise ValueError("'dev_ood' has no effect: 'eval_steps' is 0")
        if self.eval_steps and self.dev is None and self.dev_ood is None:
            raise ValueError(f"'eval_steps' is {self.eval_steps} but there is no 'dev' set to look at")
        return self


def _streams(value: Any) -> Any:
    """A single data spec (or path, or rows) becomes the stream `train`."""
    value = _rows(value)
    single = isinstance(value, str | DataSpec) or (
        isinstance(value, Mapping) and bool({"path", "task", "mixture"} & set(value))
    )
    return {"train": value} if single else value


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


class Recipe(BaseModel):
    """Everything that determines one run. Stage keys may stand at the top level when there is one stage."""

    model_config = STRICT
    model: ModelSpec = Field(default_factory=ModelSpec)
    teacher: ModelSpec | None = Field(None, description="Model to learn from, for the methods that distil one; never trained.")
    data: Annotated[dict[str, DataSpec], BeforeValidator(_streams)] = Field(
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
    micro_batch_tokens: Count = Field(4096, description="Tokens per forward pass; changes memory and speed, not results.")
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
