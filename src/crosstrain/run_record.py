"""What a run's record.json says of it: what it is made of, and what its training took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosstrain import assemble
from crosstrain.config import Recipe, config_hash
from crosstrain.data import template_hash
from crosstrain.errors import UserError
from crosstrain.models import describe_model
from crosstrain.own_code import code_of
from crosstrain.prepare import Prepared
from crosstrain.rewards.model import files_hash
from crosstrain.served import why_not
from crosstrain.training import checkpoint
from crosstrain.training.engine import Engine
from crosstrain.training.loop import Progress
from crosstrain.training.probe import matmul_speed
from crosstrain.training.record import hardware, versions
from crosstrain.training.reference import weights_hash


def setup(recipe: Recipe, ready: Prepared, engine: Engine) -> dict[str, Any]:
    """What a run is made of, before its first step."""
    return {
        "status": "running",
        "recipe_hash": config_hash(recipe),
        "model": describe_model(recipe.model.name),
        "teacher": None if ready.teacher is None or recipe.teacher is None else describe_model(recipe.teacher.name),
        "weights": _weights(recipe, ready),
        "code": code_of(recipe),
        "parameters": engine.parameters,
        "precision": ready.precision,
        "layout": engine.layout,
        "attention": ready.model.config._attn_implementation,
        "forward": _forward(ready.model),
        "sampler": getattr(engine.sampler, "path", None),
        "methods": [assemble.describe_method(m) for m in ready.methods],
        "data": {n: {"hash": h, "rows": ready.loaded.rows[n]} for n, h in ready.loaded.hashes.items()},
        **({"data_report": dict(ready.loaded.reports)} if ready.loaded.reports else {}),
        "template_hash": template_hash(ready.tokenizer),
        "versions": versions(),
        "hardware": hardware(ready.device),
        "stages": [],
    }


def check_unchanged(folder: Path, record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """UserError when a checkpoint waits and what it was trained on (`record`) is not what is there now (`found`)."""
    if checkpoint.latest(folder / "checkpoints") is None:
        return
    for key in ("data", "template_hash", "precision", "teacher"):
        before = record.get(key, found[key])
        if before != found[key]:
            raise _changed(folder, f"{key} has", before, found[key])
    for whose, now in found["weights"].items():
        before = record.get("weights", {}).get(whose, now)  # records of earlier versions have none
        if before != now:
            name = f", {found[whose]}," if whose in found else ""
            raise _changed(folder, f"the weights of the {whose}{name} have", before, now)
    for i, (before, now) in enumerate(zip(record.get("methods", ()), found["methods"], strict=False)):
        # as a record has it, which has lists for tuples
        read = json.loads(json.dumps({"name": now["name"], **now["settings"], **now["updates"]}))
        kept = {"name": before["name"], **before["settings"], **before["updates"]}
        for key in sorted(kept.keys() | read.keys()):  # a default may be another in a later version
            if kept.get(key) != read.get(key):
                raise _changed(folder, f"stage {i}: {key} of its method has", kept.get(key), read.get(key))
    for file, now in found["code"].items():
        before = record.get("code", {}).get(file, now)
        if before != now:
            raise _changed(folder, f"{file} has", before, now)


def _changed(folder: Path, what: str, before: Any, now: Any) -> UserError:
    return UserError(
        f"{folder}: {what} changed since this run began (then {before}, now {now}), so it cannot go on as it was; put it back, or "
        "start anew in another --out"
    )


def _weights(recipe: Recipe, ready: Prepared) -> dict[str, str | None]:
    """sha256 of weights that are found by name, which a resumed run reads again: of reference and base, teacher and rewards."""
    found: dict[str, str | None] = {"model": weights_hash(ready.model), "teacher": None}
    if ready.teacher is not None:
        with ready.teacher.opened() as teacher:
            found["teacher"] = weights_hash(teacher)
    names = [] if recipe.rewards is None else [spec.name for spec in recipe.rewards.functions]
    return found | {f"reward model {name}": files_hash(name) for name in names if Path(name).expanduser().is_dir()}


def measured(recipe: Recipe, ready: Prepared, progress: Progress) -> dict[str, Any]:
    """What training took, to stand beside what was predicted."""
    tally, dtype = progress.tally, assemble.computing_dtype(recipe, ready.device)
    # of adapters, most gradients of weights are not computed, and a count of all would show too much
    speed = None if recipe.model.lora is not None else tally.backward_speed()
    return {
        "measured": {
            "seconds": progress.cost.seconds,
            "peak_memory_gb": tally.peak_memory_gb,
            "flops": progress.cost.flops,
            "steps": progress.step,
        },
        "utilisation": None if speed is None else speed / matmul_speed(ready.model, dtype, ready.device),
        "sampling": tally.sampling(str(dtype).removeprefix("torch.")),
    }


def _forward(model: Any) -> str:
    """How training runs the model: written out, or why by its own code."""
    model.train()
    reason = why_not(model)
    model.eval()
    return reason or "written out"
