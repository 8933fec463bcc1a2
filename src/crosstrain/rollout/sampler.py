"""What a sampler is asked and what it answers."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crosstrain.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: divides the logits; 0 is greedy, above it at least LEAST_TEMPERATURE. top_p: sample from the smallest set of tokens
    with at least this probability; 1 is all. top_k: sample from the k most likely tokens; 0 is all. max_completion_length: tokens
    after which a completion is cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 64

    def __post_init__(self) -> None:
        number, whole = (int, float), (int,)
        for name, kinds, low, high, allowed in (
            ("temperature", number, 0, _HUGE, f"0 (greedy), or a finite number of at least {LEAST_TEMPERATURE}"),
            ("top_p", number, _TINY, 1, "a number above 0 and at most 1 (all tokens)"),
            ("top_k", whole, 0, _HUGE, "a whole number, 0 (all tokens) or more"),
            ("max_completion_length", whole, 1, _HUGE, "a whole number, at least 1"),
        ):
            value = getattr(self, name)
            outside = not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high
            if outside or (name == "temperature" and 0 < value < LEAST_TEMPERATURE):
                raise UserError(f"sampling.{name}: got {value!r}; it must be {allowed}")


LEAST_TEMPERATURE = 1e-6
"""Much less is 0 in fp32."""

_TINY, _HUGE = sys.float_info.min, sys.float_info.max


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
    temperature (at 1 where that is 0), before top-p and top-k. finished: ended by a stop token, not by the limit.
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finished: bool

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logp):
            raise ValueError(f"a completion has {len(self.tokens)} tokens but {len(self.logp)} log-probs; they must match")


class Sampler(Protocol):
    """Anything that completes prompts."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int) -> list[list[Completion]]:
        """`n` completions of each prompt, in order; the same (seed, step, key) give the same random numbers.

        Raises ValueError when two prompts have the same key: their completions would be copies or near copies.
        """
        ...


def uniforms(seed: int, step: int, key: str, index: int, n: int) -> NDArray[np.float32]:
    """`n` uniform numbers in [0, 1) that depend on nothing but (seed, step, key, index): one per sampled position.

    >>> bool((uniforms(0, 1, "a", 0, 3) == uniforms(0, 1, "a", 0, 5)[:3]).all())
    True
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{index}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n, dtype=np.float32)


def usage(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> tuple[int, int]:
    """Tokens prefilled (each prompt once) and tokens generated."""
    return sum(len(p.tokens) for p in prompts), sum(len(c.tokens) for group in completions for c in group)


def check_keys(prompts: Sequence[Prompt]) -> None:
    """Nothing, when every prompt has a key of its own; for samplers to call first."""
    keys = Counter(p.key for p in prompts)
    repeated = [key for key, times in keys.items() if times > 1]
    if repeated:
        raise ValueError(
            f"prompts of one call must differ in their keys, which the random numbers depend on; repeated: {repeated[:3]}"
        )
