"""Keys and values of many rows side by side, for writing answers: reserved once, written in place, rows can leave.

Shapes: B rows, K key/value heads, T columns, D head width, N rows at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache


@dataclass
class _Layer:
    """What one layer keeps."""

    keys: torch.Tensor
    """[B, K, T, D]"""
    values: torch.Tensor
    """[B, K, T, D], whose D may be another."""


class Columns(Cache):  # type: ignore[misc]
    """A cache whose rows end in the same column, so that each step writes one column of all of them.

    `DynamicCache` copies all that it holds for every token, and keeps rows that have ended. Windows are left to the
    mask, which the model makes from the columns: within a row they stand as far apart as its tokens.
    """

    def __init__(self, rows: int, width: int) -> None:
        """Make room for `rows` rows of `width` columns; memory is taken as layers write for the first time."""
        super().__init__(layers=[])
        self.rows, self.width = rows, width
        self.kept: dict[int, _Layer] = {}
        self.at_work = slice(0, rows)
        """The rows that the next forward pass is about."""
        self.first = 0
        """The first column that it sees."""
        self.end = 0
        """The column that it writes first; those before it are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [N, K, t, D] of the rows at work; return all that they see [N, K, t + before, D]."""
        layer = self.kept.get(layer_idx)
        if layer is None:
            layer = self.kept[layer_idx] = _Layer(self._reserve(key_states), self._reserve(value_states))
        stop = self.end + key_states.shape[2]
        layer.keys[self.at_work, :, self.end : stop] = key_states
        layer.values[self.at_work, :, self.end : stop] = value_states
        seen = (self.at_work, slice(None), slice(self.first, stop))
        return layer.keys[seen], layer.values[seen]

    def _reserve(self, states: torch.Tensor) -> torch.Tensor:
        """Return room for all rows; zeros, because what is masked is multiplied all the same."""
        return states.new_zeros(self.rows, states.shape[1], self.width, states.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns the next forward pass finds there."""
        return self.end - self.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys `query_length` queries see at most, and the number of the first."""
        return self.get_seq_length() + query_length, 0

    def copy_beginning(self, source: Columns, rows: slice, start: int, count: int) -> None:
        """Give `rows`, from column `start` on, the first `count` columns of `source`, which has one row."""
        for number, there in source.kept.items():
            if number not in self.kept:
                parts = (there.keys, there.values)
                self.kept[number] = _Layer(*(self._reserve(part) for part in parts))
            here, columns = self.kept[number], slice(start, start + count)
            here.keys[rows, :, columns] = there.keys[:, :, :count]
            here.values[rows, :, columns] = there.values[:, :, :count]

    def move(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Put other rows in the slots of rows that are not needed any more; columns that are seen alone are moved."""
        if not slots:
            return
        columns = slice(self.first, self.end)
        for layer in self.kept.values():
            for part in (layer.keys, layer.values):
                part[list(slots), :, columns] = part[list(rows), :, columns]

    @property
    def column_bytes(self) -> int:
        """Bytes that one column of one row takes up, over all layers."""
        parts = [part for layer in self.kept.values() for part in (layer.keys, layer.values)]
        return sum(part.element_size() * part.shape[1] * part.shape[3] for part in parts)
