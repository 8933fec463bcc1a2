"""Evaluating what a run trained, and the untrained model that it is compared with, into a folder."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosstrain import assemble
from crosstrain.config import Recipe
from crosstrain.evaluate import BaseAnswers, evaluate_model
from crosstrain.models import describe_model, resolve_device
from crosstrain.training.checkpoint import write_json
from crosstrain.training.cost import Cost
from crosstrain.training.display import Display
from crosstrain.training.record import append_lines, hardware, versions


def asks_nothing(recipe: Recipe) -> bool:
    """Whether the recipe wants no evaluation after training."""
    spec = recipe.evaluation
    return not (spec.in_distribution or spec.out_of_distribution or spec.forgetting or spec.divergence)


def evaluate_trained(
    recipe: Recipe, model: Any, tokenizer: Any, folder: Path, *, base: BaseAnswers | None, display: Display
) -> dict[str, Any]:
    """The evaluation of a run's model; written to `folder`, with the untrained model's in `folder/base` where divergences need its
    answers and `base` does not give them."""
    spec = recipe.evaluation
    if spec.divergence and base is None and (spec.in_distribution or spec.out_of_distribution):
        base = evaluate_base(recipe, folder / "base", display=display)
    display.note("evaluating")
    found = evaluate_model(
        model,
        tokenizer,
        spec,
        sampling=recipe.sampling,
        seed=0,
        base=base,
        base_model=assemble.load_frozen_base(recipe, resolve_device(recipe.device)) if spec.divergence else None,
    )
    write_json(folder / "evaluation.json", found.evaluation)
    (folder / "samples.jsonl").unlink(missing_ok=True)
    append_lines(folder / "samples.jsonl", found.samples)
    return dict(found.evaluation)


def evaluate_base(recipe: Recipe, folder: Path, *, display: Display | None = None) -> BaseAnswers:
    """Evaluate the untrained model as the recipe says and return its answers; read from `folder` when they are there."""
    answers = folder / "base_answers.json"
    if answers.is_file() and (folder / "evaluation.json").is_file():
        return BaseAnswers.read(answers)
    folder.mkdir(parents=True, exist_ok=True)
    (display or Display()).say(f"{folder.name}: evaluating the untrained model")
    device = resolve_device(recipe.device)
    started = time.perf_counter()
    model, tokenizer = assemble.load_base(recipe, device, assemble.computing_dtype(recipe, device))
    found = evaluate_model(model, tokenizer, recipe.evaluation, sampling=recipe.sampling, seed=0, base=None)
    append_lines(folder / "samples.jsonl", found.samples)
    record = {
        "status": "finished",
        "model": describe_model(recipe.model.name),
        "versions": versions(),
        "hardware": hardware(device),
        "cost": asdict(Cost(seconds=time.perf_counter() - started)),
    }
    write_json(folder / "record.json", record)
    found.answers.write(answers)
    write_json(folder / "evaluation.json", found.evaluation)
    return found.answers
