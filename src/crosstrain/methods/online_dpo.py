"""Preference pairs that are made in training: online DPO, from own answers and their rewards, and SPIN, from demonstrations and own
answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from crosstrain.methods.checks import several
from crosstrain.methods.plans import rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.terms import by, pairwise, pairwise_logistic
from crosstrain.types import Decode, Group, Method, Plan, Request, Source, State, Term, Trajectory, Updates


@method(
    paper="arXiv:2402.04792",
    family="preference",
    checked="port",
    works="People prefer it to offline DPO, IPO and SLiC and to RLHF, with a language model as judge; what a judge is told "
    "steers it (arXiv:2402.04792).",
    deviates="The judge is the recipe's reward. TRL keeps pairs of equal rewards, the first answer counting as the better "
    "one; here they are dropped.",
)
def online_dpo(
    num_generations: int = 2, beta: float = 0.1, loss_type: Literal["sigmoid", "ipo"] = "sigmoid", dynamic_sampling: int = 1
) -> Method:
    """Online DPO: sample answers, let the reward say which is better, and prefer that one.

    Of `num_generations` answers to each prompt the best and the worst are a pair; a group whose rewards are all equal has none and
    is dropped.

    Loss, mean over pairs, D = d_best - d_worst, d = sum_t log pi(y_t) - log ref(y_t):
        sigmoid    -log sigmoid(beta D)
        ipo        (D - 1 / (2 beta))^2
    Weight on grad log pi: DPO's, +- beta sigmoid(-beta D) / N_pairs, or IPO's, -+ 2 (D - 1 / (2 beta)) / N_pairs, on every token of
    an answer.

    num_generations: answers to a prompt, 2 in TRL. beta: how much a log-prob may move from the reference, 0.1 in TRL; with "ipo"
    the margin is to be 1 / (2 beta). loss_type: "sigmoid" (`dpo`, TRL's default) or "ipo" (`ipo`). dynamic_sampling: up to that
    many draws per step to replace groups without a pair; 1, for none, as in TRL.

    The reference is the model the stage started from. TRL samples at temperature 0.9 (`sampling.temperature`) and trains at 1; its
    missing_eos_penalty is `sampling: {truncated: penalise, truncation_penalty: ...}`.
    """
    several(num_generations, "a pair has two answers")
    if beta <= 0:
        raise ValueError(f"beta: got {beta}; it must be positive")
    if loss_type not in ("sigmoid", "ipo"):
        raise ValueError(f"loss_type: got {loss_type!r}; allowed: sigmoid, ipo")
    if dynamic_sampling < 1:
        raise ValueError(f"dynamic_sampling: got {dynamic_sampling}; it must be at least 1")
    return Method(
        terms=(_loss(beta, loss_type),),
        plan=rollouts(num_generations, max_draws=dynamic_sampling),
        select=best_and_worst,
        reference="stage_start",
        temperature=1.0,
    )


def _loss(beta: float, loss_type: str) -> Term:
    if loss_type == "sigmoid":
        return pairwise_logistic("dpo", beta=beta, on=by(Source.POLICY))

    def squared(best: Tensor, worst: Tensor) -> Tensor:
        return (best - worst - 1 / (2 * beta)) ** 2

    what = f"(d_best - d_worst - {1 / (2 * beta):g})^2, d = sum of log pi - log ref"
    return pairwise("ipo", squared, on=by(Source.POLICY), describe=what)


def best_and_worst(group: Group, state: State) -> Group | None:
    """The first answers of the highest and of the lowest reward; None where the two are equal."""
    known = [t for t in group.by(Source.POLICY) if t.reward is not None]
    if not known:
        return None
    best, worst = max(known, key=_reward), min(known, key=_reward)
    return replace(group, trajectories=(best, worst)) if _reward(best) > _reward(worst) else None


def _reward(t: Trajectory) -> float:
    assert t.reward is not None
    return t.reward


@method(
    paper="arXiv:2401.01335",
    family="preference",
    works="Turns demonstrations alone into further gains after SFT, in the paper more than DPO on a judge's preferences does "
    "(arXiv:2401.01335).",
    fails="It stops where own answers cannot be told from the demonstrations, and can get no better than these (arXiv:2401.01335).",
    deviates="An iteration is a step, and its moments go on to the next in the same stage; the authors train each iteration "
    "anew. Their optimizer is RMSprop, so that their learning rates (5e-7, then 1e-7) do not carry over.",
)
def spin(beta: float = 0.1, epochs: int = 3, minibatches: int = 1) -> Method:
    """SPIN (self-play fine-tuning): prefer the demonstration to what the model itself said before.

    A step is an iteration: the model answers every prompt of the step once, and `epochs` times `minibatches` updates follow, in
    which the demonstration is preferred to that answer. No reward is needed.

    Loss: mean over pairs of -log sigmoid(beta (d_demonstration - d_own)), d = sum_t log pi(y_t) - log opponent(y_t), the opponent
    and reference being the model at the start of the step. Weight on grad log pi: +- beta sigmoid(-beta (d_demonstration - d_own))
    / N_pairs on every token of the answer.

    beta: how much a log-prob may move from the opponent's, 0.1 in the authors' scripts, but 5 in their third iteration. epochs:
    passes over the pairs of an iteration, 3 in the authors' scripts, later 6. minibatches: optimizer steps per pass, batch_size
    over 64 with the authors' mini-batch.

    In a recipe `batch_size` is the number of prompts of an iteration (all rows, in the paper) and `max_steps` that of iterations.
    To give an iteration settings of its own, or fresh moments, write a stage for each, with `max_steps: 1`: `stages: [{method:
    spin, max_steps: 1, ...}, {method: {spin: {beta: 5.0}}, max_steps: 1, ...}]`.
    """
    if beta <= 0:
        raise ValueError(f"beta: got {beta}; it must be positive")

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if group.by(Source.POLICY) else (Request(1),)

    return Method(
        terms=(pairwise_logistic("spin", beta=beta, on=by(Source.EXPERT, Source.POLICY)),),
        plan=Plan(next=following, samples=True, reward=worse_than_the_demonstration, needs_expert="demonstration"),
        updates=Updates(epochs, minibatches),
        reference="previous",
        temperature=1.0,
    )


def worse_than_the_demonstration(group: Group, answer: Trajectory, decode: Decode) -> float:
    """0 for every own answer; a demonstration beside own answers has reward 1."""
    return 0.0
