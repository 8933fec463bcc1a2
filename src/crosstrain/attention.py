"""Attention on a processor in plain matrix products, where they are faster than torch's fused kernel.

The kernel is made for long rows of which all that comes before is seen. For rows of 60 tokens its backward takes several times
longer than the same attention written as matrix products, and for decoding, one query per row, it takes ten times longer,
because keys that several query heads share are copied for each of them first. Here the query heads that share a key are rows of
one product. Queries are taken a block at a time with the columns that any of them sees: nothing is computed between the many
short texts of a packed line, or of what comes after a query. Scores exist for a few lines at once, small enough for the
processor's cache; where there are more, backward computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crosstrain.architecture import is_plain
from crosstrain.head import at_least_fp32, bf16_products

NAME = "crosstrain_short"
"""What transformers knows this attention by (`config._attn_implementation`)."""

LONGEST = {torch.bfloat16: 640, torch.float16: 112}
"""Columns up to which plain products are faster than torch's kernel, forward and backward, whose bf16 backward is slow; measured in
bf16 on processors with AVX-512 and AMX. One query is always short."""

LONGEST_WIDE = 768
"""The same for fp32 where nothing but what comes after a query is hidden, measured on a processor with AVX2. With a mask torch's
kernel computes what comes after a query too, and is the slower one at any length."""

BLOCK_SCORES = 2**21
"""Scores that exist at once, and up to which all of them are kept for backward instead of being computed again."""

QUERIES = 64
"""Fewest queries of a line that are computed together: fewer see fewer columns, more make larger products."""

PAIRS = 2**16
"""Pairs of a query and a column, of all lines, below which blocks are larger: a block's operations take as long as 10,000 pairs."""


@dataclass(frozen=True)
class Block:
    """Neighbouring queries, l of them, and what any of them sees: the columns of each line (or the same of all), [N or 1, W], and
    what is added to their scores, [N or 1, 1, l, W]."""

    queries: slice
    columns: Tensor
    bias: Tensor


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
    causal attention of rows without padding. Returns [B, L, H, D]. Torch's kernel is used where it is faster (see `is_faster`),
    on a card, with dropout and for everything that is not plain attention.
    """
    length, columns = query.shape[2], key.shape[2]
    plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    faster = query.device.type == "cpu" and is_faster(query.dtype, length, columns, masked=attention_mask is not None)
    if dropout or not plain or not faster or _asks_for_more(kwargs):
        more = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)  # type: ignore[no-any-return]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if length == 1 and not torch.is_grad_enabled():
        return attend_one(query, key, value, added(attention_mask, query.dtype), scale), None
    if attention_mask is not None:
        seen = blocks(attention_mask.expand(-1, -1, length, columns), len(query), query.dtype)
    else:
        mask = torch.ones(1, 1, length, columns, dtype=torch.bool, device=query.device)
        causal = length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        seen = blocks(mask.tril() if causal else mask, len(query), query.dtype)
    return attend(query, key, value, seen, scale), None


def is_faster(dtype: torch.dtype, length: int, columns: int, *, masked: bool) -> bool:
    """Whether what is here is the faster way on a processor for `length` queries that see at most `columns` each; masked: and more
    is hidden than what comes after a query."""
    return length == 1 or columns <= LONGEST.get(dtype, LONGEST_WIDE) or (masked and dtype not in LONGEST)


def added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What a mask adds to scores: 0 where it is true, else the lowest number (and not -inf: a row of padding sees nothing, and must
    not become NaN). In fp32, or fp64 for inputs of that dtype."""
    if mask is None:
        return None
    wide = at_least_fp32(dtype)
    return torch.zeros(mask.shape, dtype=wide, device=mask.device).masked_fill_(~mask, torch.finfo(wide).min)


