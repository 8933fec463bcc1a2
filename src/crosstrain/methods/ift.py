"""IFT: demonstrations read through what the policy would have said, each token also answering for those after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from crosstrain.methods.plans import demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import ones
from crosstrain.objective.terms import by
from crosstrain.types import Batch, Look, Method, Per, Scores, Source, Term

GREEDY = "greedy_tokens"
"""The column of the most likely tokens where the demonstration's own stand."""


@method(
    paper="arXiv:2405.11870",
    family="supervised",
    works="Its authors find it as good as SFT followed by preference optimisation, or better, without any preference pairs "
    "(arXiv:2405.11870).",
    deviates="The frozen table is that of the weights the run started with, also in a later stage; the authors use RMSprop. "
    "Where the head shares its weights with the input embeddings, training moves the table that answers are read with away from "
    "the frozen one; at the authors' learning rate of 5e-7 it hardly moves.",
)
def ift(mix: float = 0.2, gamma: float = 0.95) -> Method:
    """IFT (intuitive fine-tuning): supervised fine-tuning on inputs that lean towards the policy's own words.

    The policy reads every demonstration once, without gradient, and its most likely token is taken at each of the demonstration's
    own. The inputs are then (1 - mix) e(demonstration) + mix e(most likely) at these tokens and e(token) at all others, e the
    embedding table of the weights that the run started with.

    Loss: with l_t = -log pi(y_t) on these inputs, the mean over demonstrations of
        L = sum_t c_t l_t / sum_t c_t,    c_t = sum_{s >= t} gamma^(s - t) l_s
    so that a token counts for the loss that follows it. The weights c carry gradient, as in the authors' code. Weight on grad log
    pi: with N demonstrations, at token k of one
        [c_k + sum_{t <= k} gamma^(k - t) (l_t - L)] / (N sum_t c_t)

    mix: the authors' lambda, 0.2; 0 reads the demonstration alone. gamma: how much later losses count, 0.95 in the authors' code; 0
    weighs every token alike, so that with mix 0 this is `sft` with average "sequences" but for the frozen inputs.

    The distance s - t counts tokens of others that stand in between.
    """
    if not 0 <= mix <= 1 or not 0 <= gamma <= 1:
        raise ValueError(f"got mix={mix}, gamma={gamma}; both must be from 0 to 1")

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        loss = -scores.logp
        if gamma == 0:
            return loss / on.sum(dim=1, keepdim=True)
        follows = torch.where(on, discounted(loss, gamma), torch.zeros_like(loss))
        return follows * loss / follows.sum(dim=1, keepdim=True).clamp(min=torch.finfo(loss.dtype).tiny)

    def inputs(table: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        written = table(batch.tokens)
        if GREEDY not in batch.columns:
            return written
        own = batch.written_by(Source.EXPERT)
        said = table(batch.columns[GREEDY].nan_to_num().long())
        return torch.where(own[..., None], (1 - mix) * written + mix * said, written)

    def greedy(look: Look, batch: Batch) -> Tensor:
        return look(batch, channels={GREEDY: most_likely}).channels[GREEDY].to(torch.float32)

    term = Term(
        "demo",
        value,
        by(Source.EXPERT),
        Per(("sequences",)),
        unit="sequence",
        needs=frozenset({GREEDY}) if mix else frozenset(),
        describe="-w log pi, w from the discounted loss of later tokens, with gradient",
    )
    return Method(
        terms=(term,),
        plan=demonstrations(),
        advantage=ones,
        columns={GREEDY: greedy} if mix else {},
        inputs=inputs,
    )


def most_likely(logits: Tensor, targets: Tensor) -> Tensor:
    """The most likely token of each prediction, [M], as a number."""
    return logits.argmax(dim=-1).to(torch.float32)


def discounted(values: Tensor, gamma: float) -> Tensor:
    """[B, T]: at each token the sum of the values from it on, each further one counting gamma times as much.

    >>> discounted(torch.tensor([[1.0, 2.0, 4.0]]), 0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    n = values.shape[1]
    kernel = gamma ** torch.arange(n, dtype=values.dtype, device=values.device)
    return F.conv1d(F.pad(values[:, None], (0, n - 1)), kernel[None, None])[:, 0]
