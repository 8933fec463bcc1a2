"""BREAD: where a prompt is never solved, rollouts from the shortest part of the demonstration that helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from crosstrain.methods.grpo import grpo
from crosstrain.methods.plans import cuts, told
from crosstrain.methods.registry import method
from crosstrain.methods.uft import nothing
from crosstrain.types import Group, Method, Plan, Request, Source, State, Trajectory


@method(
    paper="arXiv:2506.17211",
    family="hybrid",
    checked="reconstructed",
    direction="(SFT ->) RL",
    works="Reported for models of 1.5B and 3B whose teacher's solutions are too hard to imitate: solves prompts that SFT and then "
    "GRPO do not, with less than 40 % of the demonstrations and about three times sooner than GRPO (arXiv:2506.17211).",
    deviates="The band of success rates is not in what could be read of the paper: lowest and highest are guesses, and so is that "
    "every part tried gets num_generations rollouts. Demonstrations are cut between tokens into ten parts of one length, in the "
    "paper between sentences or paragraphs; the part shown stands where the answer begins, in the paper it is a hint in the "
    "question.",
)
def bread(
    num_generations: int = 8,
    episodes: int = 10,
    lowest: float = 0.25,
    highest: float = 0.75,
    solved_above: float = 0.0,
    beta: float = 0.0,
    epsilon: float = 0.2,
    num_iterations: int = 1,
    minibatches: int = 1,
) -> Method:
    """BREAD (branched rollouts from expert anchors): GRPO from as much of the demonstration as makes a prompt solvable.

    A prompt gets num_generations rollouts. Where none is solved (reward > solved_above), a binary search over the demonstration,
    cut into `episodes` parts, looks for a beginning from which the share of solved rollouts is in [lowest, highest]: below, more
    is shown, above, less. The search ends there, though a shorter one may be in the band too, or where nothing lies between too
    little and enough; the shortest beginning tried with a share of at least `lowest` is then taken, and without one the prompt
    stays unsolved.

    Loss: that of `grpo`, max(-A r, -A clip(r)), on the rollouts from the beginning that was found, over what they wrote themselves.
    All others of the search are dropped; they are counted in the budget. Weight on grad log pi: that of `grpo`, gate r A / (T_i N),
    A within the group that is kept; 0 on what was shown.

    episodes: parts of about one length that a demonstration is cut into, about ten by descriptions of the paper. num_generations:
    rollouts from the prompt, and from each beginning that is tried (a guess). lowest, highest: the band of the share of solved
    rollouts in which the search ends (guesses). beta: the coefficient of `grpo`'s KL term; 0, for none, is a choice.
    """
    if episodes < 2:
        raise ValueError(f"episodes: got {episodes}; it must be at least 2")
    if not 0 < lowest <= highest <= 1:
        raise ValueError(f"got lowest={lowest}, highest={highest}; they must be in (0, 1], lowest not above highest")

    def following(group: Group, state: State) -> Sequence[Request]:
        if not group.trajectories:
            return (Request(num_generations),)
        rates, answer = _rates(group.trajectories, solved_above), told(group.example)
        length = bisect(rates, cuts(len(answer), episodes), lowest, highest) if rates[0] == 0 else None
        return () if length is None else (Request(num_generations, answer[:length]),)

    def select(group: Group, state: State) -> Group | None:
        rates = _rates(group.trajectories, solved_above)
        if len(rates) == 1:
            return group
        found = min((n for n, rate in rates.items() if n and rate >= lowest), default=0)
        return replace(group, trajectories=tuple(t for t in group.trajectories if shown(t) == found))

    made = grpo(
        num_generations=num_generations, beta=beta, epsilon=epsilon, num_iterations=num_iterations, minibatches=minibatches
    )
    return replace(
        made,
        plan=Plan(start=nothing, next=following, samples=True, needs_expert="demonstration"),
        select=select,
    )


def shown(trajectory: Trajectory) -> int:
    """How many of an expert's tokens a rollout started from."""
    return sum(s == Source.EXPERT for s in trajectory.source)


def _rates(trajectories: Sequence[Trajectory], solved_above: float) -> dict[int, float]:
    """The share of solved rollouts by what they started from; 0 where no reward is known."""
    rewards: dict[int, list[float | None]] = {}
    for t in trajectories:
        rewards.setdefault(shown(t), []).append(t.reward)
    return {n: sum(r is not None and r > solved_above for r in found) / len(found) for n, found in rewards.items()}


def bisect(rates: Mapping[int, float], places: Sequence[int], lowest: float, highest: float) -> int | None:
    """Where a binary search over rising `places`, whose `rates` are known where it looked, looks next; None at its end.

    What it found is then the first place with a rate of at least `lowest`: all that it looked at before that are below.

    >>> bisect({}, (2, 4, 6), 0.25, 0.75), bisect({4: 0.0}, (2, 4, 6), 0.25, 0.75), bisect({4: 0.5}, (2, 4, 6), 0.25, 0.75)
    (4, 6, None)
    """
    low, high = -1, len(places)
    while high - low > 1:
        middle = (low + high) // 2
        place = places[middle]
        if place not in rates:
            return place
        if lowest <= rates[place] <= highest:
            return None
        low, high = (middle, high) if rates[place] < lowest else (low, middle)
    return None
