"""One more token for every line, on a processor: what `llama.extend` does, where calling an operation takes as long as its product.

Hidden states stand upright, [E, N], a column for each line. A weight [O, I] is then the left side of its product and is read as it
lies; on the right oneDNN rearranges it first, at every call: for up to 128 lines its products take half as long again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crosstrain.attention import added, attend_one
from crosstrain.fused import Gate
from crosstrain.head import at_least_fp32
from crosstrain.llama import Llama, angles, norm_weight


@torch.no_grad()
def extend_one(llama: Llama, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Add a column to a `PreallocatedCache` that has some: its hidden states, [N, E]. tokens, positions: [N, 1]."""
    embeds = llama.decoder.embed_tokens(tokens)
    cos, sin = (t[:, 0].T.contiguous() for t in angles(llama, embeds, positions))  # [D / 2, N]
    real = cache.mask(1)
    bias = None if bool(real.all()) else added(real[:, None, None], embeds.dtype)
    x = embeds[:, 0].T.contiguous()
    for i, layer in enumerate(llama.layers):
        m, a = layer.module, layer.module.self_attn
        qkv = _times(layer.qkv, _normed(x, norm_weight(m.input_layernorm, llama), llama.eps))
        if a.q_proj.bias is not None:
            qkv += torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias])[:, None]
        query, key, value = _heads(llama, a, qkv.unflatten(0, (-1, llama.size)), cos, sin)
        key, value = cache.update(key, value, i)
        mixed = attend_one(query, key, value, bias, llama.scaling).flatten(1)
        x = _plus(x, a.o_proj.weight, mixed.T.contiguous())
        if a.o_proj.bias is not None:
            x += a.o_proj.bias[:, None]
        gate_up = _times(layer.gate_up, _normed(x, norm_weight(m.post_attention_layernorm, llama), llama.eps))
        x = _plus(x, m.mlp.down_proj.weight, _gated(gate_up, llama.gate))
    cache.advance(1)
    return _normed(x, norm_weight(llama.decoder.norm, llama), llama.eps).T


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight x, [O, N]; of one column by the product that is made for it."""
    return torch.mm(weight, x) if x.shape[1] > 1 else torch.mv(weight, x[:, 0])[:, None]


def _plus(residual: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """residual + weight x, [O, N]."""
    if x.shape[1] > 1:
        return torch.addmm(residual, weight, x)
    return torch.addmv(residual[:, 0], weight, x[:, 0])[:, None]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`fused.rms_norm` of every column, [..., E, N], in fewer operations than torch's own; weight: [E]."""
    wide = x.to(at_least_fp32(x.dtype))
    r = wide.square().mean(dim=-2, keepdim=True).add_(eps).rsqrt_()
    return (wide * r).mul_(weight[:, None]).to(x.dtype)


def _heads(llama: Llama, module: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, H, 1, D], keys and values [N, K, 1, D] at their positions, from [H + 2 K, D, N]."""
    both, half = llama.heads + llama.keys, llama.size // 2
    query, key, value = heads.split([llama.heads, llama.keys, llama.keys])
    if hasattr(module, "q_norm"):
        query = _normed(query, module.q_norm.weight, llama.eps)
        heads = torch.cat([query, _normed(key, module.k_norm.weight, llama.eps)])
    one, other = heads[:both, :half], heads[:both, half:]
    turned = heads.new_empty(both, llama.size, heads.shape[2])
    torch.mul(one, cos, out=turned[:, :half]).addcmul_(other, sin, value=-1)
    torch.mul(other, cos, out=turned[:, half:]).addcmul_(one, sin)
    query, key = turned.split([llama.heads, llama.keys])
    query, key, value = (t.permute(2, 0, 1)[:, :, None] for t in (query, key, value))
    return query, key, value


def _gated(gate_up: Tensor, gate: Gate) -> Tensor:
    """act(g) * u of the two halves [I, N] of `gate_up` [2 I, N], which is overwritten."""
    g, u = gate_up.chunk(2)
    act = F.silu(g, inplace=True) if gate == "silu" else F.gelu(g, approximate="tanh")
    return act.mul_(u)
