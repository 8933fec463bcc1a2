"""How fast this machine is at a model's matrix products and at AdamW: short measurements, made once per process."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from crosstrain.training.optimizer import Optimizer, Precision
from crosstrain.training.timing import clock

ROWS = 512
"""Rows of the inputs that are multiplied: enough for a processor or card to be as fast as it gets."""

WIDEST = 8192
"""Outputs of the widest product that is measured; a wider one (a head) is taken to be as fast as this part of it."""

ELEMENTS = 2**23
"""Parameters of AdamW's measurement: more than caches hold."""

REPEATS = 3

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""


def matmul_speed(model: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of the model's own matrix products in `dtype`, without anything around them.

    Forward, input gradient and weight gradient of every linear layer, the head among them, at ROWS rows: 6 FLOPs per row and
    weight over the seconds of all layers together. Each shape is measured once, the best of REPEATS.
    """
    return _speed(tuple(sorted(linear_shapes(model).items())), dtype, device)


def linear_shapes(model: nn.Module) -> Counter[Shape]:
    """How many linear layers of each shape the model has; GPT-2's, which hold their weights the other way round, count too.

    >>> linear_shapes(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3), nn.Embedding(5, 2)))
    Counter({(3, 2): 2})
    """
    found: Counter[Shape] = Counter()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            outputs, inputs = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
            found[outputs, inputs] += 1
    return found


def product_weights(model: nn.Module) -> tuple[int, int]:
    """Weights that a token is multiplied with in the model's layers, and a prediction in its head.

    >>> from crosstrain.testing import tiny_model
    >>> model = tiny_model(vocab_size=50)
    >>> product_weights(model)[1] == 50 * model.config.hidden_size
    True
    """
    total = sum(outputs * inputs * layers for (outputs, inputs), layers in linear_shapes(model).items())
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    return (total, 0) if head is None else (total - head.numel(), head.numel())


@functools.cache
def _speed(shapes: tuple[tuple[Shape, int], ...], dtype: torch.dtype, device: torch.device) -> float:
    seconds = flops = 0.0
    for (outputs, inputs), layers in shapes:
        part = min(outputs, WIDEST)
        seconds += layers * _products_seconds(part, inputs, dtype, device) * outputs / part
        flops += layers * 6.0 * ROWS * outputs * inputs
    return flops / seconds


@torch.no_grad()
def _products_seconds(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the three products of one layer. No random numbers: a run draws its own in the same process."""
    x, weight, gradient = (
        torch.full(shape, 0.01, dtype=dtype, device=device) for shape in ((ROWS, inputs), (outputs, inputs), (ROWS, outputs))
    )
    return sum(
        _best(product, device) for product in (lambda: linear(x, weight), lambda: gradient @ weight, lambda: gradient.T @ x)
    )


@functools.cache
def optimizer_seconds(precision: Precision, device: torch.device) -> float:
    """Seconds per trained parameter of clipping a gradient and of AdamW's step under a precision policy, the best of REPEATS."""
    optimizer = Optimizer(nn.ParameterDict({"weight": torch.full((ELEMENTS,), 0.01, device=device)}), precision)
    gradients = {name: torch.full_like(master, 0.01) for name, master in optimizer.masters.items()}
    limits = iter(2.0**-i for i in range(100))  # each below the norm that the one before left: every step clips

    def step() -> None:
        for name, master in optimizer.masters.items():
            master.grad = gradients[name]
        optimizer.clip(next(limits))
        optimizer.step(1e-5)

    return _best(step, device) / ELEMENTS


def _best(work: Callable[[], Tensor | None], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = clock(device)
        work()
        seconds.append(clock(device) - started)
    return min(seconds)
