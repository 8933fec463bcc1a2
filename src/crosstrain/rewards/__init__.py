"""Rewards: functions with TRL's signature, run on whole groups in child processes that can be killed.

Loaded on first use: those processes import this package too, and must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrain.rewards.load import Reward, load_reward
    from crosstrain.rewards.pool import RewardCounts, RewardPool

__all__ = ["Reward", "RewardCounts", "RewardPool", "load_reward"]

_HOME = {"Reward": "load", "load_reward": "load", "RewardCounts": "pool", "RewardPool": "pool"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crosstrain.rewards' has no attribute {name!r}")
    return getattr(import_module(f"crosstrain.rewards.{_HOME[name]}"), name)
