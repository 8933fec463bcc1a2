"""Attention of short rows on a processor: plain matrix products instead of torch's fused kernel.

torch's kernel for processors is made for long rows. For rows of 60 tokens its backward takes several times longer than the same
attention written as matrix products, and for decoding, one query per row, it takes ten times longer, because keys that several
query heads share are copied for each of them first. Here the query heads that share a key are rows of one matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crosstrain.architecture import is_plain

NAME = "crosstrain_short"
"""What transformers knows this attention by (`config._attn_implementation`)."""

LONGEST = {torch.bfloat16: 320}
"""Columns up to which plain products are faster than torch's kernel, forward and backward, whose bf16 backward is slow; measured on
an AVX-512 processor. One query is always short."""

LONGEST_WIDE = 112
"""The same for fp32, measured on a processor with AVX2."""


def short_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(query key' scaling) value with transformers' signature; scores and softmax in fp32 (fp64 stays fp64).

    query: [B, H, L, D]. key, value: [B, K, S, D], each shared by H / K query heads. attention_mask: [B, 1, L, S] bool, or None for
    causal attention of rows without padding. Returns [B, L, H, D]. Long rows, dropout and everything that is not plain
    attention go to torch's kernel.
    """
    rows, heads, length, size = query.shape
    columns = key.shape[2]
    plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if dropout or not plain or (length > 1 and columns > LONGEST.get(query.dtype, LONGEST_WIDE)) or _asks_for_more(kwargs):
        more = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)  # type: ignore[no-any-return]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, shared = key.shape[1], heads // key.shape[1]
    queries = (query.to(wide) * (size**-0.5 if scaling is None else scaling)).reshape(rows * keys, shared * length, size)
    scores = torch.bmm(queries, key.to(wide).reshape(rows * keys, columns, size).transpose(1, 2))
    scores = scores.view(rows, keys, shared, length, columns)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen = attention_mask[:, :, None] if attention_mask is not None else None
    if seen is None and causal and length > 1:
        seen = torch.ones(length, columns, dtype=torch.bool, device=query.device).tril()
    if seen is not None:
        # the lowest number and not -inf: a row of padding sees nothing, and must not become NaN
        scores = scores.masked_fill(~seen, torch.finfo(wide).min)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    mixed = torch.bmm(weights.view(rows * keys, shared * length, columns), value.reshape(rows * keys, columns, value.shape[3]))
    return mixed.view(rows, heads, length, value.shape[3]).transpose(1, 2), None


def _asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether the call names something that changes the result and is not known here."""
    return any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))


def use_short_attention(model: Any) -> None:
    """Switch a model of a known kind that uses torch's fused attention to `short_attention`; others are left as they are.

    Some models tell their attention which keys to take, and put that into the mask only for the names they know: a new name would
    make them dense without a word.
    """
    if model.config._attn_implementation == "sdpa" and is_plain(model):
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
