"""Answers generated side by side: prompts join at any step, and leave when their answer ends.

Shapes: B rows, N rows that join, T columns, V vocabulary. All rows end in the same column, whenever they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmtune.evaluate.greedy_decoding import Columns, Writing, run
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for

HEADROOM = 128
"""Columns that are reserved ahead: so many steps go by before all keys and values have to be copied."""


class LiveRows:
    """The keys and values of answers that are being generated; a row is named by its slot, 0 to B - 1."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.model, self.device = model, device
        self.lengths: list[int] = []
        """Tokens that each row has keys and values of."""
        self.columns = Columns(0, 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def join(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read prompts, which take the slots behind those that are there; return the logits [N, V] that follow."""
        reading = Writing(self.model, prompts, 1, self.device)
        logits_NV = reading.read(0, budget_for(self.device, TOKEN_BUDGET))
        first, sizes = len(self), [len(prompt) for prompt in prompts]
        self.lengths += sizes
        self._make_room(first)
        end = self.columns.end
        for number, read in reading.columns.kept.items():
            if number not in self.columns.kept:
                parts = [self._reserve(part) for part in (read.keys, read.values)]
                self.columns.kept[number] = replace(read, keys=parts[0], values=parts[1])
            here = self.columns.kept[number]
            for row, i in enumerate(reading.order):
                slot, size = first + i, sizes[i]
                here.keys[slot, :, end - size : end] = read.keys[row, :, reading.width - size :]
                here.values[slot, :, end - size : end] = read.values[row, :, reading.width - size :]
        slots = torch.tensor(reading.order, device=logits_NV.device).argsort()
        return logits_NV[slots]

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Write a token to each row; return the logits [B, V] of what follows."""
        columns = self.columns
        if columns.end == columns.width:
            self._lay(len(self), columns.rows)
        columns = self.columns
        columns.at_work, columns.first = slice(0, len(self)), columns.end - max(self.lengths)
        lengths_B = torch.tensor(self.lengths, device=self.device)
        seen_T = torch.arange(columns.first, columns.end + 1, device=self.device)
        mask_BT = (seen_T[None] >= columns.end - lengths_B[:, None]).long()
        logits_BV = run(self.model, columns, tokens_B[:, None], lengths_B[:, None], mask_BT)
        columns.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV

    def leave(self, ended: Sequence[int]) -> list[int]:
        """Let rows go, by their slots; return the slots from which the rows that stay come, in their new order."""
        stays, gone = len(self) - len(ended), set(ended)
        holes = [slot for slot in sorted(gone) if slot < stays]
        last = [slot for slot in range(stays, len(self)) if slot not in gone]
        self.columns.first = self.columns.end - max(self.lengths)
        self.columns.move(holes, last)
        moved = dict(zip(holes, last, strict=True))
        taken = [moved.get(slot, slot) for slot in range(stays)]
        self.lengths = [self.lengths[slot] for slot in taken]
        if not taken:
            self.columns = Columns(0, 0)  # what was reserved is given back
        return taken

    def _make_room(self, before: int) -> None:
        """Give all rows a slot, and room for the longest where they all end; the first `before` are there already."""
        columns = self.columns
        if len(self) > columns.rows or max(self.lengths) > columns.end or columns.end == columns.width:
            self._lay(before, 1 << (len(self) - 1).bit_length())

    def _lay(self, before: int, rows: int) -> None:
        """Copy the keys and values of the first `before` rows into new columns, as far to the left as they can be."""
        old, end = self.columns, max(self.lengths)
        new = Columns(rows, end + HEADROOM)
        new.end = end
        width = max(self.lengths[:before], default=0)
        for number, layer in old.kept.items():
            parts = []
            for part in (layer.keys, layer.values):
                moved = part.new_zeros(rows, part.shape[1], new.width, part.shape[3])
                moved[:before, :, end - width : end] = part[:before, :, old.end - width : old.end]
                parts.append(moved)
            new.kept[number] = replace(layer, keys=parts[0], values=parts[1])
        self.columns = new

    def _reserve(self, part: torch.Tensor) -> torch.Tensor:
        """Return room for all rows; zeros, because what is masked is multiplied all the same."""
        return part.new_zeros(self.columns.rows, part.shape[1], self.columns.width, part.shape[3])
