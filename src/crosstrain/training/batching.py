"""Groups to rectangles, and rectangles to micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from crosstrain.prefix import common_start
from crosstrain.types import Batch, Group, Source, Trajectory


def to_batch(groups: Sequence[Group], *, step: int = 0, seed: int = 0, mask_truncated: bool = False) -> Batch:
    """The rectangle of all trajectories of `groups`, in order, padded on the right with token 0.

    mask_truncated: own completions cut at the token limit are not trained on; their rewards still count for the group.
    The column `behaviour_logp` is set, NaN where unknown; `advantage` is NaN until a method's advantage is set. Greedy
    completions are baselines: they are not trained on, and the column `greedy`, [B], is 1 for them where there are any; so is the
    column `replayed`, [B], for rollouts that were remembered.
    Raises ValueError for a group without trajectories.
    """
    rows: list[tuple[int, Group, Trajectory]] = []
    shared: list[int] = []
    for index, group in enumerate(groups):
        if not group.trajectories:
            raise ValueError(f"group {group.example.id} has no trajectories; select must drop it by returning None")
        rows += [(index, group, t) for t in group.trajectories]
        shared += [shared_prompt_length(group.trajectories)] * len(group.trajectories)
    length = max((len(t.tokens) for _, _, t in rows), default=0)
    size = (len(rows), length)
    tokens = torch.zeros(size, dtype=torch.long)
    source = torch.full(size, int(Source.PROMPT), dtype=torch.long)
    behaviour = torch.full(size, math.nan)
    reward = torch.full((len(rows),), math.nan)
    trained = torch.zeros(size, dtype=torch.bool)
    for r, (_, _, t) in enumerate(rows):
        n = len(t.tokens)
        tokens[r, :n] = torch.tensor(t.tokens)
        source[r, :n] = torch.tensor([int(s) for s in t.source])
        if t.behaviour_logp:
            behaviour[r, :n] = torch.tensor(t.behaviour_logp)
        if t.reward is not None:
            reward[r] = t.reward
        if not t.greedy and not (mask_truncated and not t.finished and t.wrote(Source.POLICY)):
            trained[r, 1:n] = source[r, 1:n] != int(Source.PROMPT)
    group_index = torch.tensor([g for g, _, _ in rows], dtype=torch.long)
    kinds = {"greedy": [float(t.greedy) for _, _, t in rows], "replayed": [float(t.replayed) for _, _, t in rows]}
    marked = {name: torch.tensor(values) for name, values in kinds.items() if any(values)}
    return Batch(
        tokens=tokens,
        source=source,
        trained=trained,
        group=group_index,
        rank=_ranks(group_index, reward),
        reward=reward,
        advantage=torch.full(size, math.nan),
        columns={"behaviour_logp": behaviour, **marked},
        example_ids=tuple(g.example.id for _, g, _ in rows),
        prompt_length=torch.tensor(shared, dtype=torch.long),
        length=torch.tensor([len(t.tokens) for _, _, t in rows], dtype=torch.long),
        contexts={
            name: tuple(t.contexts.get(name, ()) for _, _, t in rows)
            for name in dict.fromkeys(name for _, _, t in rows for name in t.contexts)
        },
        step=step,
        seed=seed,
    )


def shared_prompt_length(trajectories: Sequence[Trajectory]) -> int:
    """How many PROMPT tokens all trajectories start with: what may be computed once for all of them.

    >>> from crosstrain.types import Source as S
    >>> a = Trajectory((1, 2, 3), (S.PROMPT, S.PROMPT, S.POLICY))
    >>> b = Trajectory((1, 9, 3), (S.PROMPT, S.PROMPT, S.POLICY))
    >>> shared_prompt_length([a, a]), shared_prompt_length([a, b])
    (2, 1)
    """
    prompts = sorted(t.tokens[: t.response_start] for t in trajectories)
    return common_start(prompts[0], prompts[-1])


def with_advantage(batch: Batch, advantage: Tensor) -> Batch:
    """The batch with an advantage of shape [B] (the same for every token of a row) or [B, T]."""
    if advantage.shape == batch.reward.shape:
        advantage = advantage[:, None].expand(batch.tokens.shape)
    if advantage.shape != batch.tokens.shape:
        raise ValueError(
            f"an advantage must have shape [B] or [B, T] = {tuple(batch.tokens.shape)}; got {tuple(advantage.shape)}"
        )
    return replace(batch, advantage=advantage.detach().clone().to(batch.reward))


def distinct_demonstrations(group: Group) -> int:
    """How many different texts of an expert a group has: a hint that several rollouts start from is one."""
    return len({t.tokens[: max(i for i, s in enumerate(t.source) if s == Source.EXPERT) + 1] for t in group.by(Source.EXPERT)})


def distinct_tokens(batch: Batch) -> int:
    """Tokens of the batch with the prompt that a group's rows share counted once: what budgets are charged for."""
    total = 0
    for g in torch.unique(batch.group).tolist():
        rows = batch.group == g
        prompt = int(batch.prompt_length[rows][0])
        total += prompt + int((batch.length[rows] - prompt).sum())
    return total


def cut(batch: Batch, tokens: int, unit: str, *, shared: bool = True) -> list[Tensor]:
    """Row indices of micro-batches: whole groups, longest first, padded size at most `tokens` (but at least one unit each).

    unit: "group" never splits a group; "sequence" and "token" split one that is larger than `tokens` without the prompt its rows
    share, which every part computes again.
    shared: a group is one line, of its prompt and all its answers (at most: what answers start with alike counts for each, and is
    computed once), else a line is one sequence.
    """
    units = [u for g in torch.unique(batch.group).tolist() for u in _units(batch, g, tokens, unit, shared)]
    units.sort(key=lambda u: (-_line_length(batch, u, shared), u[0]))
    result: list[Tensor] = []
    current: list[int] = []
    lines = longest = 0
    for u in units:
        n, line = (1 if shared else len(u)), _line_length(batch, u, shared)
        if current and (lines + n) * max(longest, line) > tokens:
            result.append(torch.tensor(current))
            current, lines, longest = [], 0, 0
        current, lines, longest = current + u, lines + n, max(longest, line)
    if current:
        result.append(torch.tensor(current))
    return result


def _units(batch: Batch, group: int, tokens: int, unit: str, shared: bool) -> list[list[int]]:
    rows: list[int] = torch.nonzero(batch.group == group).flatten().tolist()
    if unit == "group":
        return [rows]
    if not shared:
        return [[r] for r in rows]
    units: list[list[int]] = []
    most = tokens + int(batch.prompt_length[rows[0]])
    for r in rows:
        if units and _line_length(batch, [*units[-1], r], True) <= most:
            units[-1].append(r)
        else:
            units.append([r])
    return units


def _line_length(batch: Batch, rows: list[int], shared: bool) -> int:
    lengths = [int(batch.length[r]) for r in rows]
    if not shared:
        return max(lengths)
    prompt = int(batch.prompt_length[rows[0]])
    return prompt + sum(n - prompt for n in lengths)


def _ranks(group: Tensor, reward: Tensor) -> Tensor:
    """[B]: how many rows of the same group have a strictly higher reward; unknown rewards compare as lowest."""
    known = torch.nan_to_num(reward, nan=-math.inf)
    better = (group[:, None] == group[None, :]) & (known[None, :] > known[:, None])
    return better.sum(dim=1)
