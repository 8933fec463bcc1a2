"""Log-probs of given texts, each distinct one computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from crosstrain.errors import UserError
from crosstrain.training.batching import cut, to_batch
from crosstrain.training.score import Layout, score, trajectory_logps
from crosstrain.types import Example, Group, Source, Trajectory

Tokens = tuple[int, ...]

LINE = 384
"""Tokens of a line that packs different prompts; attention over it grows with its square."""


def completion_logps(
    model: Any, prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]], *, temperature: float, layout: Layout
) -> list[list[tuple[float, ...]]]:
    """The log-prob in nats of every token of each completion given its prompt, under softmax(logits / temperature).

    A prompt is computed once for its completions, and equal completions of a prompt once.
    """
    wanted = {(p, c): None for p, group in zip(prompts, completions, strict=True) for c in group}
    trajectories = [Trajectory(p + c, (Source.PROMPT,) * len(p) + (Source.POLICY,) * len(c)) for p, c in wanted]
    found = trajectory_logps(model, trajectories, temperature=temperature, layout=layout)
    logps = {key: _finite(values[len(key[0]) :].tolist()) for key, values in zip(wanted, found, strict=True)}
    return [[logps[p, c] for c in group] for p, group in zip(prompts, completions, strict=True)]


@torch.no_grad()
def answer_logps(
    model: Any, prompts: Sequence[Tokens], answers: Sequence[Tokens], *, layout: Layout
) -> list[tuple[float, ...]]:
    """The log-prob in nats of every token of one answer per prompt.

    What all prompts start with (a chat template's system message) is computed once for many of them.
    """
    trajectories = tuple(
        Trajectory(p + a, (Source.PROMPT,) * len(p) + (Source.EXPERT,) * len(a)) for p, a in zip(prompts, answers, strict=True)
    )
    batch = to_batch([Group(Example("answers", "", ()), trajectories)])
    result: list[tuple[float, ...]] = [()] * len(trajectories)
    for index in cut(batch, LINE, "token", shared=layout == "shared"):
        logp = score(model, batch.rows(index).to(next(model.parameters()).device), layout=layout).logp.cpu()
        for values, row in zip(logp, index.tolist(), strict=True):
            result[row] = _finite(values[len(prompts[row]) : int(batch.length[row])].tolist())
    return result


def text_logps(model: Any, texts: Sequence[Tokens], *, layout: Layout) -> list[tuple[float, ...]]:
    """The log-prob in nats of every token of each text but its first, which nothing precedes."""
    trajectories = [Trajectory(t, (Source.PROMPT,) + (Source.EXPERT,) * (len(t) - 1)) for t in texts]
    return [_finite(values[1:].tolist()) for values in trajectory_logps(model, trajectories, layout=layout)]


def _finite(logps: list[float]) -> tuple[float, ...]:
    if not all(map(math.isfinite, logps)):
        raise UserError("the model gives log-probs that are not finite: its weights are broken; look at the run's grad_norm")
    return tuple(logps)
