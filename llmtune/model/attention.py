"""Packed attention: several documents in one row, each attending to itself alone, without a dense mask.

Shapes: B batch (1 when packed), H heads, K key/value heads, T positions, L positions of one document, D head width.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmtune.model.varlen import attend_varlen, has_varlen

PACKED = "llmtune_packed"
"""The name under which transformers knows this attention."""

_LENGTHS = "document_lengths"
_inside_packed: ContextVar[bool] = ContextVar("inside_packed", default=False)


@dataclass(frozen=True)
class Options:
    """What a model hands to its attention beside the tensors; None where it has no such thing."""

    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    """Keys that a query sees, itself included."""
    softcap: float | None = None
    """Scores are pressed into -softcap .. softcap (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """[H] a score per head that takes part in the softmax and brings no value (gpt-oss)."""


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend a document at a time if the lengths of the documents are given, over the whole row otherwise.

    query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D], the signature of transformers' attention interface.
    """
    lengths = kwargs.pop(_LENGTHS, None)
    options = Options(dropout, scaling, sliding_window, softcap, s_aux)
    plain = softcap is None and s_aux is None
    if lengths is None or attention_mask is not None:
        if not plain:
            return attend_scores(query, key, value, attention_mask, options).transpose(1, 2).contiguous(), None
        passed = {**kwargs, "dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return cast(
            tuple[torch.Tensor, None], sdpa_attention_forward(module, query, key, value, attention_mask, **passed)
        )
    if plain and has_varlen(query, dropout):
        out = attend_varlen(query, key, value, kwargs["cu_seq_lens_q"], max(lengths), scaling, sliding_window)
        return out, None
    attend = attend_document if plain else attend_scores_in_document
    documents = zip(*(torch.split(part, lengths, 2) for part in (query, key, value)), strict=True)
    parts = [attend(q, k, v, options) for q, k, v in documents]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def attend_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> torch.Tensor:
    """Attend causally within one document: [1, H, L, D], [1, K, L, D] -> [1, H, L, D]."""
    length = query.shape[2]
    fits = options.window is None or length <= options.window
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if fits else causal_band(length, length, options.window, query.device),
        dropout_p=options.dropout,
        is_causal=fits,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_scores_in_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options
) -> torch.Tensor:
    """Do the same with scores written out, where they are capped or have sinks."""
    length = query.shape[2]
    return attend_scores(query, key, value, causal_band(length, length, options.window, query.device), options)


def attend_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Attend with scores written out: [B, H, Q, D], [B, K, T, D] -> [B, H, Q, D].

    `mask` is boolean (True is seen) or added to the scores; without one it is causal, and a single query sees all.
    """
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if mask is None and queries > 1:
        mask = causal_band(queries, keys, None, query.device)
    scale = options.scaling if options.scaling is not None else query.shape[-1] ** -0.5
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).float() * scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if options.sinks is not None:
        sinks = options.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = torch.dropout(weights.to(value.dtype), options.dropout, train=options.dropout > 0)
    return weights @ value.repeat_interleave(groups, 1)


def causal_band(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return the mask [queries, keys] of positions that are seen: not later ones, and none before the window."""
    distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def packed_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Build no mask for a packed row, SDPA's mask for anything else (padding, generation, a custom 4-D mask)."""
    if _inside_packed.get():
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, packed_mask)


def choose_attention(model_class: Any, config: Any, wanted: str, packs: bool = True) -> tuple[str | None, str | None]:
    """Return the attention to install (None: the model's own choice), and why where it is not the packed one.

    Where rows are padded (`packs` is false), it is the model's own choice.

    Packed attention needs a model that hands window, scale and the like to transformers' attention interface, which
    those that support flash attention through it do.
    """
    if wanted != "auto":
        return wanted, None
    if not packs:
        return None, None
    if not issubclass(model_class, PreTrainedModel):  # an Auto class: the model brings its own code
        return None, "the model comes with its own code"
    plain = "sdpa" if model_class._supports_sdpa else "eager"
    if not (model_class._supports_flash_attn and model_class._supports_attention_backend):
        return plain, f"{model_class.__name__} does not use transformers' attention interface throughout"
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return plain, "it attends in chunks"
    return PACKED, None


def install_packed(model: PreTrainedModel) -> None:
    """Make `model` hand the documents' lengths to its attention, and build no mask while it runs on a packed row.

    Changes `model` in place: two hooks on its decoder, which a wrapper (PEFT, DDP) leaves alone.
    """
    decoder = model.base_model
    decoder.register_forward_pre_hook(_enter_packed, with_kwargs=True)
    decoder.register_forward_hook(_leave_packed, with_kwargs=True, always_call=True)


def _enter_packed(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    starts = kwargs.get("cu_seq_lens_q")
    packed = starts is not None and kwargs.get("attention_mask") is None
    _inside_packed.set(packed)
    if not packed:
        return args, kwargs
    assert starts is not None
    # As plain numbers, once a forward pass: layers computed again for the backward pass get them with their inputs.
    return args, {**kwargs, _LENGTHS: [end - start for start, end in pairwise(starts.tolist())]}


def _leave_packed(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    _inside_packed.set(False)
