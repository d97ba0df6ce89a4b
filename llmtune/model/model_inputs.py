"""What a model reads of a batch, whatever is predicted from it.

Shapes: B rows of a batch, T positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.model.packed_attention import LENGTHS, PACKED
from llmtune.records import Batch

READ = ("input_ids", "attention_mask", "token_type_ids", "input_features", "input_values")
"""What models read, by its name in a batch."""
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", LENGTHS)
"""What they read beside that of a packed row; positions follow from it."""


def move_to(device: torch.device | str, batch: Batch) -> Batch:
    """Return a batch whose tensors are on the device; numbers and settings beside them stay as they are."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def read_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what of a batch this model reads; features of sound in the number format of its weights."""
    inner = unwrap(model)
    accepted = accepted_arguments(type(inner))  # type: ignore[arg-type]
    parts = {key: batch[key] for key in READ if key in batch and key in accepted}
    inputs = {key: part.to(inner.dtype) if part.is_floating_point() else part for key, part in parts.items()}
    if "cu_seq_lens_q" in batch:
        assert inner.config._attn_implementation == PACKED, "rows are packed for a model that keeps them apart"
        inputs |= {key: batch[key] for key in DOCUMENTS}
    return inputs


def decoder_inputs(model: torch.nn.Module, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return what the decoder reads to predict `labels_BT` (-100 is padding): moved right, as this model starts."""
    inner = unwrap(model)
    shift = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return cast(torch.Tensor, shift(labels=labels_BT))
    moved_BT = labels_BT.new_full(labels_BT.shape, inner.config.pad_token_id)
    moved_BT[:, 1:] = labels_BT[:, :-1].clamp_min(0)
    moved_BT[:, 1:].masked_fill_(labels_BT[:, :-1] < 0, inner.config.pad_token_id)
    moved_BT[:, 0] = inner.config.decoder_start_token_id
    return moved_BT
