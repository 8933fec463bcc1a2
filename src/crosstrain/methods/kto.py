"""KTO and its form without a reference point: preferences from single answers that are called good or bad."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from crosstrain.errors import UserError
from crosstrain.methods.registry import method
from crosstrain.objective.terms import by
from crosstrain.types import Batch, Look, Method, Per, Plan, Scores, Source, Term, Value

POINT = "reference_point"
"""The column with z0 of the step, [B], the same in all rows."""


@method(
    paper="arXiv:2402.01306",
    family="preference",
    works="Where there are only thumbs up or down, or far fewer good answers than bad ones: it matches or exceeds DPO from 1B "
    "to 30B there, without pairs (arXiv:2402.01306).",
    fails="Its authors find no one loss of this kind to be best everywhere; which is depends on the setting (arXiv:2402.01306).",
    deviates="The answers that z0 is measured on are paired with prompts by the order of the example ids, over the whole "
    "step; HALOs and TRL shift by one within a micro-batch, so that z0 depends on how the step was cut. Rows of the same prompt "
    "are passed over, which they do not do.",
)
def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Method:
    """KTO (Kahneman-Tversky optimisation): raise answers called good and lower bad ones, each by itself, against a reference point.

    The reference point z0 = max(0, mean of d over answers set after the prompt of another row), with d = sum_t log pi(y_t) - log
    ref(y_t) and without gradient, is an estimate of KL(pi || ref), measured once per step over all its rows.

    Loss, mean over answers:
        good (label true)     desirable_weight (1 - sigmoid(beta (d - z0)))
        bad (label false)     undesirable_weight (1 - sigmoid(beta (z0 - d)))
    Weight on grad log pi: +-w beta s (1 - s) / N on every token of an answer, s the sigmoid, w the weight of its kind and N the
    answers.

    beta: how much a log-prob may move from the reference, 0.1 in TRL. desirable_weight, undesirable_weight: how much good and bad
    answers count, 1 in TRL, whose manual advises desirable_weight n_good / (undesirable_weight n_bad) between 1 and 4/3.

    The reference is the model the stage started from. A step needs at least two different prompts.
    """
    return _unpaired("kto", beta, desirable_weight, undesirable_weight, point=True)


@method(
    paper="arXiv:2408.06266",
    family="preference",
    checked="port",
    works="Where the good answers are better than what the model says by itself (arXiv:2408.06266, as TRL documents it).",
    fails="Without the reference point KTO usually does worse: its authors keep this form to show what the point is for "
    "(HALOs, the code of arXiv:2402.01306).",
)
def apo_zero_unpaired(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Method:
    """APO-zero for single answers: KTO with its reference point at 0.

    Loss, mean over answers, d = sum_t log pi(y_t) - log ref(y_t):
        good (label true)     desirable_weight (1 - sigmoid(beta d))
        bad (label false)     undesirable_weight sigmoid(beta d)
    Weight on grad log pi: +-w beta s (1 - s) / N on every token of an answer, s = sigmoid(beta d), w the weight of its kind and N
    the answers.

    beta: how much a log-prob may move from the reference, 0.1 in TRL. desirable_weight, undesirable_weight: how much good and bad
    answers count, 1 in TRL.

    It is TRL's `loss_type="apo_zero_unpaired"`, and needs no second pass and no other row of the step. The reference is the model
    the stage started from.
    """
    return _unpaired("apo", beta, desirable_weight, undesirable_weight, point=False)


def _unpaired(name: str, beta: float, desirable_weight: float, undesirable_weight: float, *, point: bool) -> Method:
    for key, value in (("beta", beta), ("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if value <= 0:
            raise ValueError(f"{key}: got {value}; it must be positive")
    term = Term(
        name,
        _utility(beta, desirable_weight, undesirable_weight, point),
        by(Source.EXPERT),
        Per(("sequences",)),
        unit="sequence",
        needs=frozenset({"ref_logp", POINT} if point else {"ref_logp"}),
        describe=f"w (1 - sigmoid(+-{beta:g} {'(d - z0)' if point else 'd'})), d = sum of log pi - log ref",
    )
    return Method(
        terms=(term,),
        plan=Plan(needs_expert="label"),
        reference="stage_start",
        columns={POINT: reference_point} if point else {},
    )


def _utility(beta: float, desirable_weight: float, undesirable_weight: float, point: bool) -> Value:
    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        moved = (scores.logp - batch.columns["ref_logp"]).sum(dim=1)
        gain = beta * (moved - batch.columns[POINT].to(moved)) if point else beta * moved
        good = batch.reward > 0
        # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where it is small
        return torch.where(good, desirable_weight * F.sigmoid(-gain), undesirable_weight * F.sigmoid(gain))

    return value


def reference_point(look: Look, batch: Batch) -> Tensor:
    """[B]: max(0, mean of d over the answers of `mismatched`), the same in every row."""
    other = mismatched(batch)
    moved = (look(other).logp - look(other, of="reference").logp).sum(dim=1)  # both are 0 where nothing is trained
    # in fp64 and in the order of ids, so that no order of rows shows in the last digit
    mean = float(moved.double().cpu().mean())
    return torch.full_like(batch.reward, max(mean, 0.0))


def mismatched(batch: Batch) -> Batch:
    """One row for each of the batch's: its prompt, followed by the answer of the nearest row before it, in the order of example ids
    and from the first back to the last, whose prompt is another. UserError when there is one prompt only.

    >>> from crosstrain.types import Example, Group, Trajectory
    >>> from crosstrain.training.batching import to_batch
    >>> def row(i, prompt, answer):
    ...     source = (Source.PROMPT,) * len(prompt) + (Source.EXPERT,) * len(answer)
    ...     return Group(Example(f"train:{i}", "", prompt), (Trajectory(prompt + answer, source, reward=1.0),))
    >>> mismatched(to_batch([row(0, (1, 2), (3,)), row(1, (4,), (5, 6)), row(2, (4,), (7,))])).tokens.tolist()
    [[1, 2, 7], [4, 3, 0], [4, 3, 0]]
    """
    lengths = batch.length.tolist()
    tokens = [row[:n] for row, n in zip(batch.tokens.tolist(), lengths, strict=True)]
    source = [row[:n] for row, n in zip(batch.source.tolist(), lengths, strict=True)]
    starts = [next((i for i, s in enumerate(row) if s != Source.PROMPT), len(row)) for row in source]
    prompts = [row[:start] for row, start in zip(tokens, starts, strict=True)]
    order = sorted(range(len(batch)), key=lambda r: (batch.example_ids[r], tokens[r]))
    made: list[tuple[list[int], list[int]]] = []
    for at, r in enumerate(order):
        before = (order[(at - back) % len(order)] for back in range(1, len(order)))
        other = next((s for s in before if prompts[s] != prompts[r]), None)
        if other is None:
            raise UserError(
                f"kto: all {len(order)} rows of a step have the same prompt, first {batch.example_ids[r]}; its reference "
                f"point takes answers to other prompts: raise batch_size, or use apo_zero_unpaired"
            )
        made.append(
            (prompts[r] + tokens[other][starts[other] :], source[r][: starts[r]] + source[other][starts[other] :]),
        )
    width = max(len(row) for row, _ in made)

    def rectangle(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=batch.tokens.device)

    told = rectangle([s for _, s in made], int(Source.PROMPT))
    trained = told != int(Source.PROMPT)
    trained[:, 0] = False
    unknown = torch.full(told.shape, torch.nan, dtype=batch.advantage.dtype, device=told.device)
    index = torch.tensor(order, device=told.device)
    return replace(
        batch,
        tokens=rectangle([t for t, _ in made], 0),
        source=told,
        trained=trained,
        group=torch.arange(len(order), device=told.device),
        rank=torch.zeros_like(batch.rank),
        reward=batch.reward[index],
        advantage=unknown,
        columns={},
        example_ids=tuple(batch.example_ids[r] for r in order),
        prompt_length=torch.tensor([starts[r] for r in order], device=told.device),
        length=torch.tensor([len(t) for t, _ in made], device=told.device),
    )
