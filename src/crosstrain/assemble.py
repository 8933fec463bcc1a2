"""From a recipe to what the loop runs on: model, streams, sampler, rewards, methods."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from crosstrain.config import DataSpec, Recipe, Stage
from crosstrain.config.recipe import SamplingSpec
from crosstrain.data import Stream, encode, read_rows
from crosstrain.data.rows import Row, data_hash
from crosstrain.errors import UserError, nearest
from crosstrain.methods import load_method
from crosstrain.models import has_bf16_instructions, load_model, load_weights
from crosstrain.rewards import RewardPool, load_reward
from crosstrain.rollout.sampler import Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.tasks import get_task
from crosstrain.training.collect import Truncation
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine
from crosstrain.training.loop import StageSettings
from crosstrain.training.optimizer import Precision
from crosstrain.training.score import choose_layout
from crosstrain.types import Example, Group, Method


@dataclass(frozen=True)
class Loaded:
    """The data of a recipe: a stream of tokenized examples and the content's hash, by stream name."""

    streams: Mapping[str, Stream]
    hashes: Mapping[str, str]
    rows: Mapping[str, int]
    warnings: tuple[str, ...]


def resolve_precision(recipe: Recipe, device: torch.device) -> Precision:
    """The recipe's precision policy; auto is mixed where the hardware has bf16 instructions, else fp32."""
    if recipe.precision == "auto":
        return "mixed" if has_bf16_instructions(device) else "fp32"
    return recipe.precision


def computing_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What the model multiplies in under the recipe's precision policy."""
    return torch.float32 if resolve_precision(recipe, device) == "fp32" else torch.bfloat16


