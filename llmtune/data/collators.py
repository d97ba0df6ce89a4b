"""Collates examples into the tensors of one micro-batch: packed end to end in one row, or padded to equal length.

Shape legend: B rows of a batch, T positions of a row, S predicted tokens of the batch, D documents packed in one row.

A batch is a dict of CPU tensors:

    input_ids       int64 [B, T]
    position_ids    int64 [B, T]   packed only: B = 1 and positions restart at each document; else the model counts
    attention_mask  int64 [B, T]   padded only
    cu_seq_lens_q, cu_seq_lens_k   int32 [D + 1], packed only: the start of each document, and the end of the last
    max_length_q, max_length_k     int, packed only: the longest document
    document_lengths  ints, packed only: tokens of each document, known without waiting for the device
    predict_S       int64 [S]      flat index into B * T of the position that predicts
    targets_S       int64 [S]      the token that it predicts
    rows_S          int64 [S]      which example of this micro-batch the token belongs to
    n_rows          int            number of examples
    token_type_ids  int64 [B, T]   encoders only: which of two texts a token belongs to

The names of the packed entries are the arguments of transformers' flash attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from llmtune.data.example import Collate, Example
from llmtune.errors import EnvironmentProblem
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch

Int64 = npt.NDArray[np.int64]


def collate_packed(examples: Sequence[Example], pad_id: int | None = None) -> Batch:
    """Put examples end to end in one row, without padding and without predictions across example borders."""
    assert examples, "a batch has at least one example"
    documents = [np.asarray(example.input_ids, dtype=np.int64) for example in examples]
    batch = documents_of(documents)
    starts = batch["cu_seq_lens_q"][:-1].numpy().astype(np.int64)
    return batch | _predictions(examples, documents, starts)


def documents_of(documents: Sequence[Int64]) -> Batch:
    """Put token ids end to end in one row, and record where each document begins."""
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    borders = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(np.concatenate(documents))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "document_lengths": lengths.tolist(),
    }


def collate_padded(examples: Sequence[Example], pad_id: int | None) -> Batch:
    """Put each example in its own row, padded on the right with `pad_id` (0 if the tokenizer has none)."""
    assert examples, "a batch has at least one example"
    documents = [np.asarray(example.input_ids, dtype=np.int64) for example in examples]
    longest = max(len(document) for document in documents)
    shape = (len(examples), longest)
    input_ids = np.full(shape, pad_id or 0, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for row, document in enumerate(documents):
        input_ids[row, : len(document)] = document
        attention_mask[row, : len(document)] = 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        **_predictions(examples, documents, np.arange(len(examples)) * longest),
    }


def causal_collator(processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
    """Make micro-batches for a decoder: packed or padded, as `packs` or else the recipe decides."""
    make = collate_packed if (recipe.data.packing if packs is None else packs) else collate_padded

    def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
        return make(examples, processor.pad_token_id)

    return collate


def _predictions(examples: Sequence[Example], documents: Sequence[Int64], starts: Int64) -> Batch:
    """Return predict_S, targets_S, rows_S and n_rows. `starts` has the flat index of each document's first token."""
    predict: list[Int64] = []
    targets: list[Int64] = []
    rows: list[Int64] = []
    for row, (example, document, start) in enumerate(zip(examples, documents, starts, strict=True)):
        for first, end in zip(example.spans[::2], example.spans[1::2], strict=True):
            first = max(first, 1)  # token 0 of a document has no context to predict it from
            positions = np.arange(first - 1, end - 1, dtype=np.int64)
            predict.append(positions + start)
            targets.append(document[first:end])
            rows.append(np.full(len(positions), row, dtype=np.int64))
    return {
        "predict_S": _concatenate(predict),
        "targets_S": _concatenate(targets),
        "rows_S": _concatenate(rows),
        "n_rows": len(examples),
    }


def _concatenate(parts: Sequence[Int64]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


# For encoders


IGNORED = -100
"""The label of a position that is not predicted."""


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Pad rows of numbers on the right to equal length: int64 [B, T]."""
    padded = np.full((len(rows), max(1, *map(len, rows)) if rows else 1), value, dtype=np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)


def pad_texts(examples: Sequence[Example], pad_id: int | None) -> Batch:
    """Return padded ids and mask, and token types if the examples have them."""
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
    """Return the encoder's inputs, and the flat index in B * T of each text's first token.

    Packed texts are in one row, with positions from 0 in each.
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
    """Return which of two texts each token belongs to; empty if no example says."""
    if not any(len(example.token_type_ids) for example in examples):
        return []
    return [list(example.token_type_ids) or [0] * len(example.input_ids) for example in examples]


def require_offsets(processor: PreTrainedTokenizerBase) -> None:
    """Raise EnvironmentProblem if the tokenizer cannot map its tokens to positions in the text."""
    if not processor.is_fast:
        what = f"{type(processor).__name__} does not report the offsets of its tokens"
        raise EnvironmentProblem.of(what, str(processor.name_or_path), "Use a model with a tokenizer.json.")
