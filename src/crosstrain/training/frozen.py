"""A copy of a model that stays as it is."""

from __future__ import annotations

import copy
from typing import Any


def frozen_copy(model: Any) -> Any:
    """The model as it is now, in evaluation mode, which goes on being so while `model` is trained.

    Only what is trained is copied: parameters that are frozen already are shared, so that a model with LoRA costs a second
    adapter and no second base.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    >>> kept = frozen_copy(model)
    >>> kept[0].weight is model[0].weight, kept[1].weight is model[1].weight, kept[1].weight.requires_grad
    (True, False, False)
    """
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)