def load_base(recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The recipe's model, before any training, and its tokenizer."""
    return load_model(recipe.model.name, dtype=dtype, device=device, **_loading(recipe))


def load_base_weights(recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The recipe's model, before any training."""
    return load_weights(recipe.model.name, dtype=dtype, device=device, **_loading(recipe))


def _loading(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.model
    return {
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
        "attn_implementation": spec.attn_implementation,
        "lora": spec.lora,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
    }


def load_frozen_base(recipe: Recipe, device: torch.device) -> Any | None:
    """The untrained model in the computing dtype, to compare with; None for LoRA, whose own weights are it with the adapter off."""
    if recipe.model.lora is not None:
        return None
    return load_base_weights(recipe, device, computing_dtype(recipe, device)).requires_grad_(False)


def rows_of(name: str, spec: DataSpec) -> list[Row]:
    """The rows of a stream: from its file, or made by its task."""
    if spec.path is not None:
        rows = read_rows(spec.path)
        return rows[: spec.size] if spec.size is not None else rows
    assert spec.task is not None
    return get_task(spec.task, **spec.task_config).rows(spec.split, spec.size or 1024, spec.seed)


def load_streams(recipe: Recipe, tokenizer: Any) -> Loaded:
    """Every stream of the recipe, tokenized. UserError for a row that cannot be used, with file:row."""
    streams, hashes, counts, warnings = {}, {}, {}, []
    for name, spec in recipe.data.items():
        rows = rows_of(name, spec)
        examples = tuple(
            encode(
                row,
                tokenizer,
                id=f"{name}:{i}",
                max_prompt_length=recipe.max_prompt_length,
                max_length=recipe.max_length,
                system_prompt=spec.system_prompt,
            )
            for i, row in enumerate(rows)
        )
        warnings += _look(name, examples, tokenizer)
        streams[name] = Stream(name, examples, recipe.seed)
        hashes[name], counts[name] = data_hash(rows), len(rows)
    return Loaded(streams, hashes, counts, tuple(warnings))


def _look(name: str, examples: tuple[Example, ...], tokenizer: Any) -> list[str]:
    """Counted warnings about a stream's labels, before step 1."""
    expert = [(e, t) for e in examples for t in e.expert]
    cut = [e.where for e, t in expert if not t.finished]
    endless = [e.where for e, t in expert if t.finished and t.tokens[-1] != tokenizer.eos_token_id]
    found = []
    if cut:
        found.append(f"{name}: {len(cut)} of {len(expert)} answers are cut at max_length, first {cut[0]}")
    if endless:
        found.append(f"{name}: {len(endless)} of {len(expert)} answers do not end in the end token, first {endless[0]}")
    return found


def stage_method(stage: Stage) -> Method:
    """The stage's method, made with its settings, drawing from the streams that the stage names.

    UserError for streams that the method does not have, and for one name where it has several.
    """
    method = load_method(stage.method.name, **stage.method.settings)
    if stage.data is None:
        return method
    own = list(method.plan.streams(method.init()))
    if isinstance(stage.data, str) and len(own) > 1:
        example = ", ".join(f"{name}: {stage.data}" for name in own)
        raise UserError(f"method {method.name} draws from {', '.join(own)}; give `data: {{{example}}}` instead of one name")
    origins = {own[0]: stage.data} if isinstance(stage.data, str) else stage.data
    for name in origins:
        if name not in own:
            raise UserError(f"method {method.name} draws from no stream {name!r}; {nearest(name, own)}")
    return replace(method, plan=replace(method.plan, origins=dict(origins)))


def check_data(method: Method, loaded: Loaded) -> None:
    """Before step 1: every row brings what the method needs, or UserError with the first rows that do not."""
    for stream in method.plan.streams(method.init()):
        name = method.plan.origin(stream)
        if name not in loaded.streams:
            raise UserError(
                f"method {method.name} draws from a data stream {name!r}; the recipe has {', '.join(loaded.streams)}. A file is "
                f"given as `data: {{{name}: FILE}}`, and a stage's `data` says which stream is its {stream!r}"
            )
        needs, examples = method.plan.brings(stream), loaded.streams[name].examples
        what = {"demonstration": "a demonstration (`completion`)", "pair": "`chosen` and `rejected`", "label": "`label`"}
        lacking = [e.where or e.id for e in examples if needs is not None and not _brings(e, needs)]
        if lacking and needs is not None:
            raise UserError(
                f"method {method.name} needs {what[needs]}, which {len(lacking)} of {len(examples)} rows of {name!r} lack: "
                f"{', '.join(lacking[:5])}"
            )
        if "behaviour_logp" in method.needs and not method.plan.samples:
            unknown = [e.where or e.id for e in examples if not all(t.behaviour_logp for t in e.expert)]
            if unknown:
                raise UserError(
                    f"method {method.name} needs the column `behaviour_logp` (the log-probs of a demonstration's tokens under the "
                    f"model that wrote it), which {len(unknown)} of {len(examples)} rows of {name!r} lack: {', '.join(unknown[:5])}"
                )


def check_rewards(method: Method, rewards: object | None) -> None:
    """Before step 1: a method that samples has something to score its completions with."""
    if method.plan.samples and rewards is None:
        raise UserError(
            f"method {method.name} samples completions, and nothing scores them: add `rewards: [file.py:function]` to the "
            "recipe, or take the data from a task"
        )


def unused_settings(recipe: Recipe, methods: Sequence[Method]) -> list[str]:
    """A warning for every setting that none of the recipe's stages has a use for; arms of a study share settings, so no error."""
    drawn = {method.plan.origin(name) for method in methods for name in method.plan.streams(method.init())}
    found = [f"data.{name}: no stage draws from it" for name in recipe.data if name not in drawn]
    if any(method.plan.samples for method in methods):
        return found
    if recipe.rewards is not None:
        found.append("rewards: no stage samples completions, so nothing is scored with them")
    spec = recipe.evaluation
    asks = bool(spec.in_distribution or spec.out_of_distribution or spec.eval_steps)
    for name, field in SamplingSpec.model_fields.items():
        if getattr(recipe.sampling, name) != field.default and not (asks and name == "max_completion_length"):
            found.append(f"sampling.{name}: no stage samples completions")
    return found


def check_reference(recipe: Recipe, method: Method, stage: int) -> None:
    """Before step 1: the reference that a stage compares with can be kept, and computed beforehand where that is asked for."""
    if recipe.stages[stage].precompute_ref_log_probs and (method.plan.samples or "ref_logp" not in method.needs):
        why = "trains on completions that do not exist yet" if method.plan.samples else "compares with no reference"
        raise UserError(f"stage {stage}: precompute_ref_log_probs is true, but {method.name} {why}; leave it out")
    again = stage > 0 or recipe.stages[stage].repeat_until_budget
    later = again and "ref_logp" in method.needs and method.reference == "stage_start"
    if later and recipe.model.lora is not None:
        raise UserError(
            f"stage {stage}: a reference at the stage's start is not kept for LoRA runs; train the stages as separate runs, or "
            "without LoRA, or set the method's KL to 0"
        )


def check_evaluation(recipe: Recipe, tokenizer: Any) -> None:
    """Before step 1: the questions of the evaluation exist and can be rendered, so that no training is lost to them."""
    from crosstrain.evaluate.forgetting import gold_answers
    from crosstrain.evaluate.questions import load_set
    from crosstrain.evaluate.suite import questions

    spec = recipe.evaluation
    for one in (*spec.in_distribution, *spec.out_of_distribution, *filter(None, (spec.dev, spec.dev_ood))):
        load_set(one, "dev", tokenizer, 1)
    if spec.forgetting:
        if tokenizer.chat_template is None:
            raise UserError("evaluation.forgetting asks chat questions, and the model has no chat template; set it to false")
        gold_answers(tokenizer, questions()[:1])


def _brings(example: Example, needs: str) -> bool:
    rewards = [t.reward for t in example.expert]
    return {
        "demonstration": len(rewards) == 1 and rewards[0] is None,
        "pair": len(rewards) == 2,
        "label": len(rewards) == 1 and rewards[0] is not None,
    }[needs]


@contextlib.contextmanager
def reward_scorer(recipe: Recipe, tokenizer: Any) -> Iterator[Callable[[list[Group]], list[Group]] | None]:
    """A function that scores groups in child processes; None when the recipe has neither rewards nor a task."""
    specs = recipe.rewards
    tasks = [d for d in recipe.data.values() if d.task is not None]
    if specs is None and not tasks:
        yield None
        return
    names = [f.name for f in specs.functions] if specs else ["task"]
    weights = [f.weight for f in specs.functions] if specs else [1.0]
    functions = [_task_reward(tasks) if name == "task" else load_reward(name) for name in names]
    options: dict[str, Any] = (
        {"timeout_s": specs.timeout_s, "on_error": specs.on_error, "workers": specs.workers} if specs else {}
    )
    with RewardPool(functions, weights, **options) as pool:

        def score_groups(groups: list[Group]) -> list[Group]:
            scored, _ = pool.score(groups, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), score_expert=True)
            return scored

        yield score_groups


def _task_reward(tasks: list[DataSpec]) -> Any:
    if not tasks:
        raise UserError("rewards: 'task' needs a data stream that comes from a task; these are files")
    first = (tasks[0].task, tasks[0].task_config)
    if any((t.task, t.task_config) != first for t in tasks[1:]):
        raise UserError("rewards: streams of different tasks cannot share the reward 'task'; name a reward function instead")
    return load_reward(f"task:{tasks[0].task}", **tasks[0].task_config)


def make_engine(
    recipe: Recipe, model: Any, tokenizer: Any, loaded: Loaded, rewards: Any, device: torch.device, *, samples: bool
) -> Engine:
    """Everything around the model that no step changes."""
    s = recipe.sampling
    return Engine(
        model=model,
        parameters=sum(p.numel() for p in model.parameters()),
        layout=choose_layout(model),
        device=device,
        streams=loaded.streams,
        sampler=TorchSampler(model, stop_token_ids=stop_tokens(model, tokenizer)) if samples else None,
        sampling=Sampling(s.temperature, s.top_p, s.top_k, s.max_completion_length),
        rewards=rewards,
        truncation=Truncation(s.truncated, s.truncation_penalty),
        micro_batch_tokens=recipe.micro_batch_tokens,
        seed=recipe.seed,
    )


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's end token and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    more = config.eos_token_id if config is not None else None
    listed = more if isinstance(more, list) else [more]
    return tuple(sorted({i for i in (tokenizer.eos_token_id, *listed) if i is not None}))


def stage_settings(recipe: Recipe, stage: Stage, spent: Cost | None = None) -> StageSettings:
    """A stage's numbers, its share of the budget among them: what is left of it after `spent` for a stage that is repeated until
    the budget is."""
    budget = recipe.budget
    share = stage.budget_share if stage.budget_share is not None else (1.0 if len(recipe.stages) == 1 else None)
    if stage.repeat_until_budget and budget is not None:
        share = max(1 - getattr(spent or Cost(), budget.unit) / budget.amount, 0.0)
    return StageSettings(
        batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.lr_scheduler_type,
        warmup_steps=stage.warmup_steps,
        max_grad_norm=stage.max_grad_norm,
        max_steps=stage.max_steps,
        budget_unit=budget.unit if budget is not None and share is not None else None,
        budget_amount=budget.amount * share if budget is not None and share is not None else float("inf"),
    )


def make_reference(model: Any, lora: bool) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The frozen model as it is now: with LoRA the same weights with the adapter off, else a copy in the computing dtype."""
    if lora:

        @contextlib.contextmanager
        def without_adapter() -> Iterator[Any]:
            with model.disable_adapter():
                yield model

        return without_adapter
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return lambda: contextlib.nullcontext(frozen)


def describe_method(method: Method) -> dict[str, Any]:
    """A method as records and reports show it."""
    return {
        "name": method.name,
        "paper": method.paper,
        "settings": dict(method.settings),
        "updates": {"epochs": method.updates.epochs, "minibatches": method.updates.minibatches},
        "terms": [
            {
                "name": t.name,
                "loss": t.describe,
                "per": str(t.per),
                "coef": t.coefficient(0) if not callable(t.coef) else "schedule",
                "needs": sorted(t.needs),
            }
            for t in method.terms
        ],
    }
