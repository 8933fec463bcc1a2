"""A scalar head on a language model's last hidden states: PPO's critic, and what a reward model reads its score with.

It stands beside the model and is no part of it: the model stays what transformers made it, and saving it saves no head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from crosstrain.head import at_least_fp32

VALUE_HEAD = "value_head."
"""What the names of its parameters start with, among the trained weights of a run."""


def make_value_head(model: Any) -> nn.Linear:
    """A head for `model`, [1, D] without a bias, on its device and in at least fp32 whatever the model computes in.

    It starts at 0, so that all values are 0 before the first step: nothing is drawn, and advantages are the returns themselves.
    """
    weight = model.get_output_embeddings().weight
    head = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device, dtype=at_least_fp32(weight.dtype))
    nn.init.zeros_(head.weight)
    return head


def reader(head: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Hidden states [P, D] to values [P], in the head's dtype, with gradient to both."""
    return lambda hidden: head(hidden.to(head.weight.dtype))[:, 0]


def named(head: nn.Linear | None) -> dict[str, nn.Parameter]:
    """The head's parameters under the names that checkpoints have them by; none of no head."""
    return {} if head is None else {VALUE_HEAD + name: p for name, p in head.named_parameters()}
