"""Proof that documents packed in one row do not see one another in this model, on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel

from llmtune.errors import RecipeError
from llmtune.model.causal_lm_loss import predicted_logits
from llmtune.model.device import compute_context
from llmtune.model.packed_attention import PACKED
from llmtune.model.task_losses import read_inputs

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of the logits' standard deviation; a leak or wrong positions move them by about as much as they are."""
_TOKENS = 6
_WIDEST = 256
"""The widest window of an encoder over whose edge its proof looks; more tokens would take a slow machine too long."""


def prove_isolation(model: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    """Compare the logits of a document by itself, after another one, and after a third; `model` is in eval mode.

    By itself it is computed with the model's own eager attention, so that ours is checked against it too.

    Raises RecipeError where they differ: a recurrent state or a private mask carries one document into the next.
    """
    first, other, last = _documents(model, _TOKENS)
    with torch.inference_mode(), compute_context(dtype, model.device.type):
        with _own_attention(model):
            ids = torch.tensor([last], device=model.device)
            alone = model(input_ids=ids, use_cache=False).logits[0].float()
        packed, beside = (
            predicted_logits(model, _pack(documents, model.device)).float()
            for documents in ([first, last], [other, last])
        )
    limit = _TOLERANCE[dtype] * alone.std()
    if _distance(packed, beside) > limit or _distance(packed, alone) > limit:
        raise RecipeError.of(
            f"in {name} rows that are packed together see one another: its architecture keeps no border between them",
            "data.packing",
            "Set data.packing: false.",
        )


def reads_apart(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether an encoder with its head says the same of documents packed together as of each alone; in eval mode.

    Alone they are read with the model's own eager attention. What is compared are the classes of a document, or of a
    token, and what they are held against is by how much documents or tokens differ in them.
    """
    window = getattr(model.config, "sliding_window", None) or 0
    documents = _documents(model, _TOKENS + (window if window <= _WIDEST else 0))
    with torch.inference_mode(), compute_context(dtype, model.device.type):
        with _own_attention(model):
            alone = [_said(model, {"input_ids": torch.tensor([ids], device=model.device)}) for ids in documents]
        together = _said(model, _pack(documents, model.device))
    wanted = torch.cat(alone)
    limit = _TOLERANCE[dtype] * wanted.std(0).mean()
    return together.shape == wanted.shape and bool(_distance(together, wanted) <= limit)


def _said(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Return what the head says: [documents or tokens, classes]."""
    found = model(**read_inputs(model, batch))
    logits = found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], dim=-1)
    return logits.flatten(0, -2).float()


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).square().mean().sqrt()


def _documents(model: PreTrainedModel, length: int) -> list[list[int]]:
    """Return three documents of tokens from all over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    return [[size * (7 * (i % 6 + 1) + (j + i // 6) % 7) // 50 for i in range(length)] for j in (1, 3, 2)]


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    installed = model.config._attn_implementation
    if installed == PACKED:
        model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = installed


def _pack(documents: list[list[int]], device: torch.device) -> dict[str, Any]:
    """Pack as `llmtune.data.collators` does; what is predicted is the last document."""
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
