"""Proof that documents packed in one row do not see one another in this model, on a dozen tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from llmtune.errors import RecipeError
from llmtune.model.attention import PACKED
from llmtune.model.device import compute_context
from llmtune.model.loss import Batch, predicted_logits

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of the logits' standard deviation; a leak or wrong positions move them by about as much as they are."""


def prove_isolation(model: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    """Compare the logits of a document by itself, after another one, and after a third; `model` is in eval mode.

    By itself it is computed with the model's own eager attention, so that ours is checked against it too.

    Raises RecipeError where they differ: a recurrent state or a private mask carries one document into the next.
    """
    size = model.get_input_embeddings().weight.shape[0]
    first, other, last = ([size * (7 * i + j) // 50 for i in range(1, 7)] for j in (1, 3, 2))
    with torch.inference_mode(), compute_context(dtype, model.device.type):
        with _own_attention(model):
            ids = torch.tensor([last], device=model.device)
            alone = model(input_ids=ids, use_cache=False).logits[0].float()
        packed, beside = (
            predicted_logits(model, _pack(documents, model.device)).float()
            for documents in ([first, last], [other, last])
        )
    limit = _TOLERANCE[dtype] * alone.std()
    if (packed - beside).square().mean().sqrt() > limit or (packed - alone).square().mean().sqrt() > limit:
        raise RecipeError.of(
            f"in {name} rows that are packed together see one another: its architecture keeps no border between them",
            "data.packing",
            "Set data.packing: false.",
        )


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    installed = model.config._attn_implementation
    if installed == PACKED:
        model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = installed


def _pack(documents: list[list[int]], device: torch.device) -> Batch:
    """Pack as `llmtune.data.collate` does; what is predicted is the last document."""
    ids = torch.tensor([token for document in documents for token in document], device=device)
    starts = torch.tensor([0, *accumulate(map(len, documents))], dtype=torch.int32, device=device)
    longest = max(map(len, documents))
    predict = torch.arange(len(ids) - len(documents[-1]), len(ids), device=device)
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(len(document), device=device) for document in documents])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "predict_S": predict,
        "targets_S": ids[predict],
    }
