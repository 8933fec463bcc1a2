"""Comparing named tensors, such as a model's weights before and after."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, at least one of them, and under each the same tensor to the last bit."""
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
