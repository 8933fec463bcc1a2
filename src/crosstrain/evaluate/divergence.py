"""How far a model has moved from the base: KL divergence both ways, and entropy, by sampling.

One value per prompt, in nats, estimated from samples (Monte Carlo): divergences of whole replies up to the token limit, entropy
per token of them. The samples and both log-probs are at the evaluation's temperature, so that each estimate is unbiased for the
distributions sampled from.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crosstrain.errors import UserError
from crosstrain.evaluate.likelihood import Tokens, completion_logps
from crosstrain.training.score import Layout

PROMPTS = 48
SAMPLES = 4
"""Divergences use the first SAMPLES replies to at most PROMPTS questions: prompts differ more than replies to one prompt."""

Logps = tuple[float, ...]


@dataclass(frozen=True)
class BaseAnswers:
    """A model's sampled replies and their log-probs: P prompts with S completions each.

    ids, prompts: [P]. completions: [P][S] token ids. logps: [P][S], the log-prob in nats of each token, at `temperature`.
    """

    temperature: float
    ids: tuple[str, ...]
    prompts: tuple[Tokens, ...]
    completions: tuple[tuple[Tokens, ...], ...]
    logps: tuple[tuple[Logps, ...], ...]

    def write(self, path: str | Path) -> None:
        """Save as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> BaseAnswers:
        """What `write` saved."""
        try:
            return cls(**{key: _tuples(value) for key, value in json.loads(Path(path).read_text(encoding="utf-8")).items()})
        except (OSError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: no base answers can be read from it ({error}); evaluate the base model again") from error


def rescored(model: Any, own: BaseAnswers, *, layout: Layout) -> BaseAnswers:
    """The same replies with log-probs computed from the whole sequences, as `compared` computes another model's."""
    logps = completion_logps(model, own.prompts, own.completions, temperature=own.temperature, layout=layout)
    return replace(own, logps=_tuples(logps))


def compared(model: Any, own: BaseAnswers, base: BaseAnswers, *, layout: Layout) -> tuple[BaseAnswers, list[float]]:
    """`own` rescored, and KL(base || model) per prompt: mean over the base's replies of sum_t log base - log model.

    In one pass: both answer the same prompts, which are computed once.
    """
    both = tuple(mine + theirs for mine, theirs in zip(own.completions, base.completions, strict=True))
    logps = completion_logps(model, own.prompts, both, temperature=own.temperature, layout=layout)
    sizes = [len(mine) for mine in own.completions]
    rescored = replace(own, logps=_tuples([found[:n] for found, n in zip(logps, sizes, strict=True)]))
    return rescored, _mean_gaps(base.logps, [found[n:] for found, n in zip(logps, sizes, strict=True)])


def reverse_kl(base_model: Any, own: BaseAnswers, *, layout: Layout) -> list[float]:
    """KL(model || base) per prompt: mean over the model's own replies of sum_t log model - log base."""
    logps = completion_logps(base_model, own.prompts, own.completions, temperature=own.temperature, layout=layout)
    return _mean_gaps(own.logps, logps)


def entropy(own: BaseAnswers) -> list[float]:
    """Nats per token, per prompt: the mean of -log model over the tokens of the model's own replies (Monte Carlo)."""
    return [-statistics.fmean(value for logps in group for value in logps) for group in own.logps]


def check_same_prompts(base: BaseAnswers, own: BaseAnswers) -> None:
    """UserError unless the base answered the same prompts at the same temperature."""
    for what in ("temperature", "ids", "prompts"):
        if getattr(base, what) != getattr(own, what):
            raise UserError(
                f"the base's answers were made with other {what} ({len(base.ids)} prompts at temperature {base.temperature:g}; "
                f"now {len(own.ids)} at {own.temperature:g}); evaluate the base model again with this evaluation and tokenizer"
            )


def check_base_model(model: Any, base_model: Any | None) -> None:
    """UserError unless the base's weights are at hand: given, or the model's own with its low-rank adapters off."""
    if base_model is None and not hasattr(model, "disable_adapter"):
        raise UserError(
            "reverse KL needs the base's log-probs of the model's replies: pass base_model, or set evaluation.divergence: false"
        )


@contextlib.contextmanager
def base_of(model: Any, base_model: Any | None) -> Iterator[Any]:
    """The base to score with: `base_model`, or the model itself with its low-rank adapters off."""
    if base_model is not None:
        yield base_model
        return
    with model.disable_adapter():
        yield model


def _mean_gaps(sampled: Sequence[Sequence[Logps]], other: Sequence[Sequence[Logps]]) -> list[float]:
    return [
        statistics.fmean(sum(a) - sum(b) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(sampled, other, strict=True)
    ]


def _tuples(value: Any) -> Any:
    """Nested lists as nested tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
