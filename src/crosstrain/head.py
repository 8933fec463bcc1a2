"""Hidden states to logits, in at least fp32: one function for training and sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def head_logits(model: Any, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """Logits of hidden states [..., D] as the model's own forward would give them, [..., V], in fp32 (fp64 stays fp64).

    weight: the head's weight already cast (see `head_weight`), to save casting it for every call.
    Covers what published architectures do after the head: soft caps (Gemma), scales (Cohere, Granite).
    """
    head = model.get_output_embeddings()
    if weight is None:
        weight = head_weight(model)
    bias = getattr(head, "bias", None)
    logits = F.linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
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


def head_weight(model: Any) -> Tensor:
    """The head's weight in at least fp32, with gradient to the parameter."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight if weight.dtype == torch.float64 else weight.float()
