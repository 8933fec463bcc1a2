"""The methods: one file per method or close family, each a factory whose defaults are the published settings."""

from crosstrain.methods import dpo, grpo, hpt, luffy, reinforce, sft
from crosstrain.methods.registry import METHODS, Entry, load_method, method

__all__ = ["METHODS", "Entry", "dpo", "grpo", "hpt", "load_method", "luffy", "method", "reinforce", "sft"]
