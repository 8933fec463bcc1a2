"""What a step has beside its matrix products, by torch's own kernels: attention, one softmax over the vocabulary for every
prediction, the optimizer.

What is left out: norms, gates, rotations, the keys and values of what all texts start with, everything that cuts, sorts and copies.
Attention is counted by the average text, by torch's fused kernel or by products and a softmax of half of all pairs, whichever is
faster here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crosstrain.training.timing import clock

BLOCK = 32
"""Predictions whose softmax is taken at once, in a processor's cache."""

PARTS = 4
"""The optimizer's step is taken on a part of the parameters, as often as there are parts: on all it would need a step's memory."""


@dataclass(frozen=True)
class Shape:
    """What attention is of: layers, heads of queries, heads of keys, and a head's size."""

    layers: int
    heads: int
    keys: int
    size: int

    @staticmethod
    def of(model: Any) -> Shape:
        """Of a model's configuration."""
        c = model.config.get_text_config()
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return Shape(c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, size)


Kernels = Callable[[], None]


@torch.no_grad()
def training_kernels(model: Any, tokens: int, predictions: int, texts: int, masters: torch.dtype) -> Kernels:
    """Those of a step over `tokens` in so many texts, with the memory that they need. masters: what the optimizer works in."""
    shape, weight = Shape.of(model), model.get_output_embeddings().weight
    length = max(tokens // texts, 1)
    query, gradient = (_some(weight, texts * shape.heads, length, shape.size) for _ in range(2))
    key, value = (_some(weight, texts * shape.heads, (length + 1) // 2, shape.size) for _ in range(2))
    logits = torch.zeros(BLOCK, len(weight), device=weight.device)
    update = _update(model, masters)
    fused = [_some(weight, texts, shape.heads, length, shape.size).requires_grad_() for _ in range(3)]

    def by_products() -> None:
        seen = torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1)
        torch.bmm(seen, value)
        of_seen = torch.bmm(gradient, value.transpose(1, 2))
        torch.bmm(seen.transpose(1, 2), gradient)
        of_scores = torch.ops.aten._softmax_backward_data(of_seen, seen, -1, seen.dtype)
        torch.bmm(of_scores, key)
        torch.bmm(of_scores.transpose(1, 2), query)

    @torch.enable_grad()
    def by_one_kernel() -> None:
        mixed = F.scaled_dot_product_attention(*fused, is_causal=True)
        torch.autograd.grad(mixed, fused, gradient.view_as(mixed))

    attention = min((by_products, by_one_kernel), key=lambda way: _seconds(weight.device, way))

    @torch.no_grad()
    def run() -> None:
        for _ in range(shape.layers):
            attention()
        for _ in range(0, predictions, BLOCK):
            torch.softmax(logits, dim=1, out=logits)
        update()

    return run


def _update(model: Any, masters: torch.dtype) -> Kernels:
    """The norm of all gradients and an AdamW step."""
    weights = [p for p in model.parameters() if p.requires_grad]
    scratch = torch.zeros(sum(p.numel() for p in weights) // PARTS, dtype=masters, device=weights[0].device)
    scratch.grad = torch.zeros_like(scratch)
    adamw = torch.optim.AdamW([scratch], lr=0.0, fused=True)
    adamw.step()  # makes its moments

    def run() -> None:
        for _ in range(PARTS):
            assert scratch.grad is not None
            torch.nn.utils.get_total_norm([scratch.grad])
            adamw.step()

    return run


@torch.no_grad()
def sampling_kernels(model: Any, rest: Sequence[int], completions: Sequence[int]) -> Kernels:
    """Those of every token after the first. rest: of each prompt, its tokens after what all prompts start with. completions: their
    lengths. Keys and values are in fp32 on a processor, whose small products are faster so."""
    shape, weight = Shape.of(model), model.get_output_embeddings().weight
    dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
    columns, lines = max(rest, default=0) + max(completions), len(completions)
    cache = torch.zeros(shape.layers, 2, lines * shape.keys, columns, shape.size, dtype=dtype, device=weight.device)
    query = torch.zeros(lines * shape.keys, shape.heads // shape.keys, shape.size, dtype=dtype, device=weight.device)
    logits = torch.zeros(lines, len(weight), device=weight.device)

    @torch.no_grad()
    def run() -> None:
        for position in range(1, max(completions)):
            running = sum(length > position for length in completions)
            rows, seen = running * shape.keys, columns - max(completions) + position
            for key, value in cache[:, :, :rows, :seen]:
                torch.bmm(torch.softmax(torch.bmm(query[:rows], key.transpose(1, 2)), dim=-1), value)
            torch.softmax(logits[:running], dim=1, out=logits[:running])

    return run


def _seconds(device: torch.device, run: Kernels) -> float:
    """Of a second run: the first gets memory."""
    run()
    started = clock(device)
    run()
    return clock(device) - started


def _some(like: Tensor, *size: int) -> Tensor:
    return torch.randn(size, device=like.device).to(like.dtype)
