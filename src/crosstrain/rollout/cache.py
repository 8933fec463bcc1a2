"""Keys and values of a decode batch in preallocated memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class PreallocatedCache:
    """Keys and values [rows, heads, width, dim] of every layer, written in place, as transformers' attention calls it.

    Not a transformers Cache: attention only needs `update` and the model only `get_seq_length`; masks and positions are given.
    """

    is_compileable = False

    def __init__(self, width: int) -> None:
        self.width = width
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new positions of a layer and return all of its keys and values so far."""
        if layer_idx == len(self.keys):
            rows, heads, _, _ = key.shape
            self.keys.append(key.new_empty(rows, heads, self.width, key.shape[-1]))
            self.values.append(value.new_empty(rows, heads, self.width, value.shape[-1]))
        end = self.length + key.shape[2]
        self.keys[layer_idx][:, :, self.length : end] = key
        self.values[layer_idx][:, :, self.length : end] = value
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions written so far."""
        return self.length

    def advance(self, n: int) -> None:
        """After a forward pass over `n` new positions."""
        self.length += n

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times (a prompt for each of its completions)."""
        self.keys = [_written(k, rows, self.length) for k in self.keys]
        self.values = [_written(v, rows, self.length) for v in self.values]


def _written(tensor: Tensor, rows: Tensor, length: int) -> Tensor:
    """The rows of a cache tensor, copying only the positions written so far."""
    result = tensor.new_empty(len(rows), *tensor.shape[1:])
    result[:, :, :length] = tensor[:, :, :length].index_select(0, rows)
    return result
