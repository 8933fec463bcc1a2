"""Hidden states to logits, in at least fp32: one function for training and sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from crosstrain.errors import UserError

PROBE_LOGIT = 40.0
"""Largest logit of the check: large enough that a soft cap (30 in Gemma 2) bends it, small enough for fp16."""


FEW = 4
"""Rows up to which fp32 products, bound by reading the weights, are faster without bf16 instructions, which read no less."""


def head_logits(
    model: Any, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None, memory: Tensor | None = None
) -> Tensor:
    """Logits [..., V] of hidden states [..., D], as the model's own forward gives them but in fp32 (fp64 stays fp64).

    parameters: the head's parameters already cast (see `head_parameters`), to save casting them in every call. memory: [>= M, V] in
    at least fp32, which the logits of [M, D] hidden states are written to where the head is one matrix.
    What a head is made of does not matter: LoRA on it, or a trained copy of it, is used. After the head come the scales and
    soft caps of published architectures (Cohere, Granite, Gemma); `check_head` finds models that do something else.
    """
    weight = plain_head(model)
    if weight is not None and adds_up_in_fp32(weight) and hidden.dtype == weight.dtype and not torch.is_grad_enabled():
        flat = fp32_product(hidden.reshape(-1, hidden.shape[-1]), weight, memory)
        return _after_head(model, flat.view(*hidden.shape[:-1], -1))
    if parameters is None or next(iter(parameters.values())).dtype in HALF:
        parameters = head_parameters(model)
    dtype = next(iter(parameters.values())).dtype
    from_bf16 = weight is not None and hidden.dtype == weight.dtype == torch.bfloat16 and hidden.device.type == "cpu"
    with bf16_products() if from_bf16 and len(hidden) > FEW else nullcontext():
        if memory is not None and weight is not None:  # nothing comes after such a head
            return torch.mm(hidden.to(dtype), parameters["weight"].T, out=memory[: len(hidden)])
        logits: Tensor = functional_call(model.get_output_embeddings(), dict(parameters), (hidden.to(dtype),))
    return _after_head(model, logits)


HALF = (torch.bfloat16, torch.float16)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """What logits, scores and sums of tensors of a dtype are computed in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def adds_up_in_fp32(weight: Tensor) -> bool:
    """Whether the device takes products of a weight in 16 bits and gives their sums in fp32: `fp32_product` works."""
    return weight.device.type == "cuda" and torch.version.hip is None and weight.dtype in HALF


def fp32_product(hidden: Tensor, weight: Tensor, memory: Tensor | None = None) -> Tensor:
    """hidden weight', [M, V] in fp32, of [M, D] and [V, D] in 16 bits on a CUDA device; in `memory` [>= M, V] where it is given.
    Without gradient."""
    if memory is None:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=memory[: len(hidden)])


@contextmanager
def bf16_products() -> Iterator[None]:
    """fp32 matrix products on a processor take its bf16 instructions: right to fp32's last digits where both inputs are bf16
    numbers, of which every product fits into fp32, and faster. Sums are in fp32 as ever. Only such products may stand inside.

    The switch is torch's and the whole process's; a precision that is set already stays.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer
    before = getattr(matmul, "fp32_precision", None)
    if before != "none":  # the user asked for a precision, which stays
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def head_parameters(model: Any) -> dict[str, Tensor]:
    """The head's parameters by name, in at least fp32, with gradient to the model's own."""
    head = model.get_output_embeddings()
    return {name: p if p.dtype == torch.float64 else p.float() for name, p in head.named_parameters()}


def plain_head(model: Any) -> Tensor | None:
    """The head's weight [V, D] when logits are hidden states times it and nothing else; None for any other head."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    changed = any(getattr(config, name, None) is not None for name in _CHANGES)
    hooked = head is not None and (head._forward_hooks or head._forward_pre_hooks or "weight" not in head._parameters)
    if type(head) is not torch.nn.Linear or head.bias is not None or changed or hooked or is_parametrized(head):
        return None
    weight: Tensor = head.weight
    return weight


_CHANGES = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""What `_after_head` reads."""


def _after_head(model: Any, logits: Tensor) -> Tensor:
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        logits = logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """The model in evaluation mode, without gradients; every module's own mode is put back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def check_head(model: Any) -> None:
    """Nothing, when `head_logits` after the decoder is what the model's own forward computes.

    Runs three tokens through the model with its head replaced by known logits from -40 to 40, so that a soft cap or scale shows
    however small the model's own logits are, and compares what goes into the head with the decoder's output.

    Raises UserError for a model that does something else before, in or after its head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{_name(model)}: it has no output embeddings, so it gives no next-token probabilities")
    device = next(head.parameters()).device
    seen: list[Tensor] = []
    known: list[Tensor] = []

    def replace(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(args[0])
        ramp = torch.linspace(-PROBE_LOGIT, PROBE_LOGIT, output.shape[-1], device=output.device)
        known.append(ramp.to(output.dtype).expand_as(output).clone())
        return known[-1]

    ids = torch.arange(3, device=device)[None]
    with evaluation_mode(model):
        handle = head.register_forward_hook(replace)
        try:
            given = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    if len(seen) != 1 or not _close(seen[0], hidden, rtol=0.01, atol=1e-5):
        raise UserError(f"{_name(model)}: its head does not read the decoder's last hidden states as they are{_CONSEQUENCE}")
    exact = given.dtype in (torch.float32, torch.float64)
    expected = _after_head(model, known[0] if exact else known[0].float()).to(given.dtype)
    if not _close(given, expected, rtol=1e-5 if exact else 0.02, atol=1e-4):
        raise UserError(f"{_name(model)}: its forward changes logits after the head in a way that is not known{_CONSEQUENCE}")


def _close(one: Tensor, other: Tensor, rtol: float, atol: float) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=rtol, atol=atol, equal_nan=True)


_CONSEQUENCE = "; its log-probs cannot be computed in pieces. Supported: scaled and soft-capped logits (Cohere, Granite, Gemma)"


def _name(model: Any) -> str:
    return f"model {type(model).__name__} ({model.config.model_type})"
