"""Hidden states to log-probs of given tokens in one pass, for heads that are one matrix.

Autograd's way keeps the logits, their exponentials and a gradient of the same size, each written and read several times; with
49,152 logits per token that takes longer than the head's matrix products. Here every block of logits is finished while it is in
the processor's cache, and one array is kept for backward where it is not too large: the probabilities, in the dtype the model
computes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crosstrain.head import adds_up_in_fp32, at_least_fp32, bf16_products, fp32_product

CHUNK = 512
"""Positions whose logits exist at once: 512 x 49,152 in fp32 are 100 MB."""

BLOCK = 32
"""Positions finished together: 32 x 49,152 in fp32 are 6 MB, which a processor's cache holds."""

KEPT_BYTES = 2**29
"""Probabilities larger than this are computed again in backward, chunk by chunk."""


CAST_ROWS = 2048
"""Rows of the weight that are cast at once: 2048 x 576 in fp32 are 5 MB."""


class TokenLogp(NamedTuple):
    """logp, entropy: [M] in nats, at least fp32. correct: [M] bool, whether the token is the most likely one. Only logp has a
    gradient."""

    logp: Tensor
    entropy: Tensor
    correct: Tensor


def token_logp(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenLogp:
    """Log-softmax(hidden weight' / temperature) at `targets`, with gradient to hidden and weight.

    hidden: [M, D], weight: [V, D], targets: [M]. Logits, log-probs and entropies are in fp32 (fp64 stays fp64). The gradient of the
    logits, 1 - p at the target and -p elsewhere, and p itself are rounded to hidden's dtype before they meet the weights, as every
    other gradient of a model in that dtype is. Backward works once per forward.

    >>> identity = torch.eye(2)
    >>> found = token_logp(torch.tensor([[0.0, 1.0986123]]), identity, torch.tensor([1]))
    >>> round(float(found.logp.exp()), 4), bool(found.correct)
    (0.75, True)
    """
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return TokenLogp(*_TokenLogp.apply(hidden, weight, targets, temperature, grad))  # type: ignore[no-untyped-call]


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, grad: bool
    ) -> tuple[Tensor, ...]:
        dtype = at_least_fp32(hidden.dtype)
        logp, entropy = (torch.empty(len(hidden), dtype=dtype, device=hidden.device) for _ in range(2))
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        size = len(hidden) * weight.shape[0] * hidden.element_size()
        kept = None
        from_bf16 = hidden.dtype == weight.dtype == torch.bfloat16 and hidden.device.type == "cpu"
        if grad and size <= KEPT_BYTES:
            kept = torch.empty(len(hidden), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        memory = _logits_memory(hidden, weight, dtype)
        block = BLOCK if hidden.device.type == "cpu" else CHUNK  # on a card every operation costs a launch
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = _logits(hidden[rows], weight, temperature, from_bf16, memory)
            for first in range(0, len(logits), block):
                part = slice(start + first, start + min(first + block, CHUNK))
                z = logits[first : first + block]
                highest, best = z.max(dim=1, keepdim=True)
                z.sub_(highest)
                target = targets[part, None]
                chosen = z.gather(1, target)[:, 0]
                exps = z.exp()
                total = exps.sum(dim=1)
                log_total = total.log()
                logp[part] = chosen - log_total
                entropy[part] = log_total - z.mul_(exps).sum(dim=1) / total  # log sum e^z - sum p z
                correct[part] = (best == target)[:, 0]
                if kept is not None:
                    kept[part] = exps.div_(total[:, None])
        ctx.temperature, ctx.from_bf16 = temperature, from_bf16
        ctx.save_for_backward(hidden, weight, targets, logp, kept)
        ctx.mark_non_differentiable(entropy, correct)
        return logp, entropy, correct

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logp, kept = ctx.saved_tensors
        memory = _logits_memory(hidden, weight, logp.dtype) if kept is None else None
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = None
        scaled = gradient / ctx.temperature
        step = CHUNK if kept is None else max(len(hidden), 1)
        for start in range(0, max(len(hidden), 1), step):  # once without predictions: gradients are then 0
            rows = slice(start, start + step)
            if memory is None:  # they were kept
                p = kept[rows]
            else:
                logits = _logits(hidden[rows], weight, ctx.temperature, ctx.from_bf16, memory)
                p = torch.softmax(logits, dim=1, out=logits).to(hidden.dtype, copy=True)
            of_logits = p.mul_(-scaled[rows, None].to(p.dtype))
            # 1 - p of a likely token, from its log-prob: the difference of rounded numbers would be mostly rounding
            at_target = scaled[rows] * -torch.expm1(logp[rows])
            # scatter_ would copy all of them
            of_logits.index_put_((torch.arange(len(p), device=p.device), targets[rows]), at_target.to(p.dtype))
            if of_hidden is not None:
                of_hidden[rows] = of_logits @ weight
            if ctx.needs_input_grad[1]:
                part = of_logits.T @ hidden[rows]
                # chunks add up in at least fp32
                of_weight = part if step >= len(hidden) else part.to(logp.dtype) + (0.0 if of_weight is None else of_weight)
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None, None, None


def _logits_memory(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the logits of a chunk: to get it anew for each takes longer than to fill it."""
    return torch.empty(min(CHUNK, len(hidden)), len(weight), dtype=dtype, device=hidden.device)


def _logits(hidden: Tensor, weight: Tensor, temperature: float, from_bf16: bool, memory: Tensor) -> Tensor:
    """hidden weight' / temperature in `memory`. A device that cannot multiply 16 bits with sums in fp32 gets both cast to memory's
    dtype, the weight by parts, which stay in a cache; of what were bf16 numbers bf16 instructions lose nothing."""
    logits = memory[: len(hidden)]
    if adds_up_in_fp32(weight):
        fp32_product(hidden, weight, logits)
    else:
        wide = hidden.to(memory.dtype)
        with bf16_products() if from_bf16 else nullcontext():
            for rows, part in _cast_by_parts(weight, memory.dtype):
                torch.mm(wide, part.T, out=logits[:, rows])
    return logits if temperature == 1.0 else logits.div_(temperature)


def _cast_by_parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in `dtype`, each part valid until the next, in memory that stays in a processor's cache."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    memory = weight.new_empty(CAST_ROWS, weight.shape[1], dtype=dtype)
    for first in range(0, len(weight), CAST_ROWS):
        rows = slice(first, min(first + CAST_ROWS, len(weight)))
        yield rows, memory[: rows.stop - first].copy_(weight[rows])