def blocks(mask: Tensor, lines: int, dtype: torch.dtype) -> list[Block]:
    """Queries of N lines in blocks with what they see, for inputs of a dtype. mask: [N or 1, 1, L, S] bool.

    >>> [first, second] = blocks(torch.ones(1, 1, 300, 300, dtype=torch.bool).tril(), 1, torch.float32)
    >>> second.queries, first.columns.shape, second.columns.shape
    (slice(218, 300, None), torch.Size([1, 218]), torch.Size([1, 300]))
    >>> len(blocks(torch.ones(1, 1, 300, 300, dtype=torch.bool).tril(), 16, torch.float32))  # of many lines each is smaller
    5
    """
    result = []
    queries = max(QUERIES, PAIRS // (lines * mask.shape[3]))
    for start in range(0, mask.shape[2], queries):
        part = mask[:, 0, start : start + queries]
        seen = part.any(dim=1)
        width = max(int(seen.sum(dim=1).max()), 1)
        # those that are seen come first, in their order; lines that see fewer are filled up with others, which the bias hides
        columns = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        bias = added(part.gather(2, columns[:, None].expand(-1, part.shape[1], -1)), dtype)
        assert bias is not None
        result.append(Block(slice(start, start + part.shape[1]), columns, bias[:, None]))
    return result


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Sequence[Block], scaling: float) -> Tensor:
    """softmax(query key' scaling + bias) value, [N, L, H, D], with gradient to query, key and value.

    query: [N, H, L, D]. key, value: [N, K, S, D]. seen: see `blocks`.
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, seen, scaling)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(q, k, v, seen, scaling)


def attend_one(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """`attend` of one query per line, [N, 1, H, D], all of it in fp32, whose small products are faster than bf16's.

    bias: [N or 1, 1, 1, S] in fp32 (fp64 for fp64), or None where all columns are seen.
    """
    lines, heads, _, size = query.shape
    keys, columns, wide = key.shape[1], key.shape[2], at_least_fp32(query.dtype)
    q = query.to(wide).reshape(lines * keys, heads // keys, size)
    k, v = (t.to(wide).reshape(lines * keys, columns, -1) for t in (key, value))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scaling)
    if bias is not None:
        scores.view(lines, heads, columns).add_(bias[:, 0])
    mixed = torch.bmm(torch.softmax(scores, dim=-1), v)
    return mixed.to(query.dtype).view(lines, 1, heads, v.shape[2])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Sequence[Block], scaling: float) -> Tensor:
        kept: list[Tensor] | None = [] if _scores(query, seen) <= BLOCK_SCORES else None
        mixed = _forward(query, key, value, seen, scaling, kept)
        ctx.save_for_backward(query, key, value, *(t for block in seen for t in (block.columns, block.bias)), *(kept or ()))
        ctx.queries, ctx.scaling, ctx.kept = [block.queries for block in seen], scaling, kept is not None
        return mixed

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *others = ctx.saved_tensors
        seen = [Block(q, *others[2 * i : 2 * i + 2]) for i, q in enumerate(ctx.queries)]
        kept = iter(others[2 * len(seen) :]) if ctx.kept else None
        memory = _scores_memory(query, seen) if kept is None else None
        of_query, wide = query.new_empty(query.shape), at_least_fp32(query.dtype)
        # sums over blocks of queries are in at least fp32
        of_key, of_value = (
            torch.zeros(len(t) * t.shape[1], t.shape[2] * t.shape[3], dtype=wide, device=t.device) for t in (key, value)
        )
        for part in _parts(query, key, value, seen):
            q, k, v = part.query, part.key, part.value
            weights = _weights(part, ctx.scaling, memory) if kept is None else next(kept)
            g = _by_key(grad[part.lines, part.queries], part.keys)
            of_value.index_add_(0, part.rows, _by_row(torch.bmm(weights.to(v.dtype).transpose(1, 2), g), part.keys).to(wide))
            # of sharp weights the softmax's backward is a small difference, which rounded weights would lose
            of_weights = torch.bmm(g, v.transpose(1, 2)).to(wide)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, wide).to(k.dtype)
            of_query[part.lines, part.queries] = _by_query(torch.bmm(of_scores, k).mul_(ctx.scaling), part)
            of_key.index_add_(
                0, part.rows, _by_row(torch.bmm(of_scores.transpose(1, 2), q).mul_(ctx.scaling), part.keys).to(wide)
            )
        return of_query, of_key.view(key.shape).to(key.dtype), of_value.view(value.shape).to(value.dtype), None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, seen: Sequence[Block], scaling: float, kept: list[Tensor] | None = None
) -> Tensor:
    """query: [N, L, H, D]. key, value: [N, S, K, D]. kept: where to leave the weights of every part. Returns [N, L, H, D]."""
    memory = _scores_memory(query, seen) if kept is None else None
    mixed = query.new_empty(*query.shape[:3], value.shape[3])
    for part in _parts(query, key, value, seen):
        weights = _weights(part, scaling, memory)
        if kept is not None:
            kept.append(weights)
        weights = weights.to(value.dtype)
        mixed[part.lines, part.queries] = _by_query(torch.bmm(weights, part.value), part)
    return mixed


@dataclass(frozen=True)
class _Part:
    """A block of queries of n lines, ready for matrix products: the G heads that share a key are rows of one.

    query: [n K, G l, D]. key, value: [n K, W, D]. rows: [n W], where the columns are in [N S]. bias: [n or 1, 1, l, W]. keys: K.
    """

    lines: slice
    queries: slice
    query: Tensor
    key: Tensor
    value: Tensor
    rows: Tensor
    bias: Tensor
    keys: int


def _parts(query: Tensor, key: Tensor, value: Tensor, seen: Sequence[Block]) -> Iterator[_Part]:
    several, columns, keys, _ = key.shape
    flat_key, flat_value = key.reshape(several * columns, -1), value.reshape(several * columns, -1)
    first = torch.arange(0, several * columns, columns, device=key.device)[:, None]
    for block in seen:
        rows = first + block.columns
        step = max(1, BLOCK_SCORES // (query.shape[2] * block.bias.shape[2] * rows.shape[1]))
        for start in range(0, several, step):
            lines = slice(start, min(start + step, several))
            here = rows[lines].flatten()
            k, v = (_by_column(flat.index_select(0, here), lines.stop - start, keys) for flat in (flat_key, flat_value))
            bias = block.bias[lines] if len(block.bias) > 1 else block.bias
            q = _by_key(query[lines, block.queries], keys)
            yield _Part(lines, block.queries, q, k, v, here, bias, keys)


def _by_key(query: Tensor, keys: int) -> Tensor:
    """[n, l, K G, D] as [n K, G l, D]."""
    lines, length, heads, size = query.shape
    apart = query.view(lines, length, keys, heads // keys, size) if query.is_contiguous() else query.unflatten(2, (keys, -1))
    return apart.permute(0, 2, 3, 1, 4).reshape(lines * keys, heads // keys * length, size)


def _by_query(mixed: Tensor, part: _Part) -> Tensor:
    """[n K, G l, D] as [n, l, K G, D]."""
    lines, length = part.lines.stop - part.lines.start, part.bias.shape[2]
    return mixed.view(lines, part.keys, -1, length, mixed.shape[2]).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _by_column(flat: Tensor, lines: int, keys: int) -> Tensor:
    """[n W, K D] as [n K, W, D]."""
    return flat.view(lines, -1, keys, flat.shape[1] // keys).transpose(1, 2).flatten(0, 1)


def _by_row(columns: Tensor, keys: int) -> Tensor:
    """[n K, W, D] as [n W, K D]."""
    return columns.unflatten(0, (-1, keys)).transpose(1, 2).flatten(2).flatten(0, 1)


def _scores(query: Tensor, seen: Sequence[Block]) -> int:
    """How many scores there are."""
    pairs = sum(block.bias.shape[2] * block.columns.shape[1] for block in seen)
    return len(query) * query.shape[2] * pairs


def _scores_memory(query: Tensor, seen: Sequence[Block]) -> Tensor:
    """Room for the scores of any part: to get it anew for each takes longer than to fill it."""
    line = max(query.shape[2] * block.bias.shape[2] * block.columns.shape[1] for block in seen)
    return torch.empty(max(line, min(BLOCK_SCORES, len(query) * line)), dtype=at_least_fp32(query.dtype), device=query.device)


def _weights(part: _Part, scaling: float, memory: Tensor | None) -> Tensor:
    """softmax(query key' scaling + bias), [n K, G l, W], in at least fp32; in `memory` where it is given."""
    several, queries, _ = part.query.shape
    length, columns = part.bias.shape[2:]
    wide = at_least_fp32(part.query.dtype)
    if memory is None:
        scores = torch.empty(several, queries, columns, dtype=wide, device=part.query.device)
    else:
        scores = memory[: several * queries * columns].view(several, queries, columns)
    from_bf16 = part.query.dtype == part.key.dtype == torch.bfloat16 and part.query.device.type == "cpu"
    with bf16_products() if from_bf16 else nullcontext():
        torch.bmm(part.query.to(wide), part.key.to(wide).transpose(1, 2), out=scores)
    apart = scores.view(-1, part.keys * queries // length, length, columns)
    torch.add(part.bias, apart, alpha=scaling, out=apart)
    return torch.softmax(scores, dim=-1, out=scores)


@contextmanager
def of_any_shape(device: torch.device) -> Iterator[None]:
    """Attention on a CUDA device without cuDNN's, which plans anew for every shape: 50 ms for each, and shapes hardly repeat here
    (an H100 with torch 2.11 took up to 2 s for an SFT step whose kernels run for 0.02 s). Other backends stay as the user set them.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled() if device.type == "cuda" else False
    if not before:
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


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
