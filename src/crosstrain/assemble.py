"""From a recipe to what the loop runs on: model, streams, sampler, rewards, methods."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from crosstrain.architecture import found_once
from crosstrain.config import DataSpec, Recipe, Stage
from crosstrain.data import Stream
from crosstrain.data.curricula import Curriculum
from crosstrain.data.mixtures import Mixture
from crosstrain.errors import UserError, nearest
from crosstrain.head import check_head
from crosstrain.load_data import Asking, LoadedStream, load_stream, unjudged
from crosstrain.methods import METHODS, load_method
from crosstrain.models import has_bf16_instructions, load_model, load_tokenizer, load_weights, resolve_device
from crosstrain.rewards import RewardPool, load_reward
from crosstrain.rewards.load import Reward
from crosstrain.rewards.model import ModelReward
from crosstrain.rollout.sampler import Sampling
from crosstrain.rollout.torch_sampler import TorchSampler
from crosstrain.training.collect import Truncation
from crosstrain.training.cost import Cost
from crosstrain.training.engine import Engine, Teacher
from crosstrain.training.frozen import frozen_copy
from crosstrain.training.loop import StageSettings
from crosstrain.training.optimizer import Precision
from crosstrain.training.score import choose_layout
from crosstrain.types import Group, Method, Plan
from crosstrain.value_head import make_value_head, named


@dataclass(frozen=True)
class Loaded:
    """The data of a recipe: a stream of tokenized examples and the content's hash, by stream name.

    reports: what was done to the rows of each source, of the streams that have a teacher, filter, choose, order or mix. looked_at:
    tokens that went through the untrained model for that. waiting: how many answers of servers are not there yet. found: each
    stream with its sources.
    """

    streams: Mapping[str, Stream | Curriculum | Mixture]
    hashes: Mapping[str, str]
    rows: Mapping[str, int]
    warnings: tuple[str, ...]
    reports: Mapping[str, list[dict[str, Any]]]
    looked_at: int
    waiting: int = 0
    found: Mapping[str, LoadedStream] = field(default_factory=dict)


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


def base_weights(recipe: Recipe, device: torch.device, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The parameters of that name of the recipe's model and of a value head, before any training."""
    model = load_base_weights(recipe, device)
    head = named(make_value_head(model))
    return {n: p.detach() for n, p in (*model.named_parameters(), *head.items()) if n in names}


