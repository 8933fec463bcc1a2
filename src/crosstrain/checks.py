"""What is wrong with a recipe, its data or its model, said before step 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosstrain.assemble import Loaded, learns_from_answers, origins
from crosstrain.config import DataSpec, Recipe
from crosstrain.config.recipe import SamplingSpec
from crosstrain.config.rewards import RewardsSpec
from crosstrain.errors import UserError
from crosstrain.load_data import judged_by_answers
from crosstrain.reward_models import check_classifier
from crosstrain.rewards.model import is_model
from crosstrain.types import Example, Method


def check_before_asking(recipe: Recipe, methods: Sequence[Method], loaded: Loaded, tokenizer: Any) -> None:
    """What can be known to be wrong without a server's answers and without loading a model."""
    for i, method in enumerate(methods):
        check_data(method, loaded)
        check_reference(recipe, method, i)
    check_evaluation(recipe, tokenizer)


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
    if method.plan.asks_for_rewards and rewards is None:
        raise UserError(
            f"method {method.name} samples completions, and nothing scores them: add `rewards: [file.py:function]` to the "
            "recipe, or take the data from a task"
        )


def warnings(recipe: Recipe, methods: Sequence[Method], loaded: Loaded) -> tuple[str, ...]:
    """Everything to be said about a run before it starts."""
    return (*loaded.warnings, *unused_settings(recipe, methods), *short_iterations(recipe, methods, loaded))


def unused_settings(recipe: Recipe, methods: Sequence[Method]) -> list[str]:
    """A warning for every setting that none of the recipe's stages has a use for; arms of a study share settings, so no error."""
    drawn = {name for method in methods for name in origins(method)}
    found = [f"data.{name}: no stage draws from it" for name in recipe.data if name not in drawn]
    for name, spec in recipe.data.items():
        if name in drawn and not learns_from_answers(name, methods):
            found += _idle_teachers(name, spec)
    if recipe.rewards is not None and all(is_model(f.name) for f in recipe.rewards.functions):
        fields = RewardsSpec.model_fields
        idle = [name for name in ("timeout_s", "workers") if getattr(recipe.rewards, name) != fields[name].default]
        found += [f"rewards.{name}: reward models are asked in this process, under no time limit" for name in idle]
    if recipe.teacher is not None and not any(method.reads("teacher") for method in methods):
        found.append("teacher: no stage learns from it")
    if recipe.rewards is not None and not any(m.plan.samples and m.plan.reward is None for m in methods):
        found.append("rewards: no stage has completions for them, so nothing is scored with them")
    if any(method.plan.samples for method in methods):
        if recipe.sampling.truncated == "penalise" and not any(m.plan.samples and m.plan.scored for m in methods):
            found.append("sampling.truncated: no stage learns from rewards, so a penalty is recorded and teaches nothing")
        return found
    spec = recipe.evaluation
    asks = bool(spec.in_distribution or spec.out_of_distribution or spec.eval_steps)
    for name, field in SamplingSpec.model_fields.items():
        if getattr(recipe.sampling, name) != field.default and not (asks and name == "max_completion_length"):
            found.append(f"sampling.{name}: no stage samples completions")
    return found


def _idle_teachers(name: str, spec: DataSpec) -> list[str]:
    """A warning for each source with a teacher from which nobody learns: what becomes of its answers."""
    found = []
    for k, source in enumerate(spec.sources):
        if source.teacher is not None:
            key = f"data.{name}" if spec.mixture is None else f"data.{name}.mixture.{k}"
            idle = (
                "and its answers only filter, choose or order rows"
                if judged_by_answers(source)
                else "so its server is not asked"
            )
            found.append(f"{key}.teacher: no stage learns from demonstrations, {idle}")
    return found


def short_iterations(recipe: Recipe, methods: Sequence[Method], loaded: Loaded) -> list[str]:
    """A warning for each stage whose steps start from the base model and see a part of the data only."""
    found = []
    for i, (stage, method) in enumerate(zip(recipe.stages, methods, strict=True)):
        rows = sum(loaded.rows[name] for name in set(origins(method)))
        if method.start_from == "base" and stage.batch_size < rows:
            found.append(
                f"stage {i}: every step of {method.name} starts from the base model, and only its answers come from the steps "
                f"before; batch_size is {stage.batch_size} of {rows} rows"
            )
    return found


def check_reference(recipe: Recipe, method: Method, stage: int) -> None:
    """Before step 1: the reference that a stage compares with can be kept, and computed beforehand where that is asked for."""
    whole = any(c.of == "reference" for c in method.comparisons.values())
    moving = method.reads("reference") and method.reference == "previous"
    if whole and moving:
        raise UserError(
            f"stage {stage}: {method.name} compares with the whole distribution of a reference that moves with every step, which "
            "is not kept; let it compare with `current` weights, or with another reference"
        )
    others = bool(method.columns) and method.reads("reference")  # which may ask about rows that nobody brought
    if recipe.stages[stage].precompute_ref_log_probs and (
        method.plan.samples or whole or moving or others or "ref_logp" not in method.needs
    ):
        why = "compares with a reference that moves with every step" if moving else "compares with no reference"
        why = "compares with the reference's whole distribution" if whole else why
        why = "may ask the reference about other rows than those of the data" if others and not (whole or moving) else why
        why = "trains on completions that do not exist yet" if method.plan.samples else why
        raise UserError(f"stage {stage}: precompute_ref_log_probs is true, but {method.name} {why}; leave it out")


def check_values(recipe: Recipe, methods: Sequence[Method], model: Any) -> None:
    """Before step 1: settings of the value head have a head to be about, and a reward model can be saved when it is trained."""
    for i, (stage, method) in enumerate(zip(recipe.stages, methods, strict=True)):
        if stage.value_learning_rate is not None and "value" not in method.needs:
            raise UserError(
                f"stage {i}: value_learning_rate has no effect, since {method.name} has no value head; leave it out"
            )
    if methods[-1].saves != "reward model":
        return
    check_classifier(model)
    spec = recipe.evaluation
    asked = [name for name in ("in_distribution", "out_of_distribution", "dev", "dev_ood") if getattr(spec, name)]
    if asked:
        raise UserError(f"evaluation.{asked[0]}: the run ends in a reward model, which answers no questions; leave it out")


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
