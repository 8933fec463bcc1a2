"""ReLIFT: reinforcement learning, and now and then imitation of what was never solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crosstrain.methods.checks import at_least, clip, several
from crosstrain.methods.memory import name_of, solve_rate
from crosstrain.methods.registry import method
from crosstrain.methods.uft import nothing
from crosstrain.objective.advantages import centred
from crosstrain.objective.terms import by, clipped, nll
from crosstrain.types import ById, Group, Method, Per, Plan, Request, Source, State, Term, Updates

BUFFERED = "buffered"
"""The stream that groups of buffered demonstrations say they are from."""


@method(
    paper="arXiv:2506.07527",
    family="hybrid",
    direction="(SFT ->) RL",
    works="Reported 5.2 points above its baselines on average, with 13 % of the demonstrations (arXiv:2506.07527).",
    fails="Behind the methods that imitate in every step in the comparison of SRFT: 54.0 against 59.5 (arXiv:2506.19767).",
    deviates="Imitation is a step of its own after that which filled the buffer, with the same AdamW: the authors have a second "
    "one, with moments and a clipping of its own and the same learning rate. They also bound the loss of very unlikely wrong "
    "answers (dual clip, 3). Their scripts differ: 128 buffered prompts and no clip at first, 64 and the clip here later.",
)
def relift(
    num_generations: int = 8,
    buffer_size: int = 128,
    sft_coef: float = 1.0,
    solved_above: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    num_iterations: int = 1,
    minibatches: int = 2,
) -> Method:
    """ReLIFT: RL on what the policy can solve, SFT on the demonstrations of what it cannot.

    Prompts none of whose rollouts is solved (reward > solved_above) go into a buffer. Once it holds buffer_size of them, the next
    step draws and samples nothing and trains on the demonstrations of the buffer's first buffer_size, which then leave it. A step
    of rollouts comes between two of imitation, however many wait.

    Loss of a step, with r = pi / pi_old and A = R - group mean, no std:
        rollouts          mean over all tokens of max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon_high))
        demonstrations    sft_coef times the mean over all tokens of -log pi
    Weight on grad log pi: gate r A / N in a step of rollouts, sft_coef / N in one of demonstrations, N the step's tokens.

    buffer_size: prompts in a step of imitation, 128 in the authors' first scripts, 64 in later ones. sft_coef: how much imitation
    counts; AdamW takes back most of what it changes, as the steps share its moments.

    num_iterations and minibatches are those of both kinds of step.
    """
    plan, remember = buffered(num_generations, buffer_size, 0.0, solved_above)
    return Method(
        terms=(
            rollout_term(epsilon, epsilon_high),
            nll("demo", on=by(Source.EXPERT), per=Per(("own_tokens",)), coef=_positive("sft_coef", sft_coef)),
        ),
        plan=plan,
        advantage=centred,
        updates=Updates(num_iterations, minibatches),
        init=lambda: {"buffer": [], "imitated": False},
        remember=remember,
    )


def rollout_term(epsilon: float, epsilon_high: float) -> Term:
    """PPO's clipped term, a mean over all tokens of rollouts."""
    clip(epsilon=epsilon, high=epsilon_high)
    return clipped("rl", epsilon, epsilon_high, on=by(Source.POLICY), per=Per(("own_tokens",)))


def buffered(
    num_generations: int, buffer_size: int, hardest: float, solved_above: float
) -> tuple[Plan, Callable[[State, Sequence[Group]], State]]:
    """A plan of rollouts, and of demonstrations once buffer_size prompts with a solve rate of at most `hardest` wait in the state's
    `buffer`; and what remembers these prompts, and in `imitated` whether a step was one of demonstrations."""
    several(num_generations, "a single rollout is its group's mean, and its advantage always 0")
    at_least(1, buffer_size=buffer_size)

    def due(state: State) -> bool:
        return imitates(state, buffer_size)

    def recall(state: State, by_id: ById) -> Sequence[Group]:
        examples = [by_id(name) for name in state["buffer"][:buffer_size]] if due(state) else []
        return [Group(e, e.expert, BUFFERED) for e in examples]

    def following(group: Group, state: State) -> Sequence[Request]:
        return () if group.stream == BUFFERED or group.by(Source.POLICY) else (Request(num_generations),)

    def remember(state: State, groups: Sequence[Group]) -> State:
        left = state["buffer"][buffer_size:] if due(state) else state["buffer"]
        rates = [(name_of(g.example), solve_rate(g, solved_above)) for g in groups]
        hard = [name for name, rate in rates if rate is not None and rate <= hardest]
        return {**state, "buffer": [*left, *hard], "imitated": due(state)}

    plan = Plan(
        streams=lambda state: {} if due(state) else {"train": 1.0},
        start=nothing,
        next=following,
        samples=True,
        recall=recall,
        needs_expert="demonstration",
    )
    return plan, remember


def imitates(state: State, buffer_size: int) -> bool:
    """Whether a step is one of demonstrations: enough prompts wait, and the step before was one of rollouts, as in the authors'
    code, where an update of imitation follows each of reinforcement learning at most."""
    return len(state["buffer"]) >= buffer_size and not state["imitated"]


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise ValueError(f"{name}: got {value}; it must be positive")
    return value
