"""UFT: rollouts that start from a part of the demonstration, which shrinks as training goes on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from crosstrain.methods.checks import at_least, clip
from crosstrain.methods.plans import keyed_uniforms, told
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.schedules import cosine
from crosstrain.objective.terms import by, clipped, kl, nll
from crosstrain.types import Example, Group, Method, Per, Plan, Request, Source, State, Term, Updates

CHUNKS = 5
"""Parts that a demonstration is cut into; the number revealed is binomial."""


@method(
    paper="arXiv:2505.16984",
    family="hybrid",
    works=(
        "Exploring from a hint needs samples polynomial in the length of a solution, not exponential, in theory "
        "(arXiv:2505.16984)."
    ),
    fails=(
        "A small constant weight on the prefix, as here, scored 43.8 where Prefix-RFT's way scored 51.8 (ablation in "
        "arXiv:2507.01679)."
    ),
    deviates=(
        "Demonstrations are cut between tokens; the authors cut between the steps of a solution. A hint's tokens count "
        "once for each rollout. Their KL (verl's low_var_kl) is cut at 10 per token, beyond which it has no gradient; here it is "
        "not. Their script takes several optimizer steps per batch (minibatches), here the default is one."
    ),
)
def uft(
    num_generations: int = 4,
    hint_coef: float = 0.001,
    beta: float = 0.001,
    hint_steps: int = 300,
    highest: float = 0.95,
    lowest: float = 0.05,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """UFT (unified fine-tuning): explore from a hint, and imitate the hint a little.

    A hint is the first k of five equal parts of the row's demonstration, k binomial with a probability that falls from `highest` to
    `lowest` along half a cosine over hint_steps steps, and 0 afterwards; all rollouts of a prompt continue the same hint.

    Loss: GRPO's clipped loss over all tokens that the policy wrote, plus hint_coef times -log pi averaged over the hints'
    tokens, plus beta k3 to the reference over own tokens. Weight on grad log pi: gate r A / N_own on own tokens, hint_coef /
    N_hint on hints.

    hint_steps: the steps that have hints, 300 of 500 in the paper. highest, lowest: the probability at first and in the end, 0.95
    and 0.05 in the paper. hint_coef: how much imitation of hints counts, 0.001 in the authors' script. beta: how much the KL
    counts, 0.001 in the authors' script. minibatches: optimizer steps that a pass is cut into, by group; 4 in the authors' script,
    256 prompts in mini-batches of 64.

    A demonstration's last token, which ends the answer, is never part of a hint. The authors
    cut demonstrations between steps of a solution, here they are cut between tokens. A hint's tokens count once for each rollout.
    """
    if hint_coef < 0 or beta < 0:
        raise ValueError(f"got hint_coef={hint_coef}, beta={beta}; both must be 0 or positive")
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(f"got lowest={lowest}, highest={highest}; they must be in [0, 1], lowest not above highest")
    at_least(1, hint_steps=hint_steps)
    clip(epsilon=epsilon)
    chance = cosine(highest, lowest, hint_steps)

    def hint(example: Example, state: State) -> tuple[int, ...]:
        step = int(state["step"])
        probability = chance(step) if step < hint_steps else 0.0
        revealed = sum(u < probability for u in keyed_uniforms(CHUNKS, "uft", state.get("seed", 0), example.id, step))
        answer = told(example)
        return answer[: min(round(revealed / CHUNKS * len(answer)), len(answer) - 1)]

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if group.by(Source.POLICY) else (Request(num_generations, hint(group.example, state)),)

    own = Per(("own_tokens",))
    terms: list[Term] = [
        clipped(
            "rl",
            epsilon,
            epsilon,
            on=by(Source.POLICY),
            per=own,
        )
    ]
    if hint_coef > 0:
        terms.append(nll("hint", on=by(Source.EXPERT), per=own, coef=hint_coef))
    if beta > 0:
        terms.append(kl("kl", on=by(Source.POLICY), per=own, coef=beta))
    return Method(
        terms=tuple(terms),
        plan=Plan(start=nothing, next=following, samples=True, needs_expert="demonstration"),
        advantage=functools.partial(group_normalised, over=(Source.POLICY,)),
        updates=Updates(num_iterations, minibatches),
        init=lambda: {"step": 0},
        update=next_step,
        reference="stage_start",
    )


def nothing(example: Example, state: State) -> tuple[()]:
    """A group that starts empty: the demonstration is used in parts."""
    return ()


def next_step(state: State, observed: Mapping[str, float]) -> State:
    """A state that counts steps."""
    return {**state, "step": int(state["step"]) + 1}
