"""What a sampler is asked and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crosstrain.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: divides the logits; 0 is greedy. top_p: sample from the smallest set of tokens with at least this probability; 1
    is all. top_k: sample from the k most likely tokens; 0 is all. max_completion_length: tokens after which a completion is cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 64

    def __post_init__(self) -> None:
        for ok, name, allowed in (
            (self.temperature >= 0, "temperature", "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (self.top_k >= 0, "top_k", "0 (all tokens) or more"),
            (self.max_completion_length >= 1, "max_completion_length", "at least 1"),
        ):
            if not ok:
                raise UserError(f"sampling.{name}: got {getattr(self, name)}; it must be {allowed}")


@dataclass(frozen=True)
class Prompt:
    """Asks for `n` completions of `tokens`.

    key: what the random numbers depend on, beside seed and step; two prompts of one call must differ in it.
    greedy: take the most likely token whatever the temperature says.
    """

    tokens: tuple[int, ...]
    n: int
    key: str
    greedy: bool = False

    def __post_init__(self) -> None:
        if not self.tokens:
            raise UserError(f"prompt {self.key}: it has no tokens; a completion needs at least one to follow")
        if self.n < 1:
            raise UserError(f"prompt {self.key}: got n={self.n}; at least one completion must be asked for")


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    tokens: sampled ids, the stop token included. logp: their log-probs in nats under the full distribution at the sampling
    temperature (at temperature 1 when greedy), before top-p and top-k. finished: ended by a stop token, not by the limit.
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finished: bool


class Sampler(Protocol):
    """Anything that completes prompts."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        """`n` completions of each prompt, in order; the same (seed, step, key) give the same random numbers."""
        ...


def uniforms(seed: int, step: int, key: str, index: int, n: int) -> NDArray[np.float64]:
    """`n` uniform numbers in [0, 1) that depend on nothing but (seed, step, key, index): one per sampled position.

    >>> bool((uniforms(0, 1, "a", 0, 3) == uniforms(0, 1, "a", 0, 5)[:3]).all())
    True
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n)


def usage(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> tuple[int, int]:
    """Tokens prefilled (each prompt once) and tokens generated."""
    return sum(len(p.tokens) for p in prompts), sum(len(c.tokens) for group in completions for c in group)
