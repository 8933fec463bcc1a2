"""The key-value cache: in-place writes, and merging rows of several caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosstrain.rollout.cache import PreallocatedCache, merge


def filled(lengths: list[int], mark: float) -> PreallocatedCache:
    """A cache of two layers whose entries say where they belong; padding is -1."""
    width = max(lengths)
    real = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    cache = PreallocatedCache(real)
    for layer in range(2):
        entry = (
            mark
            + layer
            + torch.arange(len(lengths))[:, None] * 10
            + torch.arange(width)
            - (width - torch.tensor(lengths))[:, None] * 1.0
        )
        key = torch.where(real, entry, -1.0)[:, None, :, None].expand(-1, 3, -1, 4)
        cache.update(key, key + 0.5, layer)
    cache.advance(width)
    return cache


def row(cache: PreallocatedCache, i: int, layer: int = 0) -> Tensor:
    return cache.keys[layer][i, 0, : cache.length, 0][cache.real[i, : cache.length]]


def test_merged_rows_keep_their_entries_aligned_on_the_right_with_zeros_before_them() -> None:
    one, two = filled([5, 2, 3], 100.0), filled([4, 1], 1000.0)
    wanted = [(one, [1, 2, 2], 100.0), (two, [1, 0], 1000.0)]
    expected = [row(cache, i, layer).clone() for layer in range(2) for cache, index, _ in wanted for i in index]
    merged = merge([(cache, torch.tensor(index)) for cache, index, _ in wanted], 5, room=3)
    assert (merged.lines, merged.length, merged.capacity) == (5, 4, 7)  # the row of 5 is gone and its columns with it
    assert merged.real[:, :4].sum(dim=1).tolist() == [2, 3, 3, 1, 4]
    found = [row(merged, i, layer) for layer in range(2) for i in range(5)]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    for tensor in (*merged.keys, *merged.values):  # the first part needs 3 of the 4 columns
        assert (tensor[:3, :, 0] == 0).all(), "added columns must be zeros: in attention 0 * NaN would be NaN"


def test_merging_frees_the_memory_of_its_parts() -> None:
    part = filled([3, 3], 0.0)
    merge([(part, torch.tensor([0, 1, 1]))], 3, room=1)
    assert all(tensor.numel() == 0 for tensor in (*part.keys, *part.values))


def test_new_columns_are_written_in_place() -> None:
    cache = merge([(filled([2, 3], 0.0), torch.tensor([0, 1]))], 2, room=2)
    memory = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    for step in (7.0, 8.0):
        assert cache.get_mask_sizes(1, 0) == (cache.length + 1, 0)
        for layer in range(2):
            keys, values = cache.update(torch.full((2, 3, 1, 4), step), torch.full((2, 3, 1, 4), -step), layer)
            assert keys.shape[2] == values.shape[2] == cache.length + 1
            assert (keys[:, :, -1] == step).all()
            assert (values[:, :, -1] == -step).all()
        assert cache.mask(1)[:, -1].all()
        cache.advance(1)
    assert cache.length == cache.capacity == cache.get_seq_length()
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == memory


def test_a_fork_is_a_copy_in_memory_that_is_there_already() -> None:
    cache = merge([(filled([2, 3], 0.0), torch.tensor([0, 1]))], 4, room=2)
    memory = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    expected = [row(cache, i, layer).clone() for layer in range(2) for i in (0, 1, 1, 0)]
    cache.fork(torch.tensor([1, 0]))
    assert (cache.lines, cache.length, cache.capacity) == (4, 3, 5)
    assert all(torch.equal(row(cache, i, layer), expected[4 * layer + i]) for layer in range(2) for i in range(4))
    cache.update(torch.arange(4.0)[:, None, None, None].expand(4, 3, 1, 4), torch.zeros(4, 3, 1, 4), 0)
    assert cache.keys[0][:, 0, 3, 0].tolist() == [0.0, 1.0, 2.0, 3.0], "each goes on by itself"
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == memory


@pytest.mark.parametrize("kept", [[1, 4], [0, 1, 2], [3], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_rows_that_are_kept_stay_or_move_to_where_others_were(kept: list[int]) -> None:
    cache = merge([(filled([5, 2, 3, 4, 1], 100.0), torch.arange(5))], 6, room=2)
    memory = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    expected = [[row(cache, i, layer).clone() for layer in range(2)] for i in kept]
    at = cache.keep(torch.tensor(kept))
    assert cache.lines == len(kept) and sorted(at.tolist()) == list(range(len(kept)))
    for place, wanted in zip(at.tolist(), expected, strict=True):
        assert all(torch.equal(row(cache, place, layer), wanted[layer]) for layer in range(2))
    width = max([5, 2, 3, 4, 1][i] for i in kept)
    assert cache.length == width and cache.capacity == width + 2, "columns that nobody uses any more are left out"
    step = 4 * (5 - width)  # fp32 entries of 4 dimensions
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == [m + 4 * step for m in memory]
    cache.fork(torch.tensor([0]))
    assert torch.equal(row(cache, len(kept)), row(cache, 0))
