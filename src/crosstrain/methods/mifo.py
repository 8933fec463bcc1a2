"""MIFO: imitation of hard prompts that spares what reinforcement learning has just learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from crosstrain.methods.registry import method
from crosstrain.methods.relift import buffered, imitates, rollout_term
from crosstrain.objective.advantages import centred
from crosstrain.types import Batch, Look, Method, Per, Scores, Source, State, Term, Updates

UNSURE = "unsure"
"""The column that says which tokens of a demonstration are imitated: 1, else 0."""

MOVED = "moved/"
"""What the loop calls how far a parameter moved; its name follows."""


@method(
    paper="arXiv:2510.04454",
    family="hybrid",
    checked="reconstructed",
    direction="(SFT ->) RL",
    works="Reported to beat SRFT and ReLIFT with 1.5 % of the demonstrations and 20.4 % of the prompts that these took "
    "(arXiv:2510.04454).",
    fails="Forgetting itself is not measured in arXiv:2510.04454, as its reviewers note (OpenReview, ICLR 2026).",
    deviates="Written from descriptions of the paper: the size of the buffer, which prompts are hard, the share of tokens, the "
    "share of parameters and the decay of their history are guesses. Whole parameter tensors are frozen, by how far their entries "
    "moved on average since RL went on after the last imitation; the paper's unit was not established. RL is that of `relift`, so "
    "that the two can be compared.",
)
def mifo(
    num_generations: int = 8,
    buffer_size: int = 128,
    hardest: float = 0.0,
    entropy_share: float = 0.2,
    freeze_share: float = 0.2,
    history: float = 0.5,
    solved_above: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """MIFO (mitigating forgetting between SFT and RL): `relift` whose imitation is of few tokens and leaves some parameters alone.

    Prompts of which at most the share `hardest` of the rollouts is solved (reward > solved_above) are buffered, and their
    demonstrations imitated in a step of its own once there are buffer_size. In such a step the freeze_share of the parameters (as
    tensors) of the greatest importance stand still, importance being how far the parameter moved in the RL steps since the last
    imitation (root mean square over its entries) plus `history` times its importance before.

    Loss of a step, with r = pi / pi_old and A = R - group mean, no std:
        rollouts          mean over all tokens of max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon_high)), as in `relift`
        demonstrations    mean of -log pi over the entropy_share of each one's tokens at which the policy is least sure
    Weight on grad log pi: gate r A / N in a step of rollouts; in one of demonstrations 1 / N on the N chosen tokens, 0 on others.

    buffer_size: prompts in a step of imitation (a guess, as in `relift`). hardest: the largest share of solved rollouts with which
    a prompt is buffered (a guess). entropy_share: the share of a demonstration's tokens that is imitated (a guess). freeze_share:
    the share of parameters that stand still (a guess). history: how much of an importance is left after an imitation (a guess).
    """
    if not 0 <= hardest < 1 or not 0 < entropy_share <= 1 or not 0 <= freeze_share < 1 or not 0 <= history < 1:
        raise ValueError(
            f"got hardest={hardest}, entropy_share={entropy_share}, freeze_share={freeze_share}, history={history}; they must be "
            "in [0, 1], entropy_share not 0, and the others not 1"
        )
    plan, remember = buffered(num_generations, buffer_size, hardest, solved_above)

    def unsure(look: Look, batch: Batch) -> Tensor:
        expert = batch.written_by(Source.EXPERT)
        if not bool(expert.any()):
            return torch.zeros(batch.tokens.shape, dtype=batch.reward.dtype, device=batch.tokens.device)
        return least_sure(look(batch).channels["entropy"], expert, entropy_share)

    def update(state: State, observed: Mapping[str, float]) -> State:
        if state["imitated"]:
            return {**state, "past": importance(state, history), "moved": {}, "begins": True}
        moved = {name.removeprefix(MOVED): far for name, far in observed.items() if name.startswith(MOVED)}
        return {**state, "moved": moved, "begins": False}

    def grad_mask(state: State) -> Callable[[str], bool]:
        frozen = most_important(importance(state, history), freeze_share) if imitates(state, buffer_size) else set()
        return lambda name: name in frozen

    return Method(
        terms=(rollout_term(epsilon, epsilon_high), _imitation()),
        plan=plan,
        advantage=centred,
        updates=Updates(num_iterations, minibatches),
        init=lambda: {"buffer": [], "imitated": False, "past": {}, "moved": {}, "begins": True},
        update=update,
        remember=remember,
        columns={UNSURE: unsure},
        grad_mask=grad_mask,
        movement=lambda state: bool(state["begins"]),
    )


def least_sure(entropy: Tensor, inside: Tensor, share: float) -> Tensor:
    """[B, T]: 1 at those `share` of a row's entries `inside` (at least one, if any) where the entropy is largest, else 0; of equal
    ones the first."""
    ranked = torch.where(inside, -entropy, torch.full_like(entropy, torch.inf)).argsort(dim=1, stable=True)
    place = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked))
    n = inside.sum(dim=1, keepdim=True)
    wanted = (n * share).round().clamp(min=1).minimum(n)
    return (place < wanted).to(entropy.dtype)


def importance(state: State, history: float) -> dict[str, float]:
    """How far each parameter moved in the last RL steps, plus `history` times its importance before."""
    past, moved = state["past"], state["moved"]
    return {name: history * past.get(name, 0.0) + moved.get(name, 0.0) for name in past | moved}


def most_important(values: Mapping[str, float], share: float) -> set[str]:
    """The names of the largest `share` of the values; of equal ones the first by name."""
    ranked = sorted(values, key=lambda name: (-values[name], name))
    return set(ranked[: round(share * len(ranked))])


def _imitation() -> Term:
    def on(batch: Batch) -> Tensor:
        expert = batch.written_by(Source.EXPERT)
        return expert & (batch.columns[UNSURE] > 0) if UNSURE in batch.columns else expert

    def value(scores: Scores, batch: Batch, on: Tensor) -> Tensor:
        return -scores.logp

    return Term("demo", value, on, Per(("own_tokens",)), needs=frozenset({UNSURE}), describe="-log pi where least sure")
