"""The matrix products of a piece of work alone, as our side lays it out: what is left of its time if nothing stood between them.

What is left out: attention, norms, the softmax, the optimizer, and everything that makes a product's inputs. It is no bound of
physics: another kernel may be faster, and another layout may have less to multiply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosstrain.served import written_out

Inputs = Mapping[int, Tensor]
Weights = Sequence[tuple[Tensor, bool]]
"""Every weight, the head's last, and whether it is multiplied for predictions alone."""

UPRIGHT = 128
"""Rows up to which a product is faster with the weight on the left."""

CHUNK = 512
"""Rows of the head's product that exist at once, in memory that is used again."""


def weights_of(model: Any) -> Weights:
    """What a model multiplies with; weights that share an input are one where ours are. To be asked for before time is taken."""
    head = model.get_output_embeddings()
    llama = written_out(model)
    if llama is None:
        modules = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
        return [*((m.weight, False) for m in modules), (head.weight, True)]
    found: list[tuple[Tensor, bool]] = []
    for i, layer in enumerate(llama.layers, start=1):
        last = i == len(llama.layers)
        m = layer.module
        after = (m.self_attn.o_proj.weight, layer.gate_up, m.mlp.down_proj.weight)
        found += [(layer.qkv, False), *((w, last) for w in after)]
    return [*found, (head.weight, True)]


def inputs(weights: Weights, rows: int, predictions: int = 0) -> Inputs:
    """Something to multiply with: [rows, n] for every width n of a layer, and for the vocabulary's as many rows as predictions."""
    *layers, head = (w for w, _ in weights)
    made = {n: torch.randn(max(rows, predictions), n).to(head) for n in {n for w in layers for n in w.shape}}
    return {**made, len(head): torch.randn(predictions, len(head)).to(head)}


@torch.no_grad()
def training_products(weights: Weights, given: Inputs, tokens: int, predictions: int) -> None:
    """The products of every layer for `tokens`, and of the head for `predictions`: forward, and the gradients of inputs and of
    weights. What comes after the last attention is computed for predictions alone."""
    *layers, (head, _) = weights
    for w, few in layers:
        rows, (out, into) = predictions if few else tokens, w.shape
        given[into][:rows] @ w.T
        given[out][:rows] @ w
        given[out][:rows].T @ given[into][:rows]
    _head_product(head, given[head.shape[1]][:predictions])
    given[len(head)][:predictions] @ head
    given[len(head)][:predictions].T @ given[head.shape[1]][:predictions]


@torch.no_grad()
def forward_products(weights: Weights, given: Inputs, tokens: int, predictions: int) -> None:
    """The products of every layer for `tokens`, and of the head for `predictions`: forward alone, the faster way round."""
    for w, few in weights:
        x = given[w.shape[1]][: predictions if few else tokens]
        if len(x) == 1:
            torch.mv(w, x[0])
        elif len(x) <= UPRIGHT:
            w @ x.T
        else:
            x @ w.T


def _head_product(w: Tensor, x: Tensor) -> None:
    memory = x.new_empty(min(len(x), CHUNK), len(w))
    for part in x.split(CHUNK):
        torch.mm(part, w.T, out=memory[: len(part)])


def sampling_products(weights: Weights, given: Inputs, prompts: int, tokens: int, completions: Sequence[int]) -> None:
    """Forward products of sampling: those of `prompts` prompts, and then, at every position, those of the completions that are
    still being written, also where ours are still the same text. tokens: of all prompts, what they start with alike counted once.
    completions: their lengths."""
    forward_products(weights, given, tokens, prompts)
    for position in range(1, max(completions)):
        running = sum(length > position for length in completions)
        forward_products(weights, given, running, running)
