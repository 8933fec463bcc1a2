"""SRFT: a demonstration imitated and reinforced, and own answers reinforced, weighted by entropy."""

from __future__ import annotations

import functools

from torch import Tensor

from crosstrain.methods.nft import own
from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.denominators import one
from crosstrain.objective.terms import by, surrogate
from crosstrain.types import Batch, Method, Per, Scores, Source, Term, Value


@method(
    paper="arXiv:2506.19767",
    family="hybrid",
    checked="paper",
    direction="(SFT ->) RL",
    works=(
        "With Qwen2.5-Math-7B and 46 thousand demonstrations 59.5 on five mathematics sets, where imitation followed by "
        "RL had 54.5 (its own table, arXiv:2506.19767; its abstract says 59.1)."
    ),
    fails=("Found unstable at scale, and behind imitation followed by RL with 889 thousand demonstrations (arXiv:2512.11470)."),
    deviates=(
        "From the paper's text alone. It does not say whose entropy H is, nor what the parts are divided by: here a "
        "sequence's mean, and each part's own tokens."
    ),
)
def srft(num_generations: int = 8, sft_coef: float = 0.5, positive_coef: float = 0.1) -> Method:
    """SRFT (supervised reinforcement fine-tuning): one stage with four parts, of which entropy says how much each counts.

    Loss, each part averaged over its own tokens, H a sequence's mean token entropy and both exponentials without gradient:
        demonstration     -sft_coef exp(-H) log pi
        demonstration     -A p, A normalised over the group with the demonstration in it
        right answers     -positive_coef exp(H) log pi
        wrong answers     log pi
    Weight on grad log pi: sft_coef exp(-H) / N + A p / N on the demonstration, positive_coef exp(H) / N_right on right answers,
    -1 / N_wrong on wrong ones.

    sft_coef: how much imitation counts, 0.5 in the paper. positive_coef: how much right answers count, 0.1 in the paper.

    From the paper's text: it does not say whether H is a token's or a sequence's, nor what parts are divided by; a
    re-implementation by others takes a sequence's mean, no standard deviation and p / (p + 0.1) in place of p. A right answer has
    a reward above 0. No part has a baseline but the second: others report it as unstable at scale.
    """
    if sft_coef < 0 or positive_coef < 0:
        raise ValueError(f"got sft_coef={sft_coef}, positive_coef={positive_coef}; both must be 0 or positive")
    per, entropy = Per(("own_tokens",)), frozenset({"entropy"})
    expert = by(Source.EXPERT)

    return Method(
        terms=(
            Term("demo", _by_entropy(-1.0), expert, per, sft_coef, "sequence", entropy, describe="-exp(-H) log pi"),
            surrogate("demo_rl", on=expert, per=per, denominator=one, describe="-A p"),
            Term(
                "right", _by_entropy(1.0), own(right=True), per, positive_coef, "sequence", entropy, describe="-exp(H) log pi"
            ),
            Term("wrong", _lowered, own(right=False), per, describe="log pi"),
        ),
        plan=rollouts(num_generations, with_demonstration=True),
        advantage=functools.partial(group_normalised, over=(Source.EXPERT, Source.POLICY)),
    )


def _by_entropy(sign: float) -> Value:
    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        mean = scores.channels["entropy"].detach().sum(dim=1, keepdim=True) / on.sum(dim=1, keepdim=True)
        return -(sign * mean).exp() * scores.logp

    return value


def _lowered(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
    return scores.logp
