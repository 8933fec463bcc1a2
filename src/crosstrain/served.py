"""Which models `crosstrain.llama` runs: Llama-like ones with nothing added.

Any other model, and one of these with something more (adapters, hooks, local attention), runs its own code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from crosstrain import attention
from crosstrain.fused import Gate
from crosstrain.head import evaluation_mode
from crosstrain.llama import Layer, Llama, hidden_states
from crosstrain.memory import give_back

KINDS = {"llama": 0.0, "mistral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "gemma": 1.0}
"""Served kinds of model, and what their norms add to their weights."""

GATES: dict[str, Gate] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

CLOSE = 1e-4
"""Largest distance from the model's own hidden states in fp32, as a share of their mean size; in bf16 the mean may be 0.1 away."""


Fused = tuple[tuple[Tensor, Tensor], ...]
"""Of every layer, the weights of query, key and value, and of gate and up, one under another."""


def why_not(model: Any) -> str:
    """Why a model is run by its own code; empty when `written_out` takes it.

    Found from what it is made of, and by trying: its own hidden states of a few tokens must come out.
    """
    return _look(model)[1]


def written_out(model: Any) -> Llama | None:
    """The model's decoder as this file runs it, or None. Cheap after the first call; weights that were moved are fused again."""
    return _look(model)[0]


_found: WeakKeyDictionary[Any, tuple[Fused, str]] = WeakKeyDictionary()
"""Of each decoder, its fused weights and why it is not served. What is kept must not refer to the decoder, which it would keep."""


def _look(model: Any) -> tuple[Llama | None, str]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if reason := _made_of_more(model, decoder):
        return None, reason
    if decoder not in _found:
        fused = _fuse(decoder)
        _let_go(model)
        _found[decoder] = (fused, _tried(_describe(decoder, fused)))
    fused, reason = _found[decoder]
    if not reason and not _are_views(decoder, fused):
        fused = _fuse(decoder)
        _let_go(model)
        _found[decoder] = (fused, "")
    return (None if reason else _describe(decoder, fused)), reason


def _made_of_more(model: Any, decoder: Any) -> str:
    """What a model has that this file does not compute; empty when nothing was found."""
    if not isinstance(decoder, PreTrainedModel):
        return f"its decoder is a {type(decoder).__name__}"
    config = decoder.config
    kind = config.model_type
    if kind not in KINDS:
        return f"its kind, {kind}, is not written out"
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return f"its attention is set to {config._attn_implementation}"
    if config.hidden_act not in GATES:
        return f"its activation is {config.hidden_act}"
    if "full_attention" not in (layers := set(getattr(config, "layer_types", None) or ["full_attention"])) or len(layers) > 1:
        return "it has local attention"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "it has local attention"
    if getattr(config, "attention_dropout", 0.0) and model.training:
        return "it has attention dropout"
    if getattr(decoder, "gradient_checkpointing", False) and model.training:
        return "gradient checkpointing is on"
    return next(_additions(decoder), "")


def _additions(decoder: Any) -> Iterator[str]:
    """Modules that do more than their class says."""
    for name, module in decoder.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or is_parametrized(module) or "forward" in module.__dict__:
            yield f"{name or 'the decoder'} has hooks, a parametrization or a forward of its own"
    for layer in decoder.layers:
        a, mlp = layer.self_attn, layer.mlp
        for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            if type(linear) is not nn.Linear:
                yield f"it has {type(linear).__name__} layers"
        if any(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            yield "its MLP has biases"


def _describe(decoder: Any, fused: Fused) -> Llama:
    config = decoder.config
    first = decoder.layers[0].self_attn
    size = int(first.head_dim)
    return Llama(
        decoder=decoder,
        layers=tuple(Layer(layer, *weights) for layer, weights in zip(decoder.layers, fused, strict=True)),
        heads=first.q_proj.out_features // size,
        keys=first.k_proj.out_features // size,
        size=size,
        eps=float(config.rms_norm_eps),
        gate=GATES[config.hidden_act],
        added=KINDS[config.model_type],
    )


def _together(layer: Any) -> tuple[tuple[nn.Linear, ...], tuple[nn.Linear, ...]]:
    """The layers that read the same input: query, key and value; gate and up."""
    a, mlp = layer.self_attn, layer.mlp
    return (a.q_proj, a.k_proj, a.v_proj), (mlp.gate_proj, mlp.up_proj)


def _fuse(decoder: Any) -> Fused:
    """Every layer's weights that read the same input in one tensor, of which the parameters are views from then on."""

    def one(linears: tuple[nn.Linear, ...]) -> Tensor:
        fused = torch.cat([linear.weight.detach() for linear in linears])
        for linear, part in zip(linears, fused.split([linear.out_features for linear in linears]), strict=True):
            linear.weight.data = part
        return fused

    return tuple((one(qkv), one(gate_up)) for qkv, gate_up in map(_together, decoder.layers))


def _let_go(model: Any) -> None:
    """Give the system what the fused weights were in before: a mapped model file, which stays in memory as a whole while any other
    weight is read from it, or pieces that lie between others."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not parameter.untyped_storage().resizable():  # it may be part of a file
            parameter.data = parameter.data.clone()
    give_back()


def _are_views(decoder: Any, fused: Fused) -> bool:
    """Whether the parameters still are the views that `_fuse` made: casting or moving a model gives them other memory."""
    for layer, tensors in zip(decoder.layers, fused, strict=True):
        for linears, tensor in zip(_together(layer), tensors, strict=True):
            at = tensor.data_ptr()
            for linear in linears:
                if linear.weight.data_ptr() != at or linear.weight.dtype != tensor.dtype:
                    return False
                at += linear.weight.numel() * linear.weight.element_size()
    return True


def _tried(llama: Llama) -> str:
    """Why the model's own hidden states do not come out; empty when they do."""
    try:
        gap = _gap(llama)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # weights or modules of some other make
        return f"it cannot be run: {type(error).__name__}: {error}"
    return "" if gap < 1 else f"its hidden states came out otherwise, by {gap:.1f} times the bound"


def _gap(llama: Llama) -> float:
    """Distance of our hidden states of a few tokens from the model's own, in units of what is allowed."""
    vocabulary = int(llama.decoder.config.vocab_size)
    device = llama.layers[0].qkv.device
    ids = torch.tensor([[(7 * i + 3) % vocabulary for i in range(9)]], device=device)
    with evaluation_mode(llama.decoder):
        expected = llama.decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
        found = hidden_states(llama, ids, torch.arange(9, device=device)[None], None).float()
    apart, exact = (found - expected).abs(), llama.layers[0].qkv.dtype in (torch.float32, torch.float64)
    share = float((apart.max() if exact else apart.mean()) / expected.abs().mean())
    return math.inf if math.isnan(share) else share / (CLOSE if exact else 0.1)
