"""Which rows tell a model most: greedy choice of informative examples, with nothing but linear algebra."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Chosen:
    """Rows in the order in which they were chosen.

    gains: what each added when it was chosen, in nats of log det; empty for rules that weigh nothing. looks: how many gains were
    worked out, of which a choice without bounds takes rows times choices.
    """

    rows: tuple[int, ...]
    gains: tuple[float, ...] = ()
    looks: int = 0


def most_informative(embeddings: Sequence[Tensor], size: int, ridge: float = 1.0) -> Chosen:
    """The `size` rows that greedily maximise the information about a last layer (FisherSFT, Deb et al. 2025, arXiv:2505.14826):

        log det(V),   V = ridge I + sum over chosen rows i and their tokens j of x_ij x_ij'

    embeddings: of each row, [M_i, D], the states that the head predicts its trained tokens from. The Hessian of the last layer's
    log-likelihood is bounded below by a constant times I (x) V, so the determinant of V bounds the information from below. A row of
    many tokens adds more than a row of few, as in the paper, whose budget is rows.

    A row's gain is log det(I + X V^-1 X'), and can only fall as V grows: an old gain is a bound, and only rows whose bound is on
    top are looked at again (lazy greedy). V^-1 is updated by Woodbury's identity, in fp64. Of equal gains the first row is taken.
    Raises ValueError when there are fewer rows than are to be chosen.
    """
    if not 0 < size <= len(embeddings):
        raise ValueError(f"{size} of {len(embeddings)} rows cannot be chosen")
    width = embeddings[0].shape[1]
    inverse = torch.eye(width, dtype=torch.float64, device=embeddings[0].device) / ridge
    bounds = [(-float("inf"), i, -1) for i in range(len(embeddings))]  # and how many rows were chosen when it was worked out
    rows: list[int] = []
    gains: list[float] = []
    looks = 0
    while len(rows) < size:
        bound, i, when = heapq.heappop(bounds)
        x = at_most_square(embeddings[i].double())
        if when < len(rows):
            heapq.heappush(bounds, (-information(x, inverse), i, len(rows)))
            looks += 1
            continue
        rows.append(i)
        gains.append(-bound)
        inverse = _with_rows(inverse, x)
    return Chosen(tuple(rows), tuple(gains), looks)


def information(x: Tensor, inverse: Tensor) -> float:
    """log det(V + x'x) - log det(V) of [M, D] rows x, from V's inverse, in nats.

    >>> information(torch.ones(1, 2).double(), torch.eye(2).double())  # log(1 + 2)
    1.0986122886681098
    """
    inner = x @ inverse @ x.T
    return float(torch.linalg.slogdet(torch.eye(len(x), dtype=x.dtype, device=x.device) + inner).logabsdet)


def any_rows(rows: int, size: int, seed: int) -> Chosen:
    """`size` of so many rows, any of them alike."""
    return Chosen(tuple(np.random.default_rng(seed).permutation(rows)[:size].tolist()))


def extreme(losses: Sequence[float], size: int, direction: Literal["highest", "lowest"]) -> Chosen:
    """The `size` rows of highest or lowest loss, the most extreme first; of equal losses the first row is taken.

    >>> extreme([1.0, 3.0, 2.0, 3.0], 3, "highest").rows
    (1, 3, 2)
    """
    sign = -1 if direction == "highest" else 1
    return Chosen(tuple(sorted(range(len(losses)), key=lambda i: (sign * losses[i], i))[:size]))


def at_most_square(x: Tensor) -> Tensor:
    """Rows with the same x'x, no more of them than columns."""
    if len(x) <= x.shape[1]:
        return x
    triangle: Tensor = torch.linalg.qr(x, mode="r").R
    return triangle


def _with_rows(inverse: Tensor, x: Tensor) -> Tensor:
    """(V + x'x)^-1 from V^-1 (Woodbury), kept symmetric."""
    seen = x @ inverse
    inner = torch.eye(len(x), dtype=x.dtype, device=x.device) + seen @ x.T
    found = inverse - seen.T @ torch.linalg.solve(inner, seen)
    return (found + found.T) / 2
