"""An exponential moving average of the trained weights, and the frozen model that computes with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from crosstrain.head import at_least_fp32
from crosstrain.training.frozen import frozen_copy


class Average:
    """Weights that follow a model's, at full precision, in a copy of the model that computes as the model does.

    weights: by parameter name, what was trained of the model; in a checkpoint, and enough to go on from.
    """

    def __init__(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        self.model = frozen_copy(model)
        self._parameters = dict(self.model.named_parameters())
        # a step of a hundredth would be rounded away in bf16; a value head is no part of the model
        own = {name: w.detach() for name, w in weights.items() if name in self._parameters}
        self.weights = {name: w.to(at_least_fp32(w.dtype), copy=True) for name, w in own.items()}
        self._write()

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor], rate: float) -> None:
        """Go the share `rate` of the way to `weights`: average + rate (weights - average)."""
        for name, own in self.weights.items():
            own.lerp_(weights[name].to(own.dtype), rate)
        self._write()

    def opened(self) -> AbstractContextManager[Any]:
        """The model with the average for its weights."""
        return nullcontext(self.model)

    @torch.no_grad()
    def _write(self) -> None:
        for name, own in self.weights.items():
            self._parameters[name].copy_(own)
