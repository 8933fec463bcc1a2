"""TRAPO: as much of the demonstration as a prompt needs, imitated within a trust region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosstrain.methods.plans import told
from crosstrain.methods.registry import method
from crosstrain.methods.uft import nothing
from crosstrain.objective.advantages import centred
from crosstrain.objective.denominators import floored
from crosstrain.objective.terms import by, surrogate, unclipped
from crosstrain.objective.words import says
from crosstrain.types import Batch, Group, Look, Method, Per, Plan, Request, Source, State, Updates

TAUGHT = "taught"
"""The column that says whose prefix is imitated: 1 on all tokens of such a row, else 0."""

ROUNDS = ((4, 0.0, 0), (2, 0.25, 2), (1, 0.5, 4), (1, 1.0, 7))
"""Rollouts of a round, the share of the demonstration that they start from, and below how many solved so far they do."""


@method(
    paper="arXiv:2512.17636",
    family="hybrid",
    direction="(SFT ->) RL",
    deviates=(
        "Prefixes are cut between tokens, in the authors' code at the next paragraph; divided by all tokens of the step, "
        "untaught prefixes among them, there by a constant length per micro-batch. The last rollout's hint is all of the "
        "demonstration but its end, and the policy ends the answer; the authors take the end token too and drop what is sampled."
    ),
)
def trapo(lowest: float = 0.1, solved_above: float = 0.0, num_iterations: int = 1, minibatches: int = 1) -> Method:
    """TRAPO (trust-region adaptive policy optimisation): hints where a prompt is not solved without, and imitation of these.

    A prompt gets four rollouts, then two, one and one. The two start from the first quarter of the demonstration (rounded down, as
    all of these) unless two are solved by then, the next from its first half unless four are, the last from all of it but its end
    unless seven are.

    Loss, summed over the tokens of both parts and divided by all of them:
        own tokens    -A r                      r = pi / pi_old, A = R - group mean (no std, no clip)
        prefixes      -p / max(sg(p), lowest)   of one rollout for each length of hint (TrSFT)
    Weight on grad log pi: r A / N on own tokens, p / max(p, lowest) / N on a taught prefix: 1 where the policy would say it, less
    where it would not.

    lowest: the probability below which imitation weakens, 0.1 in the authors' script. solved_above: a rollout with a larger
    reward is solved.
    """

    if not 0 < lowest <= 1:
        raise ValueError(f"lowest: got {lowest}; it must be in (0, 1]")

    def following(group: Group, state: State) -> Sequence[Request]:
        answer, done = told(group.example), 0
        solved = sum(t.reward is not None and t.reward > solved_above for t in group.trajectories)
        for n, share, enough in ROUNDS:
            if len(group.trajectories) == done:
                hint = min(int(share * len(answer)), len(answer) - 1) if solved < enough else 0
                return (Request(n, answer[:hint]),)
            done += n
        return ()

    per = Per(("all_tokens",))
    return Method(
        terms=(
            unclipped("rl", on=by(Source.POLICY), per=per),
            surrogate(
                "hint",
                on=by(Source.EXPERT),
                per=per,
                denominator=floored(lowest),
                gate=taught,
                needs=frozenset({TAUGHT}),
                describe=f"-p / max(sg(p), {lowest:g})",
            ),
        ),
        plan=Plan(start=nothing, next=following, samples=True, needs_expert="demonstration"),
        advantage=by_author,
        updates=Updates(num_iterations, minibatches),
        columns={TAUGHT: one_for_each_hint},
    )


@says("1 in rows whose hint is imitated, else 0")
def taught(ratio: Tensor, logp: Tensor, batch: Batch, on: Tensor) -> Tensor:
    """The gate: 1 in rows whose prefix is imitated."""
    return batch.columns[TAUGHT].to(ratio.dtype)


def one_for_each_hint(look: Look, batch: Batch) -> Tensor:
    """[B, T]: 1 in the last row of each group for each length of prefix, else 0."""
    lengths = (batch.source == int(Source.EXPERT)).sum(dim=1)
    last = {(int(g), int(n)): r for r, (g, n) in enumerate(zip(batch.group, lengths, strict=True)) if n}
    column = torch.zeros(batch.tokens.shape, dtype=batch.reward.dtype, device=batch.tokens.device)
    column[sorted(last.values())] = 1.0
    return column


@says("R - mean R of the group on own tokens, 1 on a hint")
def by_author(batch: Batch) -> Tensor:
    """[B, T]: the reward less the group's mean on own tokens, 1 on an expert's."""
    own = centred(batch)[:, None].expand(batch.source.shape)
    return torch.where(batch.source == int(Source.EXPERT), torch.ones_like(own), own)
