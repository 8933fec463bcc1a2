"""Groups to rectangles, and rectangles to micro-batches that lose nothing."""

from __future__ import annotations

import math

import pytest
import torch

from crosstrain.training.batching import cut, distinct_tokens, shared_prompt_length, to_batch, with_advantage
from crosstrain.types import Batch, Example, Group, Source, Trajectory

LETTERS = {"P": Source.PROMPT, "E": Source.EXPERT, "O": Source.POLICY, "T": Source.TOOL}


def trajectory(sources: str, tokens: tuple[int, ...] | None = None, **fields: object) -> Trajectory:
    return Trajectory(tokens or tuple(range(1, len(sources) + 1)), tuple(LETTERS[x] for x in sources), **fields)  # type: ignore[arg-type]


def group(*trajectories: Trajectory, name: str = "a") -> Group:
    return Group(Example(name, "", (1,)), trajectories)


def test_every_field_of_a_small_batch() -> None:
    right = trajectory("PPOO", reward=1.0, behaviour_logp=(math.nan, math.nan, -0.5, -0.25))
    wrong = trajectory("PPO", reward=0.0)
    demonstration = trajectory("PEPTE")
    batch = to_batch([group(right, wrong), group(demonstration, name="b")], step=7)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.source.tolist() == [[0, 0, 2, 2, 0], [0, 0, 2, 0, 0], [0, 1, 0, 3, 1]]
    assert batch.trained.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 1]]
    assert batch.group.tolist() == [0, 0, 1] and batch.rank.tolist() == [0, 1, 0]
    assert batch.length.tolist() == [4, 3, 5] and batch.prompt_length.tolist() == [2, 2, 1]
    assert batch.reward[:2].tolist() == [1, 0] and math.isnan(batch.reward[2])
    behaviour = batch.columns["behaviour_logp"]
    assert behaviour[0, 2:4].tolist() == [-0.5, -0.25] and int(torch.isnan(behaviour).sum()) == 13
    assert bool(torch.isnan(batch.advantage).all())
    assert batch.example_ids == ("a", "a", "b") and batch.step == 7


def test_the_first_token_of_a_sequence_has_nothing_to_be_predicted_from() -> None:
    batch = to_batch([group(trajectory("EEE"))])
    assert batch.trained.tolist() == [[False, True, True]]


def test_only_own_completions_cut_at_the_limit_are_masked() -> None:
    own, cut_own = trajectory("PO", reward=1.0), trajectory("POO", reward=0.0, finished=False)
    cut_demonstration = trajectory("PEE", finished=False)
    batch = to_batch([group(own, cut_own, cut_demonstration)], mask_truncated=True)
    assert batch.trained.sum(dim=1).tolist() == [1, 0, 2]
    assert batch.reward[1] == 0.0
    assert to_batch([group(cut_own)]).trained.sum() == 2


def test_ranks_share_ties_and_put_the_unknown_last() -> None:
    rewards = (0.5, 1.0, None, 1.0, 0.0)
    batch = to_batch([group(*(trajectory("PO", reward=r) for r in rewards))])
    assert batch.rank.tolist() == [2, 0, 4, 0, 3]


def test_a_group_without_trajectories_is_refused() -> None:
    with pytest.raises(ValueError, match="a has no trajectories"):
        to_batch([group()])


def test_a_shared_prompt_ends_where_authors_or_tokens_part() -> None:
    one, other = trajectory("PPPO", (1, 2, 3, 4)), trajectory("PPPO", (1, 2, 9, 4))
    shorter = trajectory("PPOO", (1, 2, 3, 4))
    assert shared_prompt_length([one]) == 3
    assert shared_prompt_length([one, other]) == 2
    assert shared_prompt_length([one, shorter]) == 2
    assert shared_prompt_length([trajectory("OO"), trajectory("OO")]) == 0


def test_an_advantage_per_row_or_per_token() -> None:
    batch = to_batch([group(trajectory("POO"), trajectory("PO"))])
    assert with_advantage(batch, torch.tensor([1.0, -1.0])).advantage.tolist() == [[1, 1, 1], [-1, -1, -1]]
    per_token = torch.arange(6.0).view(2, 3).requires_grad_()
    found = with_advantage(batch, per_token).advantage
    assert torch.equal(found, per_token) and not found.requires_grad
    with pytest.raises(ValueError, match=r"\[B\] or \[B, T\]"):
        with_advantage(batch, torch.zeros(3))


def test_what_a_budget_is_charged_for() -> None:
    """A prompt of 2 shared by answers of 3 and 1, and a lone line of 4: 2 + 3 + 1 + 4."""
    batch = to_batch([group(trajectory("PPOOO"), trajectory("PPO")), group(trajectory("PEEE"), name="b")])
    assert distinct_tokens(batch) == 10


def four_rows() -> Batch:
    return to_batch([group(trajectory("PPPPOOOO"), trajectory("PPPPOO")), group(trajectory("PO"), trajectory("PO"), name="b")])


def test_a_group_is_never_split_when_a_term_needs_it_whole() -> None:
    assert [sorted(c.tolist()) for c in cut(four_rows(), 1, "group")] == [[0, 1], [2, 3]]
    assert [sorted(c.tolist()) for c in cut(four_rows(), 1, "group", shared=False)] == [[0, 1], [2, 3]]


def test_micro_batches_by_hand() -> None:
    """Shared, the first group is one line of 4 + 4 + 2 = 10 tokens, the second one of 1 + 1 + 1 = 3: padded 20 in all."""
    whole = [sorted(c.tolist()) for c in cut(four_rows(), 20, "sequence", shared=True)]
    assert whole == [[0, 1, 2, 3]]
    assert [sorted(c.tolist()) for c in cut(four_rows(), 19, "sequence", shared=True)] == [[0, 1], [2, 3]]
    # a prompt comes on top of what its group's rows add to it, 4 + 2 and 1 + 1
    assert [c.tolist() for c in cut(four_rows(), 6, "token", shared=True)] == [[0, 1], [2, 3]]
    assert [c.tolist() for c in cut(four_rows(), 5, "token", shared=True)] == [[0], [1], [2, 3]]
    assert [c.tolist() for c in cut(four_rows(), 8, "token", shared=False)] == [[0], [1], [2, 3]]
