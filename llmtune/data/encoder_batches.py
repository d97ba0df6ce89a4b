"""Texts into what an encoder reads: padded side by side, or packed end to end in one row.

Shape legend: B rows of a batch, T positions. Beside what `llmtune.data.collators` names, a batch may hold
`token_type_ids`, int64 [B, T]: which of two texts a token belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmtune.data.collators import documents_of
from llmtune.errors import EnvironmentProblem
from llmtune.records import Batch, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position where nothing is predicted."""


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Put rows of numbers side by side, padded on the right: int64 [B, T]."""
    padded = np.full((len(rows), max(1, *map(len, rows)) if rows else 1), value, dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)


def pad_texts(examples: Sequence[Example], pad_id: int | None) -> Batch:
    """Return ids and mask, padded, and kinds of tokens where the examples have them."""
    ids = [example.input_ids for example in examples]
    batch: Batch = {
        "input_ids": pad(ids, pad_id or 0),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "n_rows": len(examples),
    }
    if kinds := _token_kinds(examples):
        batch["token_type_ids"] = pad(kinds, 0)
    return batch


def encoder_batch(examples: Sequence[Example], pad_id: int | None, packs: bool) -> tuple[Batch, list[int]]:
    """Return what an encoder reads, and the flat index in B * T of each text's first token.

    Packed texts stand in one row, with positions from 0 in each.
    """
    if not packs:
        batch = pad_texts(examples, pad_id)
        width = batch["input_ids"].shape[1]
        return batch, [row * width for row in range(len(examples))]
    batch = {**documents_of([np.asarray(example.input_ids, dtype=np.int64) for example in examples])}
    batch["n_rows"] = len(examples)
    if kinds := _token_kinds(examples):
        batch["token_type_ids"] = torch.tensor([kind for row in kinds for kind in row], dtype=torch.int64)[None]
    return batch, batch["cu_seq_lens_q"][:-1].tolist()


def _token_kinds(examples: Sequence[Example]) -> list[list[int]]:
    """Return which of two texts each token belongs to; nothing where no example says."""
    if not any(len(example.third_ids) for example in examples):
        return []
    return [list(example.third_ids) or [0] * len(example.input_ids) for example in examples]


def require_offsets(processor: PreTrainedTokenizerBase) -> None:
    """Raise EnvironmentProblem for a tokenizer that cannot say where in the text its tokens come from."""
    if not processor.is_fast:
        what = f"{type(processor).__name__} does not say where in a text its tokens stand"
        raise EnvironmentProblem.of(what, str(processor.name_or_path), "Use a model with a tokenizer.json.")
