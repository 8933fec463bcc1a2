"""What a model's configuration says about it, and what was found out by trying it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Found = TypeVar("Found")

PLAIN_ATTENTION = frozenset(
    [
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    ]
)
"""Kinds of model whose layers do nothing but (local) attention by position, so that what is known of attention holds for them."""


def is_plain(model: Any) -> bool:
    """Whether the model is of a kind in `PLAIN_ATTENTION`; others select keys, count columns or ask which attention is in use."""
    return model.config.get_text_config().model_type in PLAIN_ATTENTION


def has_local_attention(model: Any) -> bool:
    """Whether some layer sees only a window or chunk of what came before."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    if layers is None and "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        return True
    if layers is not None:
        return any(kind != "full_attention" for kind in layers)
    return getattr(config, "sliding_window", None) is not None


_FOUND: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()
"""What is kept of a model must not refer to it, which would keep it."""


def found_once(find: Callable[[Any], Found], model: Any) -> Found:
    """`find(model)`, tried again only when something that it may depend on has changed since: the model's dtype, place and
    configuration, its modules, their hooks, or a forward put in the place of theirs.

    For what belongs to an architecture and not to its weights: a try takes up to a second, and a run with evaluations would make
    one for each of them.
    """
    parameter = next(model.parameters())
    modules = tuple((id(m), id(m.__dict__.get("forward")), *m._forward_hooks, *m._forward_pre_hooks) for m in model.modules())
    attention = getattr(model.config, "_attn_implementation", None)
    key = (find, parameter.dtype, parameter.device, attention, repr(model.config.to_dict()), modules)
    known = _FOUND.setdefault(model, {})
    if key not in known:
        known[key] = find(model)
    result: Found = known[key]
    return result
