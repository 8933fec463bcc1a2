"""What a stage runs on: the model and everything around it that no step changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from crosstrain.rollout.sampler import Sampler, Sampling
from crosstrain.training.collect import ScoreGroups, Stream, Truncation
from crosstrain.training.reference import Known
from crosstrain.training.score import Layout
from crosstrain.types import Method


@dataclass(frozen=True)
class Engine:
    """What a stage runs on: the model and everything around it that no step changes.

    known_reference: the reference's log-probs of all data, in place of the reference itself; a budget is charged for its passes all
    the same. frozen_embeddings: ids to input embeddings by the weights that the run started with, where a method asks for them.
    """

    model: Any
    parameters: int
    layout: Layout
    device: torch.device
    streams: Mapping[str, Stream]
    sampler: Sampler | None = None
    sampling: Sampling = field(default_factory=Sampling)
    rewards: ScoreGroups | None = None
    truncation: Truncation = field(default_factory=Truncation)
    micro_batch_tokens: int = 4096
    seed: int = 0
    reference: Callable[[], AbstractContextManager[Any]] | None = None
    known_reference: Known | None = None
    frozen_embeddings: Callable[[torch.Tensor], torch.Tensor] | None = None


def temperature_of(engine: Engine, method: Method) -> float:
    """Methods that sample train the distribution they sample from; imitation is at temperature 1."""
    return (engine.sampling.temperature or 1.0) if method.plan.samples else 1.0
