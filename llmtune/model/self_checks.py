"""Check a loaded model on a few tokens: packed rows do not see one another, the loss equals that of its logits.

Shapes: T positions of all documents, V vocabulary or classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from llmtune.data.collators import documents_of, pad
from llmtune.errors import first_line
from llmtune.model.causal_lm_loss import causal_loss, model_inputs, move_to, predicted_logits, token_losses
from llmtune.model.chunked_cross_entropy import install_head_loss, remove_head_loss
from llmtune.model.device import REFUSALS, SuppressRefusal, compute_context, is_out_of_memory
from llmtune.model.packed_attention import PACKED
from llmtune.model.prefix_packing import allow_shared_prefixes
from llmtune.records import Batch

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far logits of two ways may differ (root mean square), in standard deviations.

A leak or wrong positions change them by about one standard deviation."""
_LOSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Relative to a token's nats; the dtypes round logits of a few units by about this much."""
_TOKENS = 6
_WIDEST = 256
"""Largest encoder window that the check crosses; more tokens would take too long on a slow machine."""


def logits_agree(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> bool:
    """Whether logits computed in two ways are equal up to rounding in `dtype`.

    The difference is relative to `scale`, by default the standard deviation of `other`.
    """
    apart = (one - other).square().mean().sqrt()
    return bool(apart <= LOGIT_TOLERANCE.get(dtype, 0.1) * (other.std() if scale is None else scale))


def isolates_documents(model: PreTrainedModel, dtype: torch.dtype, decodes: bool) -> bool:
    """Whether packed documents get the same logits as each gets alone; `model` is in eval mode.

    Single documents use the model's own eager attention, which also checks our attention. Compares next tokens if it
    `decodes`, else the classes of a document or token.
    """
    window = 0 if decodes else getattr(model.config, "sliding_window", None) or 0
    documents = _documents(model, _TOKENS + (window if window <= _WIDEST else 0))
    read = predicted_logits if decodes else _class_logits
    with SuppressRefusal(), torch.inference_mode(), compute_context(dtype, model.device.type):
        with _own_attention(model):
            packed = [_pack_documents([document], model.device) for document in documents]
            alone = torch.cat([read(model, one).float() for one in packed])
        together = read(model, _pack_documents(documents, model.device)).float()
        scale = None if decodes else alone.std(0).mean()
        return together.shape == alone.shape and logits_agree(together, alone, dtype, scale)
    return False


def take_loss_at_head(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Make `model`, in place, compute its loss without full logits; return whether the result is correct.

    The two are compared on a few tokens, with compute dtype `dtype`; `model` is in eval mode.
    """
    if not install_head_loss(model):
        return False
    size = _vocabulary(model)
    batch = _pack_documents([[size * (7 * i % 10) // 10 for i in range(1, 9)]], model.device)
    with torch.inference_mode(), compute_context(dtype, model.device.type):
        at_head = causal_loss(model, batch, by_row=True).row_sums
        of_logits = token_losses(predicted_logits(model, batch), batch, by_row=True).row_sums
    assert at_head is not None
    assert of_logits is not None
    if torch.allclose(at_head, of_logits, rtol=_LOSS_ERROR[dtype], atol=_LOSS_ERROR[dtype]):
        return True
    remove_head_loss(model)
    return False


def try_shared_prefixes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let documents of a packed row share their prefix, in place, if the results are the same as without sharing.

    A recurrent state, for example, does not continue from a shared prefix. `model` computes its loss at the head, and
    is in eval mode.
    """
    beginning = _documents(model, 2 * _TOKENS)[0]
    documents = [[*beginning, *rest] for rest in _documents(model, _TOKENS)]
    batch = _pack_documents(documents, model.device)
    allowed = False
    with SuppressRefusal(), torch.inference_mode(), compute_context(dtype, model.device.type):
        losses = []
        for shares in (False, True):
            allow_shared_prefixes(model, shares)
            losses.append(causal_loss(model, batch, by_row=True).row_sums)
        apart, shared = losses
        assert apart is not None
        assert shared is not None
        allowed = logits_agree(shared, apart, dtype)
    allow_shared_prefixes(model, allowed)


def explain_unreadable(model: PreTrainedModel, dtype: torch.dtype, padding: int, writes: bool) -> str | None:
    """Return what prevents `model`, in eval mode, from reading rows of text; None if nothing does.

    Tries a few tokens. Checks whether a padded row gets the same result as alone, and, if next tokens are predicted
    (`writes`), whether they are hidden until then.
    """
    try:
        with torch.inference_mode(), compute_context(dtype, model.device.type):
            alone, beside = (_scores_of_first(model, rows, padding) for rows in ([_TOKENS], [_TOKENS, 2 * _TOKENS]))
            ahead = alone
            if writes and model.config.is_encoder_decoder:
                ahead = _scores_of_first(model, [_TOKENS], padding, _TOKENS // 2)
            elif writes:
                ahead = _scores_of_first(model, [2 * _TOKENS], padding)
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        return f"cannot read text alone: {first_line(error)}"
    if not alone.isfinite().all():  # the wiring check reports it
        return None
    scale, same = alone.square().mean().sqrt(), min(len(ahead), len(alone))
    if not logits_agree(beside, alone, dtype, scale):
        return "reads a row differently next to a longer one: it does not ignore padding"
    if not logits_agree(ahead[:same], alone[:same], dtype, scale):
        return "sees the tokens that it should predict: it is not a decoder, or not configured as one"
    return None


def _scores_of_first(
    model: PreTrainedModel, lengths: Sequence[int], padding: int, written: int = _TOKENS
) -> torch.Tensor:
    """Return the head's outputs for the first of some rows, which are padded; `written` tokens go to a decoder."""
    ids = [row[:length] for row, length in zip(_documents(model, max(lengths)), lengths, strict=False)]
    read = {"input_ids": pad(ids, padding), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
    inputs = model_inputs(model, {name: part.to(model.device) for name, part in read.items()})
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :written]
    logits = _head_logits(model, inputs)
    return logits[0, : lengths[0]].float() if logits.dim() > 2 else logits[0].float()


def positions_depend_on_neighbours(model: torch.nn.Module, length: int) -> bool:
    """Whether rotary positions of a short row change next to a row of `length` tokens.

    RoPE of kind `longrope` or `dynamic` scales with the longest row of a batch, beyond the length of its pretraining.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in named.items():
            if kind == "longrope" or "dynamic" in str(kind):
                alone, beside = (_rotate(module, layer_type, ends) for ends in ((_TOKENS,), (_TOKENS, length)))
                if not all(map(torch.equal, alone, beside)):
                    return True
    return False


def _rotate(rotary: torch.nn.Module, layer_type: str | None, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return the sines and cosines of the first of some rows, on a copy: a module keeps the scale that it last used."""
    positions_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    named = {} if layer_type is None else {"layer_type": layer_type}
    rotated = copy.deepcopy(rotary).to("cpu")(torch.zeros(1), positions_1T, **named)
    return [part[:, : lengths[0]] for part in (rotated if isinstance(rotated, tuple) else (rotated,))]


def _class_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the head's outputs: [documents or tokens, V]."""
    return _head_logits(model, model_inputs(model, batch)).flatten(0, -2)


def _head_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if name in output:
            return cast(torch.Tensor, output[name])
    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def _documents(model: PreTrainedModel, length: int) -> list[list[int]]:
    """Return three documents with tokens from all over the vocabulary."""
    size = _vocabulary(model)
    return [[size * (7 * (i % 6 + 1) + (j + i // 6) % 7) // 50 for i in range(length)] for j in (1, 3, 2)]


def _vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens: the embedding can have more rows, and the configuration more tokens."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    return min(rows, int(getattr(model.config.get_text_config(), "vocab_size", rows)))


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    installed = model.config._attn_implementation
    if installed == PACKED:
        model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = installed


def _pack_documents(documents: list[list[int]], device: torch.device) -> Batch:
    """Pack documents, a single one without lengths; each position's logits are those of its own token."""
    several = len(documents) > 1
    batch = documents_of([np.asarray(ids) for ids in documents]) if several else {"input_ids": torch.tensor(documents)}
    ids_T = batch["input_ids"][0]
    positions_S = torch.arange(len(ids_T))
    read = {"predict_S": positions_S, "targets_S": ids_T, "rows_S": positions_S, "n_rows": len(ids_T)}
    return move_to(device, batch | read)
