"""AMFT: imitation and reinforcement learning mixed by a weight that a controller moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from crosstrain.errors import UserError
from crosstrain.methods.chord import of_rollouts_and_demonstrations, only_rollouts
from crosstrain.methods.plans import rollouts_and_demonstrations
from crosstrain.methods.registry import method
from crosstrain.objective.terms import by, nll, surrogate
from crosstrain.types import Group, Method, Per, Plan, Request, Source, State


@method(
    paper="arXiv:2508.06944",
    family="hybrid",
    checked="reconstructed",
    works="Its authors report gains over fixed mixtures on maths, General Points and V-IRL (arXiv:2508.06944).",
    deviates="The authors' repository does not run (its rollouts are random numbers), so this is a reconstruction. Its controller "
    "adds the derivative of a validation loss to mu, which raises that loss; here what is raised is the expected reward, estimated "
    "on the step's own rollouts. GRPO's advantages stand in for PPO's value model. At the published meta_lr the meta-gradient is "
    "far smaller than the entropy's part.",
)
def amft(
    num_generations: int = 8,
    mu: float = 0.8,
    mu_lowest: float = 0.05,
    mu_highest: float = 0.95,
    entropy_lr: float = 5e-4,
    meta_lr: float = 1e-4,
    meta_every: int = 20,
    warmup_steps: int = 50,
    demonstration_share: float = 0.5,
    rollouts_from: str = "rl",
    demonstrations_from: str = "demos",
) -> Method:
    """AMFT (adaptive meta fine-tuning): (1 - mu) RL + mu SFT, mu moved by the policy's entropy and by what helps the reward.

    The first `warmup_steps` steps imitate alone. After every other step mu moves, and stays within [mu_lowest, mu_highest]:
        mu <- mu + entropy_lr (H* - H) + meta_lr lr (g_SFT . g_RL - |g_RL|^2)
    H is the entropy over the step's trained tokens, and H* that of the first step after warm-up. The last part comes in every
    `meta_every`-th step; there g are the gradients of the two losses, and it is the derivative with respect to mu of the expected
    reward after a step of learning rate lr. The inner product follows from the norms of both gradients and of their sum.

    Loss: (1 - mu) times GRPO's clipped loss over all own tokens, plus mu times -log pi over all demonstration tokens. Weight on
    grad log pi: (1 - mu) A / N_own and mu / N_demo, with the group-normalised A of `grpo` over rollouts alone; a batch is used
    once, so that r is 1.

    mu: the weight of imitation after warm-up, at first; 0.8 in the authors' settings, 0.5 in their class. mu_lowest, mu_highest:
    the bounds of mu, from the authors' settings. entropy_lr: how fast entropy moves mu, from the authors' settings. meta_lr: how
    fast the meta-gradient moves mu, from the authors' settings; 0 turns it off. meta_every: steps from one meta-gradient to the
    next, from the authors' settings; each takes two further passes over its step's batch. warmup_steps: steps that imitate alone at
    first, from the authors' settings. demonstration_share: the share of demonstrations in the step's examples, where there are two
    streams. rollouts_from, demonstrations_from: the data streams; with one name for both, each row gives both.
    """
    if not 0 < mu_lowest <= mu <= mu_highest < 1:
        raise ValueError(
            f"got mu_lowest={mu_lowest}, mu={mu}, mu_highest={mu_highest}; they must be in (0, 1), and in that order"
        )
    if min(entropy_lr, meta_lr) < 0 or meta_every < 1 or warmup_steps < 0:
        raise ValueError(
            f"got entropy_lr={entropy_lr}, meta_lr={meta_lr}, meta_every={meta_every}, warmup_steps={warmup_steps}; meta_every "
            "must be at least 1 and the others at least 0"
        )
    if meta_lr == 0 and meta_every != 20:
        raise ValueError("meta_every has no effect: meta_lr is 0")

    def probing(state: State) -> bool:
        after = int(state["step"]) - warmup_steps
        return after >= 0 and after % meta_every == 0

    def coefs(state: State) -> Mapping[str, float]:
        if not mu_lowest <= state["mu"] <= mu_highest:
            raise UserError(
                f"state.mu: got {state['mu']}; amft keeps it within mu_lowest={mu_lowest} and mu_highest={mu_highest}"
            )
        now = 1.0 if state["step"] < warmup_steps else state["mu"]
        return {"rl": 1 - now, "demo": now}

    def update(state: State, metrics: Mapping[str, float]) -> State:
        after, entropy = {**state, "step": state["step"] + 1}, metrics.get("entropy", math.nan)
        if state["step"] < warmup_steps or math.isnan(entropy):
            return after
        target = entropy if state["target"] is None else state["target"]
        moved = state["mu"] + entropy_lr * (target - entropy)
        if meta_lr and probing(state):
            moved += meta_lr * reward_derivative(metrics, state["mu"])
        return {**after, "target": target, "mu": min(max(moved, mu_lowest), mu_highest)}

    per = Per(("own_tokens",))
    return Method(
        terms=(
            surrogate("rl", on=by(Source.POLICY), per=per, describe="-A r, r = pi / sg(pi)"),
            nll("demo", on=by(Source.EXPERT), per=per),
        ),
        plan=_plan(
            rollouts_and_demonstrations(num_generations, demonstration_share, rollouts_from, demonstrations_from),
            warmup_steps,
            demonstrations_from,
        ),
        select=only_rollouts(rollouts_from, demonstrations_from),
        advantage=of_rollouts_and_demonstrations,
        init=lambda: {"step": 0, "mu": mu, "target": None},
        update=update,
        coefs=coefs,
        probes=("grad_norm/rl", "grad_norm/demo") if meta_lr else (),
        probing=probing,
        probe_share=1 / meta_every,
    )


def reward_derivative(metrics: Mapping[str, float], mu: float) -> float:
    """d (expected reward after the step) / d mu = lr (g_SFT . g_RL - |g_RL|^2), from the norms of (1 - mu) g_RL, mu g_SFT and their
    sum; 0 where a step had not both.

    >>> norms = {"grad_norm/rl": 0.5 * 2.0, "grad_norm/demo": 0.5 * 3.0, "grad_norm": 0.5 * 5.0}
    >>> reward_derivative({**norms, "learning_rate": 0.5, "reward": 0.0}, mu=0.5)  # parallel, of norms 2 and 3: 0.5 (6 - 4)
    1.0
    """
    if "reward" not in metrics or not {"grad_norm/rl", "grad_norm/demo"} <= metrics.keys():
        return 0.0
    rl, demo, both = metrics["grad_norm/rl"], metrics["grad_norm/demo"], metrics["grad_norm"]
    inner = (both**2 - rl**2 - demo**2) / (2 * mu * (1 - mu))
    return metrics["learning_rate"] * (inner - (rl / (1 - mu)) ** 2)


def _plan(mixed: Plan, warmup_steps: int, demonstrations_from: str) -> Plan:
    """The plan, with demonstrations alone during warm-up."""

    def streams(state: State) -> Mapping[str, float]:
        wanted = mixed.streams(state)
        if state["step"] >= warmup_steps:
            return wanted
        return {name: float(name == demonstrations_from) for name in wanted}

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if state["step"] < warmup_steps else mixed.next(group, state)

    return Plan(
        streams=streams,
        next=following,
        samples=True,
        needs_expert="demonstration",
        expert_streams=frozenset({demonstrations_from}),
    )
