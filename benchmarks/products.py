"""The matrix products of a piece of work alone, as our side lays it out: what is left of its time if nothing stood between them.

What is left out: attention, norms, the softmax, the optimizer, and everything that makes a product's inputs. It is no bound of
physics: another kernel may be faster, and another layout may have less to multiply.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosstrain.served import written_out

Inputs = Mapping[int, Tensor]

UPRIGHT = 128
"""Rows up to which a product is faster with the weight on the left."""

CHUNK = 512
"""Rows of the head's product that exist at once, in memory that is used again."""


def inputs(model: Any, rows: int, predictions: int = 0) -> Inputs:
    """Something to multiply with: [rows, n] for every width n of a layer, and for the vocabulary's as many rows as predictions."""
    weights = [w for w, _ in _weights(model, rows, predictions)]
    *layers, head = weights
    made = {n: torch.randn(max(rows, predictions), n).to(head) for n in {n for w in layers for n in w.shape}}
    return {**made, len(head): torch.randn(predictions, len(head)).to(head)}


@torch.no_grad()
def training_products(model: Any, given: Inputs, tokens: int, predictions: int) -> None:
    """The products of every layer for `tokens`, and of the head for `predictions`: forward, and the gradients of inputs and of
    weights. What comes after the last attention is computed for predictions alone."""
    *layers, (head, _) = _weights(model, tokens, predictions)
    for w, rows in layers:
        out, into = w.shape
        given[into][:rows] @ w.T
        given[out][:rows] @ w
        given[out][:rows].T @ given[into][:rows]
    _head_product(head, given[head.shape[1]][:predictions])
    given[len(head)][:predictions] @ head
    given[len(head)][:predictions].T @ given[head.shape[1]][:predictions]


@torch.no_grad()
def forward_products(model: Any, given: Inputs, tokens: int, predictions: int) -> None:
    """The products of every layer for `tokens`, and of the head for `predictions`: forward alone, the faster way round."""
    *layers, (head, _) = _weights(model, tokens, predictions)
    for w, rows in layers:
        _forward(w, given[w.shape[1]][:rows])
    _forward(head, given[head.shape[1]][:predictions])


def _forward(w: Tensor, x: Tensor) -> None:
    if len(x) == 1:
        torch.mv(w, x[0])
    elif len(x) <= UPRIGHT:
        w @ x.T
    else:
        _head_product(w, x)


def _head_product(w: Tensor, x: Tensor) -> None:
    memory = x.new_empty(min(len(x), CHUNK), len(w))
    for part in x.split(CHUNK):
        torch.mm(part, w.T, out=memory[: len(part)])


def _weights(model: Any, tokens: int, predictions: int) -> Iterator[tuple[Tensor, int]]:
    """Every weight, the head's last, and how many rows it is multiplied with; those that share an input are one where ours are."""
    head = model.get_output_embeddings()
    llama = written_out(model)
    if llama is None:
        for module in model.modules():
            if type(module) is nn.Linear and module is not head:
                yield module.weight, tokens
    else:
        for i, layer in enumerate(llama.layers, start=1):
            after = predictions if i == len(llama.layers) else tokens
            yield layer.qkv, tokens
            yield layer.module.self_attn.o_proj.weight, after
            yield layer.gate_up, after
            yield layer.module.mlp.down_proj.weight, after
    yield head.weight, predictions


def sampling_products(model: Any, given: Inputs, prompts: int, completions: Sequence[int]) -> None:
    """Forward products of sampling: the prompts' tokens, and then, at every position, those of the completions that are still being
    written. prompts: tokens of all of them, what they start with alike counted once. completions: their lengths."""
    forward_products(model, given, prompts, len(completions))
    for position in range(1, max(completions)):
        running = sum(length > position for length in completions)
        forward_products(model, given, running, running)
