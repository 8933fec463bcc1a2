"""What the untrained model makes of rows before step 1: their mean losses, and which of them tell it most."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from crosstrain.cache import cache_folder
from crosstrain.data.selection import Chosen, at_most_square, most_informative
from crosstrain.errors import UserError
from crosstrain.training.checkpoint import write_json
from crosstrain.training.reference import SLICE, cache_name, known_reference
from crosstrain.training.score import predicting_states
from crosstrain.types import Example, Source


def mean_losses(model: Any, examples: Sequence[Example], *, tokens_per_micro_batch: int) -> list[float]:
    """Minus the mean log-prob, in nats, of the tokens of all answers that an example brings; kept between runs with the
    reference's log-probs."""
    known = known_reference(model, examples, layout="plain", tokens_per_micro_batch=tokens_per_micro_batch)
    losses = []
    for e in examples:
        logps = [known[t.tokens, tuple(map(int, t.source))][_trained(t.source)] for t in e.expert]
        losses.append(-float(torch.cat(logps).double().mean()))
    _check_finite(losses, examples)
    return losses


def informative(model: Any, examples: Sequence[Example], size: int, ridge: float, *, tokens_per_micro_batch: int) -> Chosen:
    """The `size` examples whose answers' tokens tell most about the last layer, by the model's last hidden states.

    Kept between runs: read from the cache where the same weights chose from the same tokens. The states are held in memory, of each
    row no more than the model's width of them.
    """
    trajectories = [t for e in examples for t in e.expert]
    rule = [cache_name(model, trajectories, "plain", tokens_per_micro_batch), [len(e.expert) for e in examples], size, ridge]
    place = cache_folder() / "selection" / f"{hashlib.sha256(repr(rule).encode()).hexdigest()}.json"
    if place.is_file():
        kept = json.loads(place.read_text(encoding="utf-8"))
        return Chosen(tuple(kept["rows"]), tuple(kept["gains"]), kept["looks"])
    states = []
    for start in range(0, len(trajectories), SLICE):
        found = predicting_states(model, trajectories[start : start + SLICE], tokens_per_micro_batch=tokens_per_micro_batch)
        states += [at_most_square(s.double()).to(s.dtype) for s in found]
    rows = iter(states)
    embeddings = [torch.cat([next(rows) for _ in e.expert]) for e in examples]
    _check_finite([float(x.sum()) for x in embeddings], examples)
    chosen = most_informative(embeddings, size, ridge)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, {"rows": chosen.rows, "gains": chosen.gains, "looks": chosen.looks})
    return chosen


def _trained(source: Sequence[Source]) -> torch.Tensor:
    """Which tokens of an answer are trained: none is that nothing comes before."""
    return torch.tensor([i > 0 and s == Source.EXPERT for i, s in enumerate(source)])


def _check_finite(values: Sequence[float], examples: Sequence[Example]) -> None:
    wrong = [e.where for value, e in zip(values, examples, strict=True) if not torch.isfinite(torch.tensor(value))]
    if wrong:
        raise UserError(f"{wrong[0]}: the untrained model gives no finite number for the row ({len(wrong)} rows in all)")
