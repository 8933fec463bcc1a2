"""Preference optimisation without a reference model: SimPO, CPO, ORPO."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from crosstrain.methods.plans import preference_pairs
from crosstrain.methods.registry import method
from crosstrain.objective.terms import best_by, by, nll, pairwise, seq_mean, token_sum
from crosstrain.types import Batch, Example, Method, Per, Source, State, Trajectory


@method(
    paper="arXiv:2405.14734",
    family="preference",
    deviates="gamma is the margin itself, as in the paper; the authors' code sets its ratio to beta.",
)
def simpo(beta: float = 2.0, gamma: float = 1.0) -> Method:
    """SimPO: mean log-probs in place of a reference, and a margin.

    Loss: mean over pairs of -log sigmoid(beta (l_chosen - l_rejected) - gamma), l the mean over an answer's tokens of log pi.
    Weight on grad log pi: +- beta sigmoid(gamma - beta (l_chosen - l_rejected)) / (T N_pairs) on the tokens of an answer.

    beta: the scale of the difference; 2 to 2.5 in the paper, 10 in its authors' later runs. gamma: 0.3 to 0.5 of beta in the paper;
    it is the margin itself, as in the paper, and not its ratio to beta.
    """
    _positive(beta=beta)
    if gamma < 0:
        raise ValueError(f"gamma: got {gamma}; it must be 0 or positive")

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(beta * (chosen - rejected) - gamma)

    term = pairwise(
        "simpo",
        loss,
        on=by(Source.EXPERT),
        reference=False,
        average=True,
        describe=f"-log sigmoid({beta:g} (l_chosen - l_rejected) - {gamma:g}), l = mean of log pi",
    )
    return Method(terms=(term,), plan=preference_pairs())


@method(paper="arXiv:2401.08417", family="preference")
def cpo(beta: float = 0.1, nll_coef: float = 1.0) -> Method:
    """CPO: DPO with a uniform reference, and the chosen answer's likelihood.

    Loss: mean over pairs of -log sigmoid(beta (s_chosen - s_rejected)), s the sum over an answer's tokens of log pi, plus nll_coef
    times the mean over all tokens of chosen answers of -log pi. Weight on grad log pi: +- beta sigmoid(-beta (s_chosen -
    s_rejected)) / N_pairs, and nll_coef / N_chosen_tokens on chosen tokens.

    beta: the scale of the difference, 0.1 in the authors' code. nll_coef: how much imitation of chosen answers counts, 1 in the
    authors' code.
    """
    _positive(beta=beta)
    if nll_coef < 0:
        raise ValueError(f"nll_coef: got {nll_coef}; it must be 0 or positive")

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(beta * (chosen - rejected))

    terms = [
        pairwise(
            "cpo",
            loss,
            on=by(Source.EXPERT),
            reference=False,
            describe=f"-log sigmoid({beta:g} (s_chosen - s_rejected)), s = sum of log pi",
        )
    ]
    if nll_coef > 0:
        terms.append(
            nll("chosen", on=best_by(Source.EXPERT), per=Per(("own_tokens",)), normalise=token_sum, coef=nll_coef, unit="group")
        )
    return Method(terms=tuple(terms), plan=preference_pairs())


@method(
    paper="arXiv:2403.07691",
    family="preference",
    deviates="The likelihood is a mean over each chosen answer and then over pairs; the authors' code and TRL take a mean "
    "over all tokens of a micro-batch.",
)
def orpo(beta: float = 0.1, prompt_nll: bool = False) -> Method:
    """ORPO: imitate the chosen answer, and raise its odds against the rejected one's, in one loss.

    Loss: mean over pairs of -l_chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), l the mean over an answer's tokens
    of log pi and odds = e^l / (1 - e^l). Weight on grad log pi, chosen: (1 + beta s / (1 - e^l)) / (T N_pairs); rejected:
    -beta s / ((1 - e^l) T N_pairs), with s = sigmoid(-log odds ratio).

    beta: how much the odds count, the paper's lambda (TRL's name). prompt_nll: True: the likelihood is that of the prompt and the
    chosen answer, with T the tokens of both, as in TRL and in the authors' code unless it is told `--disable_prompt_loss`; the odds
    are those of the answers either way.
    """
    _positive(beta=beta)
    compared = answers if prompt_nll else by(Source.EXPERT)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    return Method(
        terms=(
            nll("chosen", on=best_by(Source.EXPERT), per=Per(("pairs",)), normalise=seq_mean, unit="group"),
            pairwise(
                "odds",
                loss,
                on=compared,
                reference=False,
                average=True,
                coef=beta,
                describe="-log sigmoid(log odds(chosen) - log odds(rejected)), odds = e^l / (1 - e^l), l = mean of log pi",
            ),
        ),
        plan=replace(preference_pairs(), start=with_its_prompt) if prompt_nll else preference_pairs(),
    )


def with_its_prompt(example: Example, state: State) -> tuple[Trajectory, ...]:
    """The row's answers, the prompt before the better one being an expert's too, but for its first token: nothing predicts it."""
    best = max(example.expert, key=lambda t: -math.inf if t.reward is None else t.reward)

    def imitated(t: Trajectory) -> Trajectory:
        return replace(
            t, source=(*t.source[:1], *(Source.EXPERT for _ in t.source[1 : t.response_start]), *t.source[t.response_start :])
        )

    return tuple(imitated(t) if t is best else t for t in example.expert)


def answers(batch: Batch) -> Tensor:
    """What an expert wrote after the prompt, which ends in each group where it does in the row that has it untrained."""
    first = (batch.source != int(Source.PROMPT)).int().argmax(dim=1)
    index = torch.unique(batch.group, return_inverse=True)[1]
    start = torch.zeros_like(first).scatter_reduce(0, index, first, "amax")[index]
    place = torch.arange(batch.source.shape[1], device=batch.source.device)
    return batch.written_by(Source.EXPERT) & (place[None, :] >= start[:, None])


def _log_odds(mean: Tensor) -> Tensor:
    """log(e^l / (1 - e^l)) of l < 0, [P]."""
    return mean - torch.log(-torch.expm1(mean))


def _positive(**settings: float) -> None:
    for name, value in settings.items():
        if value <= 0:
            raise ValueError(f"{name}: got {value}; it must be positive")
