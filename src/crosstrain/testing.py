"""Tools for testing methods, shipped so that a method of your own can be held to the same contract.

    from crosstrain.testing import check_method
    check_method(my_method())

`check_method` trains nothing: it takes gradients of a tiny random model on made-up data of every kind and demands that no cut
into micro-batches, padding, order or layout changes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosstrain.made_up import (
    AVERAGE,
    REFERENCE,
    TEACHER,
    VOCABULARY,
    ScriptedSampler,
    made_up_batch,
    made_up_engine,
    made_up_examples,
    made_up_other,
    made_up_rewards,
    made_up_step,
    made_up_text,
    made_up_value_head,
    save_tiny_model,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
    trained_parameters,
)
from crosstrain.objective.reduce import count
from crosstrain.training.batching import cut
from crosstrain.training.gradient import NonFinite, backward
from crosstrain.training.metrics import Meter
from crosstrain.types import Batch, Method, Source

__all__ = [
    "AVERAGE",
    "CHECKS",
    "REFERENCE",
    "TEACHER",
    "VOCABULARY",
    "ScriptedSampler",
    "check_method",
    "gradient",
    "made_up_batch",
    "made_up_engine",
    "made_up_examples",
    "made_up_other",
    "made_up_rewards",
    "made_up_step",
    "made_up_text",
    "made_up_value_head",
    "save_tiny_model",
    "tiny_batch",
    "tiny_model",
    "tiny_tokenizer",
]


def gradient(
    method: Method, model: Any, batch: Batch, *, layout: str = "plain", micro_batches: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The method's gradient on all parameters of the model, and of a made-up value head, by name, from the loop's own backward.

    A method that compares distributions finds a made-up teacher, reference and average, of other random weights.
    """
    engine = made_up_engine(model, layout=layout, others=bool(method.comparisons))
    method = method.at(method.init())
    counts = count(method.terms, batch, groups=len(torch.unique(batch.group)))
    model.zero_grad(set_to_none=True)
    for index in micro_batches if micro_batches is not None else [torch.arange(len(batch))]:
        backward(engine, method, batch.rows(index), counts, Meter())
    return {name: p.grad.clone() for name, p in trained_parameters(engine).items() if p.grad is not None}


@dataclass(frozen=True)
class Case:
    """What checks look at: a method, a model, a made-up batch, and the method's gradient on the whole of it."""

    method: Method
    model: Any
    batch: Batch
    whole: dict[str, Tensor]


Check = Callable[[Case, float], None]


def check_method(method: Method, device: torch.device | str = "cpu") -> None:
    """Hold a method to the contract on a device, in fp64 (1e-8) and fp32 (1e-5); AssertionError names the check that failed.

    Any cut into micro-batches, padding, row order and packing give the same gradient; masks are respected; the gradient is
    finite and not zero; state survives JSON; unrelated rows leak nothing.
    """
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        model, check = tiny_model(dtype=dtype).to(device), CHECKS[0]
        try:
            batch = made_up_batch(method, model)
            case = Case(method, model, batch, gradient(method, model, batch))
            for check in CHECKS:
                check(case, tolerance)
        except NonFinite as error:  # the loop stops a run there; here it is a broken promise like any other
            raise AssertionError(f"{check.__name__}: {error}") from error


def gradient_is_finite_and_not_zero(case: Case, tolerance: float) -> None:
    """Every gradient is a number, and some are not 0 (a detached loss silently learns nothing)."""
    found = case.whole.values()
    assert all(bool(torch.isfinite(g).all()) for g in found), "the gradient has NaN or infinite entries"
    assert any(float(g.abs().max()) > 1e-6 for g in found), "the gradient is zero everywhere"


def any_cut_gives_the_same_gradient(case: Case, tolerance: float) -> None:
    """Micro-batches of any size."""
    batch = case.batch
    unit = "group" if any(t.unit == "group" for t in case.method.terms) else "token"
    every = ((1, False), (40, True), (90, False))
    for tokens, shared in every if tolerance < 1e-6 else every[1:2]:  # fp32 only adds rounding, which one cut shows
        pieces = cut(batch, tokens, unit, shared=shared)
        assert sorted(torch.cat(pieces).tolist()) == list(range(len(batch))), "a cut loses or repeats rows"
        found = gradient(case.method, case.model, batch, micro_batches=pieces)
        _same(case.whole, found, tolerance, f"micro-batches of {tokens} tokens")


def padding_changes_nothing(case: Case, tolerance: float) -> None:
    """More padding on the right, with any finite or NaN content in the columns."""
    _same(case.whole, gradient(case.method, case.model, _padded(case.batch, 5)), tolerance, "padding")


def order_changes_nothing(case: Case, tolerance: float) -> None:
    """Rows in another order."""
    order = torch.randperm(len(case.batch), generator=torch.Generator().manual_seed(1))
    _same(case.whole, gradient(case.method, case.model, case.batch.rows(order)), tolerance, "row order")


