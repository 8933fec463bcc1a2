"""Checkpoints at step boundaries: safetensors and JSON, complete or absent.

A checkpoint is written to a temporary folder beside its place, flushed to disk and renamed, so that a kill at any moment
leaves the previous one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "weights.safetensors"
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What resuming needs: trained weights and optimizer moments by name, everything else as JSON, and the average of past weights
    where a stage keeps one."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    state: Mapping[str, Any]
    average: Mapping[str, Tensor] = field(default_factory=dict)


def save(folder: Path, step: int, checkpoint: Checkpoint, *, stage: int = 0, keep: int = 1) -> Path:
    """Write `folder/step-<step>-stage-<stage>` atomically and durably, then remove all but the newest `keep`.

    The stage is part of the name because its end is a second checkpoint of the same step: nothing is ever written over.
    """
    place = folder / f"step-{step:08d}-stage-{stage:03d}"

    def fill(temporary: Path) -> None:
        _save_tensors(checkpoint.weights, temporary / WEIGHTS)
        _save_tensors(checkpoint.moments, temporary / "optimizer.safetensors")
        if checkpoint.average:
            _save_tensors(checkpoint.average, temporary / AVERAGE)
        (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=1, sort_keys=True))

    write_folder(place, fill)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return place


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def load(place: Path) -> Checkpoint:
    """Read a checkpoint back; tensors are equal bit for bit."""
    return Checkpoint(
        weights=load_weights(place),
        moments=load_file(place / "optimizer.safetensors"),
        state=json.loads((place / "state.json").read_text()),
        average=load_file(place / AVERAGE) if (place / AVERAGE).is_file() else {},
    )


def save_weights(place: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights alone to the folder `place`, complete or not at all, in the place of those that were there."""
    write_folder(place, lambda temporary: _save_tensors(weights, temporary / WEIGHTS))


def load_weights(place: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, or of what `save_weights` wrote."""
    return load_file(place / WEIGHTS)


def write_folder(place: Path, fill: Any) -> None:
    """Make the folder `place` by `fill(temporary folder)`, flushed and renamed; one that exists is replaced."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    for path in [*(p for p in temporary.rglob("*") if p.is_file()), temporary]:
        flush(path)
    before = place.with_name(f".{place.name}.{os.getpid()}.old")
    if place.exists():  # aside first, deleted last: both are whole on disk, though for an instant neither has the name
        place.rename(before)
    temporary.rename(place)
    flush(place.parent)
    shutil.rmtree(before, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Force a file's, or a folder's, content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)


def _complete(folder: Path) -> list[Path]:
    """Oldest first: by step, then by stage, as numbers (there may be more stages than the name has digits for)."""
    complete = (p for p in folder.glob("step-*") if (p / "state.json").is_file())
    return sorted(complete, key=lambda p: [int(n) for n in re.findall("[0-9]+", p.name)])
