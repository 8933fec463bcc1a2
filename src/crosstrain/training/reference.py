"""Which weights a stage compares with, and their log-probs of fixed data, computed once and kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crosstrain.cache import cache_folder
from crosstrain.errors import UserError
from crosstrain.served import why_not
from crosstrain.training.record import versions
from crosstrain.training.score import Layout, trajectory_logps
from crosstrain.types import Batch, Example, Method, Trajectory

Known = Mapping[tuple[tuple[int, ...], tuple[int, ...]], Tensor]
"""Log-probs [T] of a sequence by its tokens and the author of each; 0 on prompt tokens."""


SLICE = 512
"""Sequences that are laid out together: a rectangle of a whole dataset would not fit into memory."""


def kept_reference(method: Method, *, first: bool) -> Literal["base", "stage_start"] | None:
    """Which weights have to be kept for a stage to compare with: those that the run started with, or the stage itself.

    None where it compares with none, or with those that a step starts with, which are there. first: whether it is the run's first
    stage, whose start is the run's.
    """
    if not method.reads("reference") or method.reference == "previous":
        return None
    return "base" if first else method.reference


def known_reference(
    model: Any, examples: Iterable[Example], *, layout: Layout = "shared", tokens_per_micro_batch: int = 2048
) -> Known:
    """The log-probs of every trajectory that the examples bring, under `model`, in nats.

    Read from the cache where they were computed before, by the same weights in the same dtype for the same tokens; the template is
    in the tokens. Computed in the order of the examples, so that no value depends on what a step draws.
    """
    distinct = {_key(t.tokens, t.source): t for e in examples for t in e.expert}
    place = cache_folder() / "reference" / f"{cache_name(model, distinct.values(), layout, tokens_per_micro_batch)}.safetensors"
    if place.is_file():
        flat = load_file(place)["logp"]
    else:
        every = list(distinct.values())
        slices = [every[start : start + SLICE] for start in range(0, len(every), SLICE)]
        settings = {"tokens_per_micro_batch": tokens_per_micro_batch, "layout": layout}
        found = [logp for some in slices for logp in trajectory_logps(model, some, **settings)]
        flat = torch.cat(found) if found else torch.empty(0)
        _write(place, flat)
    values = flat.split([len(t.tokens) for t in distinct.values()])
    return dict(zip(distinct, values, strict=True))


def reference_column(batch: Batch, known: Known) -> Tensor:
    """[B, T] of the batch's rows, 0 at padding. Raises UserError for a row that was not among the examples."""
    column = torch.zeros(batch.tokens.shape)
    for r, (tokens, source, n) in enumerate(
        zip(batch.tokens.tolist(), batch.source.tolist(), batch.length.tolist(), strict=True)
    ):
        key = _key(tokens[:n], source[:n])
        if key not in known:
            example = batch.example_ids[r]
            raise UserError(f"{example}: the method changed what its row brings; leave precompute_ref_log_probs out")
        column[r, :n] = known[key]
    return column.to(batch.tokens.device)


def _key(tokens: Sequence[int], source: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tokens), tuple(map(int, source))


def cache_name(model: Any, trajectories: Iterable[Trajectory], layout: Layout, tokens_per_micro_batch: int) -> str:
    """sha256 of everything that what a model makes of trajectories depends on, the order and cut of the computation included."""
    config = model.config
    setting = [layout, tokens_per_micro_batch, config.to_json_string(), config._attn_implementation, why_not(model)]
    setting += [weights_hash(model), str(next(model.parameters()).device), sorted(versions().items())]
    if hasattr(model, "peft_config"):  # how much an adapter's weights count is not in them, nor whether it is on
        adapters = {name: config.to_dict() for name, config in model.peft_config.items()}
        setting.append(json.dumps(adapters, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))
        setting.append(str(model.has_active_enabled_adapter))
    digest = hashlib.sha256(repr(setting).encode())
    for t in trajectories:
        digest.update(repr(_key(t.tokens, t.source)).encode())
    return digest.hexdigest()


def weights_hash(model: Any) -> str:
    """sha256 of a model's parameters: their names, types, shapes and values.

    >>> from crosstrain.testing import tiny_model
    >>> weights_hash(tiny_model(seed=0)) == weights_hash(tiny_model(seed=0)) != weights_hash(tiny_model(seed=1))
    True
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(place: Path, logp: Tensor) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
    save_file({"logp": logp}, temporary)
    os.replace(temporary, place)
