"""Direct preference optimisation and what keeps its reference: prefer the chosen answer to the rejected one."""

from __future__ import annotations

from torch import Tensor

from crosstrain.methods.plans import preference_pairs
from crosstrain.methods.registry import method
from crosstrain.objective.terms import best_by, by, nll, pairwise, pairwise_logistic, seq_mean
from crosstrain.types import Method, Per, Source


@method(
    paper="arXiv:2305.18290",
    family="preference",
    fails=(
        "The probability of chosen answers often falls together with that of rejected ones, which a likelihood term "
        "beside it counters (arXiv:2404.19733)."
    ),
    deviates="The authors' learning rates are for RMSprop; here AdamW steps.",
)
def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """Direct preference optimisation.

    Loss: mean over pairs of -log sigmoid(beta (d_chosen - d_rejected)), d = sum_t log pi(y_t) - log ref(y_t).
    Weight on grad log pi: +- beta sigmoid(-beta (d_chosen - d_rejected)) / N_pairs on every token of the answer.

    beta: how much a log-prob may move from the reference, 0.1 in the paper. label_smoothing: e in [0, 0.5), the share of pairs
    that are taken to be the wrong way round (conservative DPO; TRL's setting of that name belongs to its loss `robust`, another
    formula).

    The reference is the model the stage started from.
    """
    _check(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}; it must be in [0, 0.5)")
    term = pairwise_logistic("dpo", beta=beta, label_smoothing=label_smoothing, on=by(Source.EXPERT))
    return Method(terms=(term,), plan=preference_pairs(), reference="stage_start")


@method(
    paper="arXiv:2305.18290",
    family="preference",
    checked="port",
    deviates="Described by DPO's first author in a note without an arXiv number; the paper given is DPO's.",
)
def cdpo(beta: float = 0.1, label_smoothing: float = 0.1) -> Method:
    """Conservative DPO: DPO for labels of which a share is wrong.

    Loss: mean over pairs of -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), D = d_chosen - d_rejected, d = sum_t log pi(y_t)
    - log ref(y_t), e = label_smoothing. Weight on grad log pi: +- beta (sigmoid(-beta D) - e) / N_pairs on every token of the
    answer; 0 where sigmoid(beta D) = 1 - e, and pulling back beyond.

    beta: how much a log-prob may move from the reference, as for `dpo`. label_smoothing: the share of pairs that are taken to be
    the wrong way round, above 0 and below 0.5; 0.1 is a choice.
    """
    if label_smoothing <= 0:
        raise ValueError(f"label_smoothing: got {label_smoothing}; it must be positive (0 is `dpo`)")
    return dpo(beta=beta, label_smoothing=label_smoothing)


@method(
    paper="arXiv:2404.19733",
    family="preference",
    checked="paper",
    works=(
        "Keeps the chosen answers' probability from falling in iterated preference optimisation of reasoning "
        "(arXiv:2404.19733)."
    ),
    deviates=(
        "The likelihood is a mean over each chosen answer and then over pairs, as in the paper; TRL (rpo_alpha, later the loss "
        "`sft`) takes one mean over all chosen tokens of a micro-batch, as `cpo` does over those of the step."
    ),
)
def dpo_nll(beta: float = 0.1, nll_coef: float = 1.0) -> Method:
    """DPO with the chosen answer's likelihood beside it (iterative reasoning preference optimisation, RPO).

    Loss: mean over pairs of the `dpo` loss and nll_coef times the mean over the chosen answer's tokens of -log pi. Weight: DPO's,
    and nll_coef / (T_chosen N_pairs) on the tokens of the chosen answer, whose probability DPO alone often lets fall.

    beta: as for `dpo`. nll_coef: the paper's alpha, 1.
    """
    _check(beta)
    if nll_coef <= 0:
        raise ValueError(f"nll_coef: got {nll_coef}; it must be positive (0 is `dpo`)")
    return Method(
        terms=(
            pairwise_logistic("dpo", beta=beta, on=by(Source.EXPERT)),
            nll("chosen", on=best_by(Source.EXPERT), per=Per(("pairs",)), normalise=seq_mean, coef=nll_coef, unit="group"),
        ),
        plan=preference_pairs(),
        reference="stage_start",
    )


@method(
    paper="arXiv:2310.12036",
    family="preference",
    checked="port",
    deviates=(
        "Log-probs are summed, as in the paper; TRL takes their mean, which is the setting `average`. A tau found with "
        "one is of no use with the other."
    ),
)
def ipo(tau: float = 0.1, average: bool = False) -> Method:
    """IPO: a margin that is to be 1 / (2 tau), and no larger.

    Loss: mean over pairs of (d_chosen - d_rejected - 1 / (2 tau))^2, d = sum_t log pi(y_t) - log ref(y_t). Weight on grad log pi:
    -+ 2 (d_chosen - d_rejected - 1 / (2 tau)) / N_pairs on every token of the answer.

    tau: 0.1 as in HALOs. average: d is a mean over tokens instead of the paper's sum, as in TRL (whose `beta` is tau): a tau
    found with one is of no use with the other.
    """
    if tau <= 0:
        raise ValueError(f"tau: got {tau}; it must be positive")

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected - 1 / (2 * tau)) ** 2

    what = "mean" if average else "sum"
    term = pairwise(
        "ipo",
        loss,
        on=by(Source.EXPERT),
        average=average,
        describe=f"(d_chosen - d_rejected - {1 / (2 * tau):g})^2, d = {what} of log pi - log ref",
    )
    return Method(terms=(term,), plan=preference_pairs(), reference="stage_start")


@method(paper="arXiv:2310.12036", family="preference", checked="port")
def ipo_mean(tau: float = 0.1) -> Method:
    """IPO with means over tokens in place of sums, as TRL has it.

    Loss: mean over pairs of (d_chosen - d_rejected - 1 / (2 tau))^2, d = mean_t log pi(y_t) - log ref(y_t). Weight on grad log pi:
    -+ 2 (d_chosen - d_rejected - 1 / (2 tau)) / (T N_pairs) on every token of an answer of T tokens.

    tau: the margin is to be 1 / (2 tau); 0.1 as for `ipo`, whose other values are of no use here (TRL calls it `beta`).
    """
    return ipo(tau=tau, average=True)


def _check(beta: float) -> None:
    if beta <= 0:
        raise ValueError(f"beta: got {beta}; it must be positive")
