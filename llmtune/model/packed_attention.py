"""Packed attention: several documents in one row, each attending to itself alone, without a dense mask.

Shapes: B batch (1 when packed), H heads, K key/value heads, T positions, L positions of one document, N documents of
equal length side by side, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmtune.model.block_attention import attend_documents
from llmtune.model.varlen_attention import attend_varlen, has_varlen

PACKED = "llmtune_packed"
"""The name under which transformers knows this attention."""

LENGTHS = "document_lengths"
"""The name under which a model's body hands the lengths of the documents in a packed row to its layers."""
documents_inside: ContextVar[list[int] | None] = ContextVar("documents_inside", default=None)
"""The same lengths, while the body runs on a packed row."""


@dataclass(frozen=True)
class Options:
    """What a model hands to its attention beside the tensors; None where it has no such thing."""

    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    """Keys that a query sees, itself included; where it looks both ways, on either side."""
    softcap: float | None = None
    """Scores are pressed into -softcap .. softcap (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """[H] a score per head that takes part in the softmax and brings no value (gpt-oss)."""
    causal: bool = True
    """Whether a query sees no later key; encoders look both ways."""


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
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend a document at a time if the lengths of the documents are given, over the whole row otherwise.

    query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D], the signature of transformers' attention interface.
    """
    lengths = kwargs.pop(LENGTHS, None)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    options = Options(dropout, scaling, sliding_window, softcap, s_aux, causal)
    plain = softcap is None and s_aux is None
    if lengths is None or attention_mask is not None:
        if not plain:
            return attend_scores(query, key, value, attention_mask, options).transpose(1, 2).contiguous(), None
        passed = {**kwargs, "dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return cast(
            tuple[torch.Tensor, None],
            sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **passed),
        )
    if plain and has_varlen(query, dropout, causal):
        starts, longest = kwargs["cu_seq_lens_q"], max(lengths)
        return attend_varlen(query, key, value, starts, longest, scaling, sliding_window, causal), None
    if plain and dropout == 0 and not query.is_cuda:
        return attend_documents(query, key, value, lengths, scaling, sliding_window, causal), None
    return attend_runs(query, key, value, lengths, options), None


def attend_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], options: Options
) -> torch.Tensor:
    """Attend within each document, those of equal length that follow one another at once.

    [1, H, T, D], [1, K, T, D] -> [1, T, H, D]; a collator puts documents in order of their length.
    """
    runs = [(length, len([*same])) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    split = zip(*(torch.split(part[0].transpose(0, 1), sizes) for part in (query, key, value)), strict=True)
    plain = options.softcap is None and options.sinks is None
    attend = attend_document if plain else attend_scores_in_document
    found = []
    for (length, count), parts in zip(runs, split, strict=True):
        q, k, v = (part.reshape(count, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        found.append(attend(q, k, v, options).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)[None]


def attend_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> torch.Tensor:
    """Attend within documents of one length: [N, H, L, D], [N, K, L, D] -> [N, H, L, D]."""
    length = query.shape[2]
    fits = options.window is None or length <= options.window
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if fits else band(length, length, options.window, options.causal, query.device),
        dropout_p=options.dropout,
        is_causal=fits and options.causal,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_scores_in_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options
) -> torch.Tensor:
    """Do the same with scores written out, where they are capped or have sinks."""
    length = query.shape[2]
    mask = band(length, length, options.window, options.causal, query.device)
    return attend_scores(query, key, value, mask, options)


def attend_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """Attend with scores written out: [B, H, Q, D], [B, K, T, D] -> [B, H, Q, D].

    `mask` is boolean (True is seen) or added to the scores; without one a query sees what it would of a whole row, but
    for a single one, which sees all.
    """
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if mask is None and queries > 1 and options.causal:
        mask = band(queries, keys, None, True, query.device)
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


def band(queries: int, keys: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor:
    """Return the mask [queries, keys] of positions that are seen: none outside the window, and no later ones if causal.

    A window reaches back, and forth as well where a query looks both ways.
    """
    distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def packed_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Build no mask for a packed row, SDPA's mask for anything else (padding, generation, a custom 4-D mask)."""
    if documents_inside.get() is not None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, packed_mask)


def choose_attention(
    model_class: Any, config: Any, wanted: str, packs: bool = True, both_ways: bool = False
) -> tuple[str | None, str | None]:
    """Return the attention to install (None: the model's own choice), and why where it is not the packed one.

    Where rows are padded (`packs` is false), it is the model's own choice.

    Packed attention needs a model that hands window, scale and the like to transformers' attention interface, which
    those that support flash attention through it do. Without it a decoder can mask a packed row; a model that looks
    `both_ways` cannot.
    """
    if wanted != "auto":
        return wanted, "model.attn_implementation names another attention" if packs and both_ways else None
    if not packs:
        return None, None
    if not issubclass(model_class, PreTrainedModel):  # an Auto class: the model brings its own code
        return None, "the model comes with its own code"
    plain = None if both_ways else "sdpa" if model_class._supports_sdpa else "eager"
    if not (model_class._supports_flash_attn and model_class._supports_attention_backend):
        return plain, f"{model_class.__name__} does not use transformers' attention interface throughout"
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return plain, "it attends in chunks"
    return PACKED, None


def install_packed(model: PreTrainedModel) -> None:
    """Make `model` hand the documents' lengths to its attention, and build no mask while it runs on a packed row.

    Changes `model` in place: two hooks on its body, which a wrapper (PEFT, DDP) leaves alone.
    """
    body = model.base_model
    first, counts = first_position(body), "position_ids" in inspect.signature(type(body).forward).parameters

    def enter(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        starts = kwargs.get("cu_seq_lens_q")
        if starts is None or kwargs.get("attention_mask") is not None:
            documents_inside.set(None)
            return args, kwargs
        # As plain numbers, once a forward pass: layers computed again for the backward pass get them with their inputs.
        lengths = [end - start for start, end in pairwise(starts.tolist())]
        documents_inside.set(lengths)
        if counts:
            given = kwargs.get("position_ids")  # PEFT drops them on the way to a model that points at answers
            places_1T = positions(lengths, starts.device) if given is None else given
            kwargs = {**kwargs, "position_ids": places_1T + first}
        return args, {**kwargs, LENGTHS: lengths}

    body.register_forward_pre_hook(enter, with_kwargs=True)
    body.register_forward_hook(_leave_packed, with_kwargs=True, always_call=True)


def first_position(body: torch.nn.Module) -> int:
    """Return the number that a model gives to a text's first position: RoBERTa and its relatives leave some out."""
    embeddings: Any = getattr(body, "embeddings", None)
    if not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return 0
    return int(embeddings.padding_idx) + 1


def positions(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Count the positions of each document from zero: [1, T]."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def _leave_packed(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    documents_inside.set(None)
