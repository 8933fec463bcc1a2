"""The forward pass of Llama-like decoders, written out: Llama, Mistral, Qwen2, Qwen3, Gemma and what is built like them.

The weights stay the model's own parameters: those that are multiplied with the same input (query, key and value; gate and up) lie
one under another in one piece of memory, of which they are views, so that one matrix product takes them all and an optimizer's step
shows at once. Which models are served, `crosstrain.served` finds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from crosstrain import attention
from crosstrain.attention import Block
from crosstrain.fused import Gate, gated, gated_mlp, norm_linear, rms_norm, rotate, turned


@dataclass(frozen=True)
class Layer:
    """One layer: the model's modules, and its fused weights. qkv: [(H + 2 K) D, E]. gate_up: [2 I, E]."""

    module: Any
    qkv: Tensor
    gate_up: Tensor


@dataclass(frozen=True)
class Llama:
    """A decoder that this file can run.

    heads, keys: how many heads queries have, and how many keys and values have. size: of a head. added: what norms add to their
    weights (Gemma: 1).
    """

    decoder: Any
    layers: tuple[Layer, ...]
    heads: int
    keys: int
    size: int
    eps: float
    gate: Gate
    added: float

    @property
    def scaling(self) -> float:
        """What scores are multiplied with."""
        return float(self.layers[0].module.self_attn.scaling)


def hidden_states(
    llama: Llama,
    tokens: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    embeds: Tensor | None = None,
    at: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The decoder's last hidden states, [N, L, E], with gradient; of P places, [P, E], where `at` has their lines and columns.

    tokens: [N, L]. positions: [N or 1, L]. mask: [N or 1, 1, L, L] bool, who sees whom, or None for causal rows without padding.
    embeds: [N, L, E], in place of the tokens' embeddings.
    """
    x = llama.decoder.embed_tokens(tokens) if embeds is None else embeds
    rows, length, width = x.shape
    cos, sin = angles(llama, x, positions)
    seen = _Seen.of(mask, x, length, length)
    x = x.reshape(-1, width)
    for i, layer in enumerate(llama.layers, start=1):
        m, a = layer.module, layer.module.self_attn
        parts = (a.q_proj, a.k_proj, a.v_proj)
        biases = tuple(p.bias for p in parts if p.bias is not None)
        norm = norm_weight(m.input_layernorm, llama)
        qkv = norm_linear(x, norm, llama.eps, [p.weight for p in parts], biases, layer.qkv).view(rows, length, -1)
        query, key, value = _heads(llama, layer, qkv, cos, sin, grad=True)
        mixed = _attention(a, query, key, value, seen, llama.scaling).flatten(2)
        if i == len(llama.layers) and at is not None:  # what comes after the last attention is about single places
            mixed, x = mixed[at], x.view(rows, length, width)[at]
        x = _project(a.o_proj, mixed.flatten(0, -2), x)
        norm = norm_weight(m.post_attention_layernorm, llama)
        mlp = m.mlp
        x = gated_mlp(
            x, norm, llama.eps, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, layer.gate_up, llama.gate
        )
    x = rms_norm(x, norm_weight(llama.decoder.norm, llama), llama.eps)
    return x.view(rows, length, width) if at is None else x


@torch.no_grad()
def extend(llama: Llama, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Run new columns of a `PreallocatedCache`, whose keys and values are added to it: the last column's hidden states, [N, E].

    tokens, positions: [N, L]; a new column sees the real ones before it in its row, and itself. On a processor the cache holds
    bf16 keys and values in fp32: `attention.attend_one` would cast all of them for every token.
    """
    x = llama.decoder.embed_tokens(tokens)
    rows, length, width = x.shape
    cos, sin = angles(llama, x, positions)
    wide = torch.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x.dtype
    seen = _Seen.of(_seen(cache, length), x, length, cache.length + length)
    x = x.reshape(-1, width)
    last = len(llama.layers) - 1
    for i, layer in enumerate(llama.layers):
        m, a = layer.module, layer.module.self_attn
        bias = torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]) if a.q_proj.bias is not None else None
        qkv = F.linear(rms_norm(x, norm_weight(m.input_layernorm, llama), llama.eps), layer.qkv, bias).view(rows, length, -1)
        query, key, value = _heads(llama, layer, qkv, cos, sin, grad=False)
        if length > 1:  # a cache keeps what a prefill gives it: a view would keep the queries too
            key, value = key.contiguous(), value.contiguous()
        if cache.length:
            key, value = cache.update(key, value, i)
        else:  # the new ones are all there are
            cache.update(key.to(wide), value.to(wide), i)
        if i == last and length > 1:  # nobody reads the other columns of the last layer
            query, x = query[:, :, -1:], x.view(rows, length, width)[:, -1]
            seen = seen.by_the_last(x)
        mixed = _attention(a, query, key, value, seen, llama.scaling).reshape(len(x), -1)
        x = _project(a.o_proj, mixed, x)
        gate_up = F.linear(rms_norm(x, norm_weight(m.post_attention_layernorm, llama), llama.eps), layer.gate_up)
        x = torch.addmm(x, gated(gate_up, llama.gate), m.mlp.down_proj.weight.T)
    cache.advance(length)
    return rms_norm(x, norm_weight(llama.decoder.norm, llama), llama.eps)


