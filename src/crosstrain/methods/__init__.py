"""The methods: one file per method or close family, each a factory whose defaults are the published settings."""

from crosstrain.methods import cispo, dpo, grpo, gspo, hpt, luffy, reinforce, sft, simpo, weighted_sft
from crosstrain.methods.registry import METHODS, Entry, load_method, method

__all__ = [
    "METHODS",
    "Entry",
    "cispo",
    "dpo",
    "grpo",
    "gspo",
    "hpt",
    "load_method",
    "luffy",
    "method",
    "reinforce",
    "sft",
    "simpo",
    "weighted_sft",
]
