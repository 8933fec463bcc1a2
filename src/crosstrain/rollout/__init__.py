"""Sampling: prompts to completions."""

from crosstrain.rollout.sampler import Completion, Prompt, Sampler, Sampling, usage

__all__ = ["Completion", "Prompt", "Sampler", "Sampling", "usage"]
