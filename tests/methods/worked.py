"""Objectives without a model: a [B, T] tensor of log-probs is the whole policy.

`prepared` builds the batch that the loop would hand to a method; `weights_of` returns the loss and minus its gradient on the
log-probs, which is the weight of every token; `papers` hands the same numbers to a second implementation as plain lists.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosstrain.objective.reduce import count, term_loss
from crosstrain.training.batching import to_batch, with_advantage
from crosstrain.types import Batch, Example, Group, Method, Scores, Source, Trajectory

LETTERS = {"P": Source.PROMPT, "E": Source.EXPERT, "O": Source.POLICY, "T": Source.TOOL}
NEVER_READ = 99.0


def answer(letters: str, reward: float | None = None, *, finished: bool = True) -> Trajectory:
    """A trajectory of one prompt token and then one token per letter: E expert, O own, T tool, P further prompt."""
    source = (Source.PROMPT, *(LETTERS[x] for x in letters))
    return Trajectory(tuple(range(1, len(source) + 1)), source, reward=reward, finished=finished)


def group(*answers: Trajectory, name: str = "a") -> Group:
    """A group whose example is called `name`."""
    return Group(Example(f"train:{name}", "", (1,)), answers)


def selected(method: Method, groups: Sequence[Group]) -> list[Group]:
    """The groups as the method keeps them."""
    kept = (method.select(g, method.init()) for g in groups)
    return [g for g in kept if g is not None]


def prepared(method: Method, groups: Sequence[Group], *, mask_truncated: bool = False, **columns: Tensor) -> Batch:
    """The batch of the selected groups in fp64 with its advantage; `columns` are [B, T - 1], without the prompt token."""
    batch = to_batch(selected(method, groups), mask_truncated=mask_truncated)
    batch = replace(batch, reward=batch.reward.double(), columns={k: c.double() for k, c in batch.columns.items()})
    batch = batch.with_columns(**{name: rectangle(values, batch) for name, values in columns.items()})
    return with_advantage(batch, method.advantage(batch))


def rectangle(values: Tensor, batch: Batch, outside: float = math.nan) -> Tensor:
    """[B, T - 1] numbers as a [B, T] column that is `outside` wherever nothing is trained."""
    padded = torch.nn.functional.pad(values.double(), (1, 0), value=outside)
    return torch.where(batch.trained, padded, torch.full_like(padded, outside))


@dataclass(frozen=True)
class Outcome:
    """What an objective makes of log-probs: loss, the loss that is logged, and the weight of every token, [B, T - 1]."""

    loss: float
    logged: float
    weights: Tensor


def weights_of(method: Method, batch: Batch, logp: Tensor, *, cut: Sequence[Sequence[int]] | None = None) -> Outcome:
    """The objective on log-probs [B, T - 1], added up over the micro-batches of `cut`; counts are the whole batch's."""
    leaf = rectangle(logp, batch, NEVER_READ).requires_grad_()
    counts = count(method.terms, batch, groups=len(torch.unique(batch.group)))
    total, logged = torch.zeros((), dtype=torch.float64), 0.0
    for rows in cut if cut is not None else [range(len(batch))]:
        index = torch.tensor(list(rows))
        for term in method.terms:
            part = term_loss(term, Scores(leaf[index]), batch.rows(index), counts)
            if part is not None:
                total, logged = total + part.loss, logged + part.logged
    gradient = torch.zeros_like(leaf)
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, leaf)
    return Outcome(float(total.detach()), logged, -gradient[:, 1:])


@dataclass(frozen=True)
class Line:
    """One sequence as a paper writes it: its log-probs (with gradient), old and reference log-probs, reward and author."""

    logp: list[Tensor]
    old: list[float]
    ref: list[float]
    reward: float
    expert: bool

    def __len__(self) -> int:
        return len(self.logp)


Paper = Callable[[list[list[Line]]], Tensor]
"""A loss written as loops over groups, sequences and tokens."""


def gradient_of(paper: Paper, batch: Batch, logp: Tensor) -> tuple[float, Tensor]:
    """A paper's loss and minus its gradient on the log-probs, [B, T - 1]."""
    leaf = logp.double().clone().requires_grad_()
    groups: dict[int, list[Line]] = {}
    for r in range(len(batch)):
        at = [t for t in range(1, int(batch.length[r])) if bool(batch.trained[r, t])]
        column = {k: [float(c[r, t]) for t in at] for k, c in batch.columns.items() if c.ndim == 2}
        now = [leaf[r, t - 1] for t in at]
        old = column.get("old_logp", [float(x.detach()) for x in now])
        line = Line(now, old, column.get("ref_logp", []), float(batch.reward[r]), bool((batch.source[r] == 1).any()))
        groups.setdefault(int(batch.group[r]), []).append(line)
    loss = paper(list(groups.values()))
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return float(loss.detach()), -torch.zeros_like(leaf) if gradient is None else -gradient


def random_groups(seed: int, *, own: int = 0, demonstration: bool = False, pair: bool = False, n: int = 4) -> list[Group]:
    """`n` groups of answers of random length: own ones with rewards 0, 1 or a half, a demonstration, or a pair."""
    rng = random.Random(seed)

    def text(letter: str) -> str:
        return letter * rng.randint(1, 5)

    groups = []
    for i in range(n):
        answers = [answer(text("E"), 1.0)] if demonstration else []
        answers += [answer(text("E"), 1.0), answer(text("E"), 0.0)] if pair else []
        answers += [answer(text("O"), rng.choice((0.0, 0.5, 1.0))) for _ in range(own)]
        groups.append(group(*answers, name=str(i)))
    return groups


def random_logps(method: Method, groups: Sequence[Group], seed: int, spread: float = 0.5) -> tuple[Tensor, Batch]:
    """Log-probs for the groups, [B, T - 1], and their batch with old and reference columns `spread` away from them."""
    generator = torch.Generator().manual_seed(seed)
    shape = to_batch(selected(method, groups)).tokens[:, 1:].shape
    logp = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    near = {n: logp + spread * torch.randn(shape, generator=generator, dtype=torch.float64) for n in ("old_logp", "ref_logp")}
    return logp, prepared(method, groups, **{n: c for n, c in near.items() if n in method.needs})


def agrees(method: Method, paper: Paper, groups: Sequence[Group], seed: int, *, logged: bool = True) -> None:
    """Assert that the method has the paper's gradient, and logs the paper's loss, on random log-probs."""
    logp, batch = random_logps(method, groups, seed)
    ours = weights_of(method, batch, logp)
    loss, weights = gradient_of(paper, batch, logp)
    torch.testing.assert_close(ours.weights, weights, rtol=0, atol=1e-10)
    assert not logged or math.isclose(ours.logged, loss, rel_tol=1e-10, abs_tol=1e-12)