def load_teacher(
    recipe: Recipe, methods: Sequence[Method], tokenizer: Any, vocabulary: int, device: torch.device
) -> Teacher | None:
    """The recipe's teacher in the computing dtype, where a stage learns from one. UserError where one does and none is named, and
    for a teacher whose next tokens are not those of the model, of `vocabulary` logits, saying what differs."""
    learn = [method.name for method in methods if method.reads("teacher")]
    if not learn:
        return None
    if recipe.teacher is None:
        raise UserError(f"method {learn[0]} learns from a teacher, and the recipe names none: add `teacher: MODEL`")
    spec = recipe.teacher
    own = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    check_vocabularies(recipe.model.name, tokenizer, spec.name, load_tokenizer(spec.name, **own))
    dtype = computing_dtype(recipe, device)
    model = load_weights(spec.name, dtype=dtype, device=device, attn_implementation=spec.attn_implementation, **own)
    theirs = int(model.config.get_text_config().vocab_size)
    if theirs != vocabulary:
        raise UserError(
            f"teacher {spec.name!r} gives {theirs} logits and {recipe.model.name!r} {vocabulary}: their distributions cannot be "
            "compared; use a teacher with the same vocabulary size"
        )
    check_head(model)
    model.requires_grad_(False)
    sampler = TorchSampler(model, stop_token_ids=stop_tokens(model, tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    return Teacher(lambda: contextlib.nullcontext(model), parameters, found_once(choose_layout, model), sampler)


def check_vocabularies(name: str, tokenizer: Any, teacher: str, other: Any) -> None:
    """UserError unless both tokenizers give every token the same id."""
    own, theirs = tokenizer.get_vocab(), other.get_vocab()
    different = sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
    if different:
        token = min(different, key=lambda t: own.get(t, theirs.get(t)))
        said = [f"token {token!r} is {ids.get(token, 'absent')} in {n!r}" for n, ids in ((name, own), (teacher, theirs))]
        raise UserError(
            f"teacher {teacher!r}: its vocabulary is not that of {name!r}: {len(different)} tokens differ, e.g. {', '.join(said)}; "
            "a teacher must have the same tokenizer"
        )


def load_streams(
    recipe: Recipe,
    tokenizer: Any,
    model: Any,
    methods: Sequence[Method] = (),
    *,
    ask: Asking = "now",
    known: Loaded | None = None,
) -> Loaded:
    """Every stream of the recipe, tokenized, with the contexts that methods ask of it, its rows filtered, chosen (by what `model`,
    not yet trained, makes of them) and ordered as the recipe says. ask: see `load_stream`; of streams that no method draws from,
    answers are not looked for. known: what was loaded before, of which streams that wait for no answer stay as they are. UserError
    for a row that cannot be used, with file:row, and for two methods whose contexts of one name differ."""
    drawn = {name for method in methods for name in origins(method)}
    found = {} if known is None else dict(known.found)
    for name, spec in recipe.data.items():
        if name in found and not found[name].waiting:
            continue
        contexts, learned = contexts_of(name, methods), learns_from_answers(name, methods)
        used = spec if name in drawn else unjudged(spec)
        found[name] = load_stream(name, used, recipe, tokenizer, model, contexts, ask=ask, learned=learned)
    return Loaded(
        streams={name: one.stream for name, one in found.items()},
        hashes={name: one.hash for name, one in found.items()},
        rows={name: one.rows for name, one in found.items()},
        warnings=tuple(text for one in found.values() for text in one.warnings),
        reports={name: one.report for name, one in found.items() if one.report},
        looked_at=sum(one.looked_at for one in found.values()),
        waiting=sum(one.waiting for one in found.values()),
        found=found,
    )


def origins(method: Method) -> list[str]:
    """The recipe's streams that a method draws from."""
    return [method.plan.origin(name) for name in method.plan.streams(method.init())]


def learns_from_answers(stream: str, methods: Sequence[Method]) -> bool:
    """Whether a stage may do something with the demonstrations that a stream's rows bring, beside choosing and ordering rows."""
    return any(
        not _is_built_in(method)  # nobody knows what functions of the user's own do with an example
        or method.plan.brings(name) is not None
        or method.plan.start is Plan().start  # a group begins with them where they are there
        or any("{completion}" in text for text in method.contexts.values())
        for method in methods
        for name in method.plan.streams(method.init())
        if method.plan.origin(name) == stream
    )


def _is_built_in(method: Method) -> bool:
    """Whether a method is one of the library's, and so is everything in it that is given examples."""
    entry = METHODS.get(method.name)
    given = (*vars(method.plan).values(), method.select, method.remember, *method.columns.values())
    parts = (entry and entry.factory, *filter(callable, given))
    return all(getattr(part, "__module__", "").startswith("crosstrain.") for part in parts)


def contexts_of(stream: str, methods: Sequence[Method]) -> dict[str, str]:
    """What the methods that draw from a stream want its prompts to be written as, by name."""
    found: dict[str, str] = {}
    for method in methods:
        for name, text in method.contexts.items() if stream in origins(method) else ():
            if found.setdefault(name, text) != text:
                raise UserError(
                    f"stages want {name!r} of {stream!r} both as {found[name]!r} and as {text!r}; give them the same"
                )
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


def cost_of_data(recipe: Recipe, loaded: Loaded, model: Any) -> Cost:
    """What choosing and ordering rows by the untrained model costs, read from the cache or not; the first stage's budget is charged
    for it. UserError when nothing of that would be left."""
    cost = Cost().forward(loaded.looked_at, sum(p.numel() for p in model.parameters()))
    settings = stage_settings(recipe, recipe.stages[0])
    spent = 0.0 if settings.budget_unit is None else getattr(cost, settings.budget_unit)
    if spent >= settings.budget_amount:
        raise UserError(
            f"budget: choosing and ordering rows by the untrained model takes {spent:g} {settings.budget_unit} of the first "
            f"stage's {settings.budget_amount:g}; raise it, or give the stream a smaller `size`"
        )
    return cost


def adamw_settings(stage: Stage) -> dict[str, Any]:
    """AdamW's numbers for a stage, as `Optimizer.begin` takes them."""
    return {
        "weight_decay": stage.weight_decay,
        "betas": (stage.adam_beta1, stage.adam_beta2),
        "eps": stage.adam_epsilon,
        "value_factor": 1.0 if stage.value_learning_rate is None else stage.value_learning_rate / stage.learning_rate,
    }


@contextlib.contextmanager
def reward_scorer(recipe: Recipe, tokenizer: Any) -> Iterator[Callable[[list[Group]], list[Group]] | None]:
    """A function that scores groups in child processes; None when the recipe has neither rewards nor a task."""
    specs = recipe.rewards
    tasks = [source for d in recipe.data.values() for source in d.sources if source.task is not None]
    if specs is None and not tasks:
        yield None
        return
    names = [f.name for f in specs.functions] if specs else ["task"]
    weights = [f.weight for f in specs.functions] if specs else [1.0]
    functions = [_task_reward(tasks) if name == "task" else _reward(name, recipe) for name in names]
    options: dict[str, Any] = (
        {"timeout_s": specs.timeout_s, "on_error": specs.on_error, "workers": specs.workers} if specs else {}
    )
    with RewardPool(functions, weights, **options) as pool:

        def score_groups(groups: list[Group]) -> list[Group]:
            scored, _ = pool.score(groups, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), score_expert=True)
            return scored

        yield score_groups


def _reward(name: str, recipe: Recipe) -> Reward | ModelReward:
    """A reward by name; a reward model on the device of the run."""
    found = load_reward(name)
    return found.on(str(resolve_device(recipe.device))) if isinstance(found, ModelReward) else found


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
        layout=found_once(choose_layout, model),
        device=device,
        streams=loaded.streams,
        sampler=TorchSampler(model, stop_token_ids=stop_tokens(model, tokenizer)) if samples else None,
        sampling=Sampling(s.temperature, s.top_p, s.top_k, s.max_completion_length),
        rewards=rewards,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        truncation=Truncation(s.truncated, s.truncation_penalty, s.overlong_buffer, s.max_completion_length),
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
    frozen = frozen_copy(model)
    return lambda: contextlib.nullcontext(frozen)


def describe_method(method: Method) -> dict[str, Any]:
    """A method as records and reports show it."""
    return {
        "name": method.name,
        "paper": method.paper,
        "settings": dict(method.settings),
        "updates": {"epochs": method.updates.epochs, "minibatches": method.updates.minibatches},
        "start_from": method.start_from,
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
