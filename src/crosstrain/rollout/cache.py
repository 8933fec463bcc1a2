"""Keys and values of a batch, in memory that is allocated once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class PreallocatedCache:
    """Keys and values [lines, heads, capacity, dim] of every layer, written in place, as transformers' models call a cache.

    Lines are aligned on the right: all of them write to the same column, and shorter ones have unused columns on the left.
    It is not a transformers Cache, which grows by concatenation or cannot change its lines: attention asks for `update`, the
    mask for the lengths, and nothing else. Models that ask for more (state-space layers, layers that share keys) are not served.

    real: [lines, capacity] bool, the columns that hold a token of the line, or will: those that are not written yet are True.
    length: columns written so far. Memory may be there for more lines than are in use, see `fork`.
    """

    is_compileable = False

    def __init__(self, real: Tensor) -> None:
        self.real = real
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return int(self.real.shape[0])

    @property
    def capacity(self) -> int:
        """How many columns there is room for."""
        return int(self.real.shape[1])

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new columns of a layer, [lines, heads, new, dim], and return all of its keys and values so far."""
        if layer_idx == len(self.keys):  # the first pass: what it gives is all there is
            self.keys.append(key)
            self.values.append(value)
            return key, value
        end = self.length + key.shape[2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[: self.lines, :, self.length : end] = key
        values[: self.lines, :, self.length : end] = value
        return keys[: self.lines, :, :end], values[: self.lines, :, :end]

    def advance(self, columns: int) -> None:
        """After a forward pass over new columns."""
        self.length += columns

    def mask(self, columns: int) -> Tensor:
        """[lines, length + columns] bool: transformers' padding mask for a forward pass over new columns."""
        return self.real[:, : self.length + columns]

    def fork(self, source: Tensor) -> None:
        """Add lines that are copies of the lines `source`, [n], in memory that `merge` has kept for them: its `most` in all."""
        new = slice(self.lines, self.lines + len(source))
        self.real = torch.cat([self.real, self.real[source]])
        for tensor in (*self.keys, *self.values):
            tensor[new, :, : self.length] = tensor[:, :, : self.length].index_select(0, source)

    def keep(self, source: Tensor) -> Tensor:
        """Drop all lines but `source`, [n], rising, in the same memory: those from n on move to where dropped ones were, and
        columns that none of them uses are left out. Returns [n], where each of them is then."""
        n = len(source)
        moved = source[source >= n]
        free = torch.ones(n, dtype=torch.bool, device=source.device)
        free[source[source < n]] = False
        holes = torch.nonzero(free).flatten()
        self.real[holes] = self.real[moved]
        first = int(self.real[:n, : self.length].any(dim=0).int().argmax())
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensor[holes, :, first : self.length] = tensor[:, :, first : self.length].index_select(0, moved)
                tensors[i] = tensor[:, :, first:]
        self.real = self.real[:n, first:]
        self.length -= first
        return torch.cat([source[source < n], holes])

    def close_gaps(self) -> None:
        """Move the unused columns of every line to its left; positions are in the keys, so that their order is free.

        Only before lines are added or dropped: the memory must be of exactly as many as there are.
        """
        order = self.real.int().argsort(dim=1, stable=True)
        self.real = self.real.gather(1, order)
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor.gather(2, order[:, None, :, None].expand_as(tensor))

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Columns written before the current forward pass."""
        return self.length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many columns attention will see, and the first of them."""
        return self.length + query_length, 0


def merge(parts: Sequence[tuple[PreallocatedCache, Tensor]], most: int, room: int) -> PreallocatedCache:
    """One cache of the chosen lines of each part, with room for `most` lines in all and further columns. The parts are emptied.

    parts: caches with the lines to take, in order; a line may be taken several times (a prompt for each of its completions).
    Columns that no chosen line uses are dropped. On a processor all layers are in one piece of memory, which goes back to the
    system in one piece, when its last layer is empty, and of which only what is in use is ever touched; elsewhere a layer's old
    memory is freed before the next is allocated.
    """
    used = [cache.real[lines, : cache.length] for cache, lines in parts]
    needs = [int(real.shape[1] - real.any(dim=0).int().argmax()) for real in used]
    columns, total = max(needs), sum(len(real) for real in used)
    real = used[0].new_zeros(total, columns + room)
    real[:, columns:] = True
    starts = [sum(len(u) for u in used[:i]) for i in range(len(used))]
    for u, need, start in zip(used, needs, starts, strict=True):
        real[start : start + len(u), columns - need : columns] = u[:, u.shape[1] - need :]
    merged = PreallocatedCache(real)
    merged.length = columns
    first = parts[0][0]
    wanted = [
        ((most, t.shape[1], columns + room, t.shape[3]), t.dtype, t.device)
        for pair in zip(first.keys, first.values, strict=True)
        for t in pair
    ]
    targets = _allocate(wanted)
    for layer in range(len(first.keys)):
        for name in ("keys", "values"):
            target = next(targets)
            for (cache, lines), need, start in zip(parts, needs, starts, strict=True):
                tensors: list[Tensor] = getattr(cache, name)
                taken = tensors[layer][:, :, cache.length - need : cache.length].index_select(0, lines)
                tensors[layer] = taken.new_empty(0)  # no name holds what was there
                here = target[start : start + len(lines)]
                here[:, :, : columns - need] = 0  # attention gives added columns weight 0, and 0 * NaN would be NaN
                here[:, :, columns - need : columns] = taken
                del taken
            getattr(merged, name).append(target)
    return merged


def _allocate(wanted: Sequence[tuple[tuple[int, ...], torch.dtype, torch.device]]) -> Iterator[Tensor]:
    """Tensors of these shapes, dtypes and devices, one when it is asked for; on a processor in one piece of memory."""
    kinds = {(dtype, device.type) for _, dtype, device in wanted}
    if len(kinds) == 1 and kinds.pop()[1] == "cpu":
        sizes = [math.prod(shape) for shape, _, _ in wanted]
        pieces = torch.empty(sum(sizes), dtype=wanted[0][1]).split(sizes)
        yield from (piece.view(shape) for piece, (shape, _, _) in zip(pieces, wanted, strict=True))
    else:
        yield from (torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in wanted)