def _seen(cache: Any, length: int) -> Tensor | None:
    """[N, 1, L, S] bool: who sees whom when `length` columns are added; None where every row sees all before it."""
    real = cache.mask(length)
    # asking whether all are real would wait for a card
    if real.device.type == "cpu" and bool(real.all()) and (length == 1 or cache.length == 0):
        return None
    columns = real.shape[1]
    causal = torch.ones(length, columns, dtype=torch.bool, device=real.device).tril(columns - length)
    return (real[:, None, :] & causal)[:, None]


def _heads(llama: Llama, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor, *, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, H, L, D], keys and values [N, K, L, D] at their positions, from [N, L, (H + 2 K) D]."""
    a, both = layer.module.self_attn, llama.heads + llama.keys
    if hasattr(a, "q_norm"):
        q, k, v = (t.unflatten(-1, (-1, llama.size)) for t in qkv.split(_sizes(llama), dim=-1))
        q, k = rms_norm(q, a.q_norm.weight, llama.eps), rms_norm(k, a.k_norm.weight, llama.eps)
        qkv = torch.cat([q, k, v], dim=2).flatten(2)
    if grad:
        heads = turned(qkv, cos, sin, both, llama.size).unflatten(-1, (-1, llama.size)).transpose(1, 2)
        query, key, value = heads.split([llama.heads, llama.keys, llama.keys], dim=1)
        return query, key, value
    heads = qkv.unflatten(-1, (-1, llama.size))
    query, key = rotate(heads[:, :, :both], cos, sin).transpose(1, 2).split([llama.heads, llama.keys], dim=1)
    return query, key, heads[:, :, both:].transpose(1, 2)


def _sizes(llama: Llama) -> list[int]:
    return [llama.heads * llama.size, llama.keys * llama.size, llama.keys * llama.size]


@dataclass(frozen=True)
class _Seen:
    """Who sees whom, made once for all layers. mask: [N or 1, 1, L, S] bool, or None for causal rows without padding.

    bias: the mask as it is added to the scores of one query per row. blocks: of several, where attention is ours; else None.
    """

    mask: Tensor | None
    bias: Tensor | None = None
    blocks: list[Block] | None = None

    @staticmethod
    def of(mask: Tensor | None, x: Tensor, length: int, columns: int) -> _Seen:
        """For `length` new columns of the dtype and device of `x`, the last of which is column `columns`."""
        if x.device.type != "cpu" or (mask is None and not attention.is_faster(x.dtype, length, columns, masked=False)):
            return _Seen(mask)
        if length == 1:
            return _Seen(mask, bias=attention.added(mask, x.dtype))
        if mask is None:
            return _Seen(
                None, blocks=attention.blocks(torch.ones(1, 1, length, columns, dtype=torch.bool).tril(), len(x), x.dtype)
            )
        blocks = attention.blocks(mask, len(x), x.dtype)
        widest = max(block.columns.shape[1] for block in blocks)  # torch's kernel computes what a mask hides
        ours = attention.is_faster(x.dtype, length, widest, masked=True) or 2 * widest <= columns
        return _Seen(mask, blocks=blocks if ours else None)

    def by_the_last(self, x: Tensor) -> _Seen:
        """What the last of the new columns sees."""
        mask = None if self.mask is None else self.mask[:, :, -1:]
        return _Seen(mask, bias=attention.added(mask, x.dtype))


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, seen: _Seen, scaling: float) -> Tensor:
    """[N, L, H, D]; on a processor ours where it is the faster one, torch's fused kernel elsewhere."""
    if seen.blocks is not None:
        return attention.attend(query, key, value, seen.blocks, scaling)
    if query.shape[2] == 1 and query.device.type == "cpu":
        return attention.attend_one(query, key, value, seen.bias, scaling)
    key, value = key.to(query.dtype), value.to(query.dtype)  # a cache may hold them in fp32
    return sdpa_attention_forward(module, query, key, value, seen.mask, scaling=scaling, is_causal=None)[0]  # type: ignore[no-any-return]


def _project(linear: nn.Linear, x: Tensor, residual: Tensor) -> Tensor:
    added = torch.addmm(residual, x, linear.weight.T)
    return added if linear.bias is None else added + linear.bias


def angles(llama: Llama, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, L, D / 2] of the model's own rotary embedding, which repeats them for both halves of a head."""
    cos, sin = llama.decoder.rotary_emb(x, positions)
    half = llama.size // 2
    return cos[..., :half].contiguous(), sin[..., :half].contiguous()


def norm_weight(norm: Any, llama: Llama) -> Tensor:
    weight: Tensor = norm.weight
    if not llama.added:
        return weight
    # 1 + w in bf16 would round w away
    return (weight if weight.dtype == torch.float64 else weight.float()) + llama.added
