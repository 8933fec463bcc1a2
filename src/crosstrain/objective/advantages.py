"""Credit from rewards: pure functions `Batch -> [B]`, without gradient.

NaN where the reward is unknown: a term that then reads it makes the run stop and name the example.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosstrain.objective.words import says
from crosstrain.types import Batch, Source


@says("R")
def raw_reward(batch: Batch) -> Tensor:
    """The reward itself, [B]: REINFORCE without a baseline."""
    return batch.reward


@says("max(R, 0)")
def positive_reward(batch: Batch) -> Tensor:
    """max(reward, 0), [B]: rejection sampling trains on what was right (RAFT, arXiv:2504.11343 as loss)."""
    return batch.reward.clamp(min=0.0)


@says("1")
def ones(batch: Batch) -> Tensor:
    """1 for every row, [B]: imitation."""
    return torch.ones_like(batch.reward)


@says("R - mean R of the group")
def centred(batch: Batch, over: tuple[Source, ...] = (Source.EXPERT, Source.POLICY)) -> Tensor:
    """reward minus the mean reward of its group, [B] (Dr. GRPO, arXiv:2503.20783).

    over: whose trajectories the mean is taken over. A group with none of them keeps a mean of 0; one alone has nothing to
    differ from, and gets 0 (verl: its reward).

    >>> from crosstrain.testing import tiny_batch
    >>> centred(tiny_batch(rewards=[1.0, 0.0, 0.0, 1.0], groups=[0, 0, 0, 1])).tolist()  # doctest: +ELLIPSIS
    [0.666..., -0.333..., -0.333..., 0.0]
    """
    return centred_on(batch, _written_by(batch, over))


def centred_on(batch: Batch, rows: Tensor) -> Tensor:
    """reward minus the mean reward of those of its group that are among `rows`, [B] bool; a group with none keeps a mean of 0."""
    return (_exact(batch.reward) - mean_over(batch, batch.reward, rows)).to(batch.reward)


def mean_over(batch: Batch, values: Tensor, rows: Tensor) -> Tensor:
    """[B] in fp64 on the CPU: the mean of `values` [B] over those of each row's group that are among `rows`, [B] bool; else 0."""
    return _group_mean_and_count(batch, _exact(values), rows.cpu())[0]


@says("(R - mean R) / std R of the group")
def group_normalised(batch: Batch, std_eps: float = 1e-6, over: tuple[Source, ...] = (Source.EXPERT, Source.POLICY)) -> Tensor:
    """(reward - group mean) / (group std + std_eps), [B], std with n - 1 (GRPO, arXiv:2402.03300).

    A group of one has mean 0 and std 1, so its advantage is the raw reward (as verl and the authors' code have it). over: whose
    trajectories mean and std are taken over.

    >>> from crosstrain.testing import tiny_batch
    >>> a = group_normalised(tiny_batch(rewards=[1.0, 0.0, 1.0], groups=[0, 0, 1]))
    >>> [round(x, 4) for x in a.tolist()]
    [0.7071, -0.7071, 1.0]
    """
    reward = _exact(batch.reward)
    member = _written_by(batch, over).cpu()
    mean, count = _group_mean_and_count(batch, reward, member)
    deviation = reward - mean
    variance_sum = _group_sum(batch, torch.where(member, deviation**2, torch.zeros_like(deviation)))
    std = (variance_sum / (count - 1)).sqrt()  # not read in a group of one
    return torch.where(count <= 1, reward, deviation / (std + std_eps)).to(batch.reward)


def whitened(batch: Batch, values: Tensor, eps: float = 1e-8) -> Tensor:
    """(values - mean) / (std + eps), [B], mean and std (with n - 1) over all own trained tokens of the step, a row counting as
    often as it has such tokens, and not by what tools answered (REINFORCE++, arXiv:2501.03262). values: [B]. With fewer than
    two tokens, 0."""
    value, count = _exact(values), batch.written_by(Source.POLICY).sum(dim=1).cpu().to(torch.float64)
    total = count.sum()
    if total < 2:
        return torch.zeros_like(values)
    mean = (value * count).sum() / total
    std = ((value - mean) ** 2 * count).sum().div(total - 1).sqrt()
    return ((value - mean) / (std + eps)).to(values)


@says("R - mean R of the others of the group")
def leave_one_out(batch: Batch) -> Tensor:
    """reward minus the mean reward of the *other* rows of its group, [B]: n / (n - 1) * centred (RLOO, arXiv:2402.14740).

    A group of one has no others: its advantage is the raw reward.

    >>> from crosstrain.testing import tiny_batch
    >>> leave_one_out(tiny_batch(rewards=[1.0, 0.0, 0.5, 2.0], groups=[0, 0, 0, 1])).tolist()
    [0.75, -0.75, 0.0, 2.0]
    """
    reward = _exact(batch.reward)
    total = _group_sum(batch, reward)
    count = _group_sum(batch, torch.ones_like(reward))
    others = (total - reward) / (count - 1)  # not read in a group of one
    return torch.where(count == 1, reward, reward - others).to(batch.reward)


def _exact(reward: Tensor) -> Tensor:
    """Rewards in fp64, where sums of fp32 numbers are exact: equal rewards then have advantage 0.

    In fp32, seven rewards of 0.1 have a mean of 0.1 + 7e-9, which a std of 8e-9 + 1e-6 would turn into an advantage of -0.007.
    On the CPU because some accelerators have no fp64, and there is one number per sequence.
    """
    return reward.to(device="cpu", dtype=torch.float64)


def _written_by(batch: Batch, sources: tuple[Source, ...]) -> Tensor:
    """[B] bool: rows with a token of one of `sources`, trained or not (a masked truncation still has a reward)."""
    hit = torch.zeros_like(batch.reward, dtype=torch.bool)
    for source in sources:
        hit |= (batch.source == int(source)).any(dim=1)
    return hit


def _group_index(batch: Batch) -> Tensor:
    """[B] int64: group numbers made dense, so that they can index a tensor."""
    index: Tensor = torch.unique(batch.group.cpu(), return_inverse=True)[1]
    return index


def _group_sum(batch: Batch, values: Tensor) -> Tensor:
    """[B]: each row's sum of `values` over its group."""
    index = _group_index(batch)
    return torch.zeros_like(values).index_add(0, index, values)[index]  # there are at most as many groups as rows


def _group_mean_and_count(batch: Batch, values: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    count = _group_sum(batch, member.to(values.dtype))
    total = _group_sum(batch, torch.where(member, values, torch.zeros_like(values)))
    return total / count.clamp(min=1), count
