"""Learning from a teacher model: GKD, and on-policy distillation with the teacher's log-probs as the credit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from crosstrain.methods.plans import keyed_uniforms, rollouts
from crosstrain.methods.registry import method
from crosstrain.objective.denominators import old
from crosstrain.objective.divergences import generalised_jsd, reverse_kl
from crosstrain.objective.terms import by, of_channel
from crosstrain.types import (
    Batch,
    Comparison,
    Example,
    Group,
    Method,
    Per,
    Plan,
    Request,
    Scores,
    Source,
    State,
    Term,
    Trajectory,
    Updates,
)


@method(
    paper="arXiv:2306.13649",
    family="distillation",
    checked="port",
    works="On own completions a small student gets closer to its teacher than on fixed ones (arXiv:2306.13649).",
    deviates="Whether an example is answered by the student is drawn for each example, in the paper and in TRL for a whole batch.",
)
def gkd(beta: float = 0.5, lmbda: float = 0.5, temperature: float = 1.0, seq_kd: bool = False) -> Method:
    """GKD (generalised knowledge distillation): the teacher's next-token distribution as the target, on the student's own answers.

    Loss: D(q, pi) over the whole vocabulary at every token of the answers, q the teacher, averaged over all of the step's tokens,
    with the generalised Jensen-Shannon divergence
        D = beta KL(q || m) + (1 - beta) KL(pi || m),    m = beta q + (1 - beta) pi
    Answers carry no gradient: whoever wrote them, they are only where the two are compared. Weight on grad log pi: none, as the
    gradient is on all logits; with beta 0 and temperature 1 it is (pi - q) / N.

    beta: which divergence it is: 0 is the forward KL(q || pi), 1 the reverse KL(pi || q); 0.5 in TRL. lmbda: the chance that an
    example is answered by the student, keyed by the example; the others bring their demonstration; 0.5 in TRL. seq_kd: True takes,
    in place of demonstrations, the teacher's own answers, sampled as the student's are, so that no row needs one. temperature:
    divides both models' logits in D, whatever the temperature of sampling (TRL samples at 0.9 and compares at 1).

    Completions need no reward. The recipe names the teacher: `teacher: MODEL`.
    """
    if not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda: got {lmbda}; it must be from 0 (given answers) to 1 (own answers)")
    if seq_kd and lmbda == 1:
        raise ValueError(
            "seq_kd: with lmbda=1 every answer is the student's own, so it has no effect; lower lmbda or leave it out"
        )
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}; it must be positive")
    term = of_channel(
        "distil",
        "jsd",
        on=by(Source.EXPERT, Source.POLICY),
        per=Per(("own_tokens",)),
        describe=f"D_beta(teacher, pi) over the vocabulary, beta = {beta:g}",
    )
    return Method(
        terms=(term,),
        plan=_own_or_given(lmbda, seq_kd),
        comparisons={"jsd": Comparison(generalised_jsd(beta), of="teacher", temperature=temperature)},
    )


def _own_or_given(lmbda: float, seq_kd: bool) -> Plan:
    """An answer of the policy's with the chance `lmbda`, else the row's, or with `seq_kd` the teacher's."""

    def own(example: Example, state: State) -> bool:
        return keyed_uniforms(1, "gkd", state["seed"], example.id)[0] < lmbda

    def start(example: Example, state: State) -> tuple[Trajectory, ...]:
        return () if seq_kd or own(example, state) else example.expert

    def following(group: Group, state: State) -> Sequence[Request]:
        if group.trajectories:
            return ()
        return (Request(1, by="policy" if own(group.example, state) else "teacher"),)

    given = lmbda < 1 and not seq_kd
    return Plan(
        start=start,
        next=following,
        samples=lmbda > 0 or seq_kd,
        scored=False,
        needs_expert="demonstration" if given else None,
    )


@method(
    paper="arXiv:2306.13649",
    family="distillation",
    year=2025,
    deviates="The recipe was published as an article, without an arXiv number; the paper given is GKD's. Divided by the step's "
    "tokens, where the recipe adds them up; the student's log-probs are the trainer's, not the sampler's. Teacher and "
    "student are both at the temperature of sampling; the recipe asks its teacher for plain log-probs.",
)
def on_policy_distillation(
    num_generations: int = 4,
    mode: Literal["sampled_token", "full_logits"] = "sampled_token",
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """On-policy distillation: the teacher grades every token of the student's own answers.

    Its aim is the reverse KL(pi || q) on own completions, q the teacher, as a reward for each token with discount 0.

    Loss (logged), averaged over all tokens of the step:
        sampled_token    log pi - log q of the sampled token
        full_logits      KL(pi || q) over the whole vocabulary at every token
    Trained in the first mode is -A r, with A = log q - log pi_old, without gradient, and r = pi / pi_old. Weight on grad log pi: r
    A / N in mode "sampled_token". In "full_logits" the gradient is on all logits, and the answer's own probability has none.

    num_generations: answers to a prompt, 4 in the published recipe; they share nothing but their prompt. mode: "sampled_token" is
    the published recipe's (tinker-cookbook, for the Thinking Machines article of October 2025).

    Completions need no reward. The recipe names the teacher: `teacher: MODEL`.
    """
    if mode not in ("sampled_token", "full_logits"):
        raise ValueError(f"mode: got {mode!r}; allowed: sampled_token, full_logits")
    own, per = by(Source.POLICY), Per(("own_tokens",))
    if mode == "sampled_token":
        needs = frozenset({"teacher_logp", "old_logp"})
        term = Term("distil", _graded, own, per, needs=needs, logged=_sampled_kl, describe="-A r, A = log teacher - log old")
    else:
        term = of_channel("distil", "reverse_kl", on=own, per=per, describe="KL(pi || teacher) over the vocabulary")

    return Method(
        terms=(term,),
        plan=replace(rollouts(num_generations), scored=False),
        comparisons={"reverse_kl": Comparison(reverse_kl, of="teacher")} if mode == "full_logits" else {},
        updates=Updates(num_iterations, minibatches),
    )


def _graded(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
    before = old(scores.logp, batch, on)
    return -(batch.columns["teacher_logp"] - before) * (scores.logp - before).exp()


def _sampled_kl(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
    return scores.logp - batch.columns["teacher_logp"]
