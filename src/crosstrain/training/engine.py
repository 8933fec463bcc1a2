"""What a stage runs on: the model and everything around it that no step changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crosstrain.errors import UserError
from crosstrain.rollout.sampler import Sampler, Sampling
from crosstrain.training.collect import ScoreGroups, Stream, Truncation
from crosstrain.training.reference import Known
from crosstrain.training.score import Layout
from crosstrain.types import Decode, Method
from crosstrain.value_head import reader


@dataclass(frozen=True)
class Teacher:
    """A frozen model to learn from: how to get it, its parameters and how it takes a batch. sampler: what it writes answers with,
    where a method asks for them."""

    opened: Callable[[], AbstractContextManager[Any]]
    parameters: int
    layout: Layout
    sampler: Sampler | None = None


@dataclass(frozen=True)
class Engine:
    """What a stage runs on: the model and everything around it that no step changes.

    known_reference: the reference's log-probs of all data, in place of the reference itself; a budget is charged for its passes all
    the same. value_head: read by methods that need `value`; the model's hidden states are the policy's and the critic's alike.
    base: gives the recipe's own weights, by parameter name, for methods whose steps start from them.
    average: the model with an average of past weights. after_update: what is done after every optimizer step.
    decode: for methods that score completions themselves.
    frozen_embeddings: ids to input embeddings by the weights that the run started with, where a method asks for them.
    """

    model: Any
    parameters: int
    layout: Layout
    device: torch.device
    streams: Mapping[str, Stream]
    sampler: Sampler | None = None
    sampling: Sampling = field(default_factory=Sampling)
    rewards: ScoreGroups | None = None
    decode: Decode | None = None
    truncation: Truncation = field(default_factory=Truncation)
    micro_batch_tokens: int = 2048
    seed: int = 0
    reference: Callable[[], AbstractContextManager[Any]] | None = None
    known_reference: Known | None = None
    value_head: nn.Linear | None = None
    average: Callable[[], AbstractContextManager[Any]] | None = None
    after_update: Callable[[], None] | None = None
    teacher: Teacher | None = None
    base: Callable[[], Mapping[str, torch.Tensor]] | None = None
    frozen_embeddings: Callable[[torch.Tensor], torch.Tensor] | None = None


def temperature_of(engine: Engine, method: Method) -> float:
    """Methods that sample train the distribution they sample from, unless they say otherwise; imitation is at temperature 1."""
    if method.temperature is not None:
        return method.temperature
    return (engine.sampling.temperature or 1.0) if method.plan.samples else 1.0


def values_of(engine: Engine, method: Method) -> Callable[[Tensor], Tensor] | None:
    """What reads the channel `value` off hidden states, for a method that needs it; None for any other."""
    if "value" not in method.needs:
        return None
    if engine.value_head is None:
        raise UserError(f"method {method.name} reads values, and the model was given no value head")
    return reader(engine.value_head)
