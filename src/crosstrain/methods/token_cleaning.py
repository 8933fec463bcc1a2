"""Token cleaning: supervised fine-tuning on the tokens that training has something to gain from."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from crosstrain.methods.plans import demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.terms import nll
from crosstrain.types import Batch, Look, Method, Per, Source

KEPT = "kept"
"""The column that says which tokens are trained on: 1, else 0."""


@method(
    paper="arXiv:2502.01968",
    family="supervised",
    works="Its authors report consistent gains over training on all tokens of 50,000 instruction rows (arXiv:2502.01968).",
    deviates="The authors rank all tokens of a data set once per round, and with the fixed variant train the base model anew; here "
    "the tokens of a step are ranked (scope) with the policy as it is, so that the reference model evolves with every step. "
    "At least one token is kept, of a step or of each demonstration, and all that equal the last one kept; the authors keep "
    "int(share N) of N, which may be none, and of equal ones the first.",
)
def token_cleaning(share: float = 0.6, scope: Literal["step", "sequence"] = "step") -> Method:
    """Token cleaning, self-evolving: only demonstration tokens that training has made likelier are trained on.

    A token's score is its loss under the base model less its loss under the current policy, log pi - log base, before the step's
    updates. Kept are the `share` of tokens with the highest scores, and what equals the lowest score among these.

    Loss: -log pi averaged over the kept tokens. Weight on grad log pi: 1 / N_kept on kept tokens, 0 on others.

    share: the share of the tokens that is kept. scope: of which tokens it is taken: of all supervised tokens of the step ("step"),
    or of each demonstration's ("sequence"); the authors' "global" and "sample".

    The base is the model that the run started from: a stage of `sft` on a part of the data comes first, as the authors' warm-up.
    Without one all scores are equal at first, and the first step is that of `sft`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}; it must be in (0, 1]")
    if scope not in ("step", "sequence"):
        raise ValueError(f"scope: got {scope!r}; allowed: step, sequence")

    def choose(look: Look, batch: Batch) -> Tensor:
        on = batch.written_by(Source.EXPERT)
        score = look(batch).logp - batch.columns["ref_logp"]
        return highest(score, on, share, each_row=scope == "sequence").to(batch.reward.dtype)

    def kept(batch: Batch) -> Tensor:
        return batch.columns[KEPT] > 0 if KEPT in batch.columns else batch.written_by(Source.EXPERT)

    term = replace(
        nll("demo", on=kept, per=Per(("own_tokens",)), describe="-log pi on kept tokens"), needs=frozenset({"ref_logp", KEPT})
    )
    return Method(terms=(term,), plan=demonstrations(), advantage=ones, columns={KEPT: choose})


def highest(score: Tensor, on: Tensor, share: float, *, each_row: bool) -> Tensor:
    """[B, T] bool: the `share` of the tokens of `on` (rounded down, at least one) with the highest score, and all that equal the
    lowest of these; of each row by itself with `each_row`.

    >>> score, on = torch.tensor([[5.0, 1.0, 3.0, 3.0]]), torch.tensor([[False, True, True, True]])
    >>> highest(score, on, 0.5, each_row=False).int().tolist()
    [[0, 0, 1, 1]]
    """
    rows = range(len(score)) if each_row else [slice(None)]
    chosen = torch.zeros_like(on)
    for row in rows:
        values = score[row][on[row]]
        if len(values):
            bar = values.sort(descending=True).values[max(int(share * len(values)), 1) - 1]
            chosen[row] = on[row] & (score[row] >= bar)
    return chosen
