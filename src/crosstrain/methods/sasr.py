"""SASR: each step imitates or reinforces, by chance, and the gradient of imitation says how likely which is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from crosstrain.methods.plans import keyed_uniforms
from crosstrain.methods.registry import method
from crosstrain.objective.advantages import group_normalised
from crosstrain.objective.terms import by, kl, nll, seq_mean, surrogate
from crosstrain.types import Example, Group, Method, Per, Plan, Request, Source, State, Term, Trajectory


@method(
    paper="arXiv:2505.13026",
    family="hybrid",
    checked="reconstructed",
    works="Its authors report that it is better than SFT, RL and static mixtures of both (arXiv:2505.13026).",
    deviates="No code of the authors was found and the formula is from descriptions: the weight gamma, that steps are compared "
    "with the norm of the last warm-up step, and that the norm of the last imitation is taken for the current one (a step of "
    "reinforcement learning computes none) are this library's choices.",
)
def sasr(
    num_generations: int = 8,
    gamma: float = 1.0,
    warmup_steps: int = 20,
    beta: float = 0.04,
    rollouts_from: str = "rl",
    demonstrations_from: str = "demos",
) -> Method:
    """SASR (step-wise adaptive SFT and RL): a whole step is one of both, drawn by chance.

    After `warmup_steps` imitating steps, a step imitates with probability
        p = |g| / (|g| + gamma |g_warm|)
    |g| is the norm of the gradient of the last imitating step and |g_warm| that of the last one in warm-up: the further the policy
    is from its demonstrations, the more it imitates. The random number is keyed by seed and step.

    Loss of a step:
        imitation    -log pi averaged over the demonstrations' tokens
        RL           that of `grpo`, mean over sequences of the mean over tokens of max(-A r, -A clip(r)) + beta k3
    Weight on grad log pi: 1 / N in a step that imitates, else [A + beta (ref / pi - 1)] / (T_i N); a batch is used once, so that r
    is 1.

    gamma: how much the gradient in warm-up counts; a larger one means less imitation. 1 is a choice. warmup_steps: steps that
    imitate at first; 20 is a choice. beta: the coefficient of the
    KL term, that of `grpo`; 0 turns it off. rollouts_from, demonstrations_from: the data streams, one of which a step draws all its
    examples from.
    """
    if gamma <= 0 or warmup_steps < 0 or beta < 0:
        raise ValueError(
            f"got gamma={gamma}, warmup_steps={warmup_steps}, beta={beta}; gamma must be positive and the others at least 0"
        )
    imitates = functools.partial(imitates_at, gamma=gamma, warmup_steps=warmup_steps)

    def streams(state: State) -> Mapping[str, float]:
        wanted = demonstrations_from if imitates(state) else rollouts_from
        return {name: float(name == wanted) for name in (rollouts_from, demonstrations_from)}

    def start(example: Example, state: State) -> tuple[Trajectory, ...]:
        return example.expert if imitates(state) else ()

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if imitates(state) or group.by(Source.POLICY) else (Request(num_generations),)

    def update(state: State, metrics: Mapping[str, float]) -> State:
        after = {**state, "step": state["step"] + 1}
        if "reward" in metrics or "grad_norm" not in metrics:
            return after
        norm = metrics["grad_norm"]  # of imitation alone: such a step has nothing else
        warming = state["step"] < warmup_steps or state["warm"] is None
        return {**after, "norm": norm, "warm": norm if warming else state["warm"]}

    on, per = by(Source.POLICY), Per(("sequences",))
    terms: list[Term] = [
        nll("demo", on=by(Source.EXPERT), per=Per(("own_tokens",))),
        surrogate("rl", on=on, per=per, normalise=seq_mean, describe="-A r, r = pi / sg(pi)"),
    ]
    if beta > 0:
        terms.append(kl("kl", on=on, per=per, normalise=seq_mean, coef=beta))
    return Method(
        terms=tuple(terms),
        plan=Plan(
            streams=streams,
            start=start,
            next=following,
            samples=True,
            needs_expert="demonstration",
            expert_streams=frozenset({demonstrations_from}),
        ),
        advantage=group_normalised,
        init=lambda: {"step": 0, "norm": None, "warm": None},
        update=update,
    )


def imitates_at(state: State, *, gamma: float, warmup_steps: int) -> bool:
    """Whether the step that a state has come to imitates.

    >>> state = {"step": 9, "norm": 3.0, "warm": 1.0, "seed": 0}
    >>> sum(imitates_at({**state, "step": s}, gamma=1.0, warmup_steps=2) for s in range(2, 1002))  # p = 3 / 4
    762
    """
    if state["step"] < warmup_steps or state["norm"] is None:
        return True
    [u] = keyed_uniforms(1, "sasr", state.get("seed", 0), state["step"])
    return bool(u * (state["norm"] + gamma * state["warm"]) < state["norm"])
