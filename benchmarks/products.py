"""The matrix products of a piece of work alone: what no way of doing it can leave out, and so a limit of its speed.

What it leaves out itself: attention, norms, the softmax, the optimizer, and everything that makes a product's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[int, Tensor]

UPRIGHT = 128
"""Rows up to which a product is faster with the weight on the left."""


def inputs(model: Any, rows: int) -> Inputs:
    """Something to multiply with: [rows, n] for every width n of a linear layer."""
    weights = [m.weight for m in model.modules() if type(m) is nn.Linear]
    return {n: torch.randn(rows, n).to(weights[0]) for n in {n for w in weights for n in w.shape}}


@torch.no_grad()
def training_products(model: Any, given: Inputs, tokens: int, predictions: int) -> None:
    """The products of every linear layer for `tokens`, and of the head for `predictions`: forward, and the gradients of inputs and
    of weights."""
    for w, rows in _weights(model, tokens, predictions):
        out, into = w.shape
        given[into][:rows] @ w.T
        given[out][:rows] @ w
        given[out][:rows].T @ given[into][:rows]


@torch.no_grad()
def forward_products(model: Any, given: Inputs, tokens: int, predictions: int) -> None:
    """The products of every linear layer for `tokens`, and of the head for `predictions`: forward alone, the faster way round."""
    for w, rows in _weights(model, tokens, predictions):
        x = given[w.shape[1]][:rows]
        if rows == 1:
            torch.mv(w, x[0])
        elif rows <= UPRIGHT:
            w @ x.T
        else:
            x @ w.T


def _weights(model: Any, tokens: int, predictions: int) -> Iterator[tuple[Tensor, int]]:
    """Every linear layer's weight, and how many rows it is multiplied with."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            yield module.weight, tokens
    yield head.weight, predictions


def sampling_products(model: Any, given: Inputs, prompts: int, completions: Sequence[int]) -> None:
    """Forward products of sampling: the prompts' tokens, and then, at every position, those of the completions that are still being
    written. prompts: tokens of all of them, what they start with alike counted once. completions: their lengths."""
    forward_products(model, given, prompts, len(completions))
    for position in range(1, max(completions)):
        running = sum(length > position for length in completions)
        forward_products(model, given, running, running)