def packing_changes_nothing(case: Case, tolerance: float) -> None:
    """A group's shared prompt computed once, in one line with all its responses."""
    _same(case.whole, gradient(case.method, case.model, case.batch, layout="shared"), tolerance, "packing")


def masks_are_respected(case: Case, tolerance: float) -> None:
    """Terms are on trained tokens only; columns and advantages outside are never read: NaN there changes nothing."""
    batch = case.batch
    for term in case.method.terms:
        assert not bool((term.on(batch) & ~batch.trained).any()), f"term {term.name} is on tokens that are not trained"
    poisoned = replace(
        batch,
        advantage=torch.where(batch.trained, batch.advantage, torch.full_like(batch.advantage, math.nan)),
        columns={
            k: torch.where(batch.trained, c, torch.full_like(c, math.nan)) if c.shape == batch.trained.shape else c
            for k, c in batch.columns.items()
        },
    )
    _same(case.whole, gradient(case.method, case.model, poisoned), tolerance, "what lies outside the mask")


def unrelated_rows_leak_nothing(case: Case, tolerance: float) -> None:
    """Other groups in the batch only change a gradient through the counted denominators."""
    method, batch = case.method, case.batch
    counts = count(method.terms, batch, groups=len(torch.unique(batch.group)))
    groups, now = torch.unique(batch.group), method.at(method.init())
    total: dict[str, Tensor] = {}
    engine = made_up_engine(case.model, others=bool(method.comparisons))
    for g in groups:  # each group alone, its advantage made on the whole batch, under the whole batch's counts
        for p in trained_parameters(engine).values():
            p.grad = None
        alone = batch.rows(torch.nonzero(batch.group == g).flatten())
        kept = int(alone.length.max())
        backward(engine, now, _trimmed(alone, kept), counts, Meter())
        for name, p in trained_parameters(engine).items():
            if p.grad is not None:
                total[name] = total.get(name, torch.zeros_like(p)) + p.grad
    _same(case.whole, total, tolerance, "other groups")
    together = method.advantage(batch)
    for g in groups if method.credits == "group" else ():
        alone = method.advantage(batch.rows(torch.nonzero(batch.group == g).flatten()))
        assert torch.allclose(alone, together[batch.group == g], equal_nan=True), "an advantage depends on other groups"


def state_survives_saving(case: Case, tolerance: float) -> None:
    """State is JSON: what is loaded equals what was saved, and goes on the same way: the same groups are collected."""
    method = case.method
    state = method.init()
    for step in range(3):
        try:
            loaded = json.loads(json.dumps(dict(state), sort_keys=True))  # as checkpoints are written
        except TypeError as error:
            raise AssertionError(f"state {dict(state)} cannot be written as JSON: {error}") from error
        assert loaded == dict(state), f"state {dict(state)} comes back from JSON as {loaded}"
        observed = {"reward": 0.25 * step, "loss": 1.0, "step_time": 1.0, "frac_groups_dropped": 0.0}
        after = method.update(state, observed)
        assert dict(method.update(loaded, observed)) == dict(after), "update gives another state after saving and loading"
        collected, again = (made_up_step(method, one, step) for one in (after, method.update(loaded, observed)))
        # as text, where unknown numbers (NaN) are equal
        assert str(again.groups) == str(collected.groups), "other groups are collected after saving and loading"
        state = method.remember(after, collected.rewarded)
        assert dict(method.remember(after, again.rewarded)) == dict(state), "remember depends on more than state and groups"


CHECKS: tuple[Check, ...] = (
    gradient_is_finite_and_not_zero,
    masks_are_respected,
    any_cut_gives_the_same_gradient,
    padding_changes_nothing,
    order_changes_nothing,
    packing_changes_nothing,
    unrelated_rows_leak_nothing,
    state_survives_saving,
)


def _same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float, what: str) -> None:
    assert one.keys() == other.keys(), f"{what} changes which parameters have a gradient"
    for name in one:
        gap = float((one[name] - other[name]).abs().max())
        scale = max(1.0, float(one[name].abs().max()))
        assert gap <= tolerance * scale, (
            f"{what} changes the gradient of {name} by {gap:.2e} (allowed: {tolerance * scale:.0e})"
        )


def _padded(batch: Batch, extra: int) -> Batch:
    def pad(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, extra), value=value)

    return replace(
        batch,
        tokens=pad(batch.tokens, 0),
        source=pad(batch.source, int(Source.PROMPT)),
        trained=pad(batch.trained, False),
        advantage=pad(batch.advantage, math.nan),
        columns={k: pad(c, math.nan) if c.ndim == 2 else c for k, c in batch.columns.items()},
    )


def _trimmed(batch: Batch, length: int) -> Batch:
    return replace(
        batch,
        tokens=batch.tokens[:, :length],
        source=batch.source[:, :length],
        trained=batch.trained[:, :length],
        advantage=batch.advantage[:, :length],
        columns={k: c[:, :length] if c.ndim == 2 else c for k, c in batch.columns.items()},
    )
