"""Packed attention: several documents in one row, each attending only to itself, without a dense mask.

On CUDA it is variable-length flash attention (flash-attn if installed, otherwise torch's own), on a CPU
`block_attention`, and SDPA on one run of equal lengths at a time if neither is available.

Shapes: B batch (1 when packed), H heads, K key/value heads, T positions, L positions of one document, N documents of
equal length next to each other, D head width; for classified texts, D documents and H hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate, groupby
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from llmtune.data.task_interface import TaskInterface
from llmtune.model.block_attention import attend_documents, band
from llmtune.model.config import is_encoder
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS

PACKED = "llmtune_packed"
"""Name of this attention in transformers."""
LENGTHS = "document_lengths"
"""Keyword with which a model's body passes the document lengths of a packed row to its layers."""
PREFIXES = "document_prefixes"
"""Keyword for the span of each document's shared prefix in the row, if any; CPU only."""
documents_inside: ContextVar[list[int] | None] = ContextVar("documents_inside", default=None)
"""The same lengths, set while the body runs on a packed row."""
_TOLERANCE = 0.05
"""Relative to the largest element; flash attention and SDPA round differently in half precision."""


def _import(module: str, name: str) -> Callable[..., torch.Tensor] | None:
    try:
        return cast(Callable[..., torch.Tensor], getattr(import_module(module), name))
    except (ImportError, AttributeError):  # not installed, or torch before 2.10
        return None


flash_attn_varlen_func = _import("flash_attn", "flash_attn_varlen_func")
varlen_attn = _import("torch.nn.attention.varlen", "varlen_attn")


@dataclass(frozen=True)
class AttentionOptions:
    """A model's arguments to its attention besides the tensors; None for settings it does not have."""

    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    """Keys that a query attends to, itself included; on either side without causality."""
    softcap: float | None = None
    """Scores are capped to -softcap .. softcap (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """[H] a score per head that takes part in the softmax without a value (gpt-oss)."""
    causal: bool = True
    """Whether queries ignore later keys; encoders look both ways."""


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
    """Attend one document at a time if document lengths are given, otherwise over the entire row.

    query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D], the signature of transformers' attention interface.
    """
    lengths, prefixes = kwargs.pop(LENGTHS, None), kwargs.pop(PREFIXES, None)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    options = AttentionOptions(dropout, scaling, sliding_window, softcap, s_aux, causal)
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
        return attend_documents(query, key, value, lengths, scaling, sliding_window, causal, prefixes), None
    if prefixes is not None:
        return attend_prefixed(query, key, value, lengths, prefixes, options), None
    return attend_runs(query, key, value, lengths, options), None


def has_varlen(query: torch.Tensor, dropout: float, causal: bool = True) -> bool:
    """Whether `attend_varlen` supports this: half precision on CUDA, no dropout, and verified on this card."""
    if not query.is_cuda or dropout > 0 or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _agrees_with_sdpa(query.shape[-1], query.dtype, causal, query.device)


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """Attend within each document by flash attention: [1, H, T, D], [1, K, T, D] -> [1, T, H, D].

    `starts` is int32 [documents + 1]: the start of each document, and the end of the last. A query attends to
    `sliding_window` keys up to its own when causal, else to those less than that many positions away on either side.
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    back = -1 if sliding_window is None else sliding_window - 1
    window = (back, 0 if causal else back)
    if flash_attn_varlen_func is not None:
        options = {"softmax_scale": scaling, "causal": causal, "window_size": window}
        options["deterministic"] = True  # makes the backward pass deterministic, a few per cent slower
        return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options)[None]
    assert varlen_attn is not None, "has_varlen checks that one exists"
    options = {"scale": scaling, "window_size": window, "enable_gqa": q.shape[1] != k.shape[1]}
    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)[None]


@cache
@torch.inference_mode(False)  # a model's first pass has no gradients, and the result is cached
def _agrees_with_sdpa(width: int, dtype: torch.dtype, causal: bool, device: torch.device) -> bool:
    """Compare outputs and gradients with SDPA's on two short documents; cached by head width, dtype and card."""
    if flash_attn_varlen_func is None and varlen_attn is None:
        return False
    generator = torch.Generator().manual_seed(0)  # the same numbers on every card
    shapes = [(1, heads, 24, width) for heads in (4, 2, 2)]
    q, k, v = leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    starts = torch.tensor([0, 7, 24], dtype=torch.int32, device=device)
    for window in (None, 5):
        outputs: list[list[torch.Tensor]] = []
        with torch.enable_grad():
            try:
                flash = attend_varlen(q, k, v, starts, 17, None, window, causal)
                outputs.append([flash, *torch.autograd.grad(flash.square().sum(), leaves)])
            except (RuntimeError, TypeError, ValueError, NotImplementedError):  # unsupported by this card or width
                return False
            sdpa = attend_runs(q, k, v, [7, 17], AttentionOptions(window=window, causal=causal))
            outputs.append([sdpa, *torch.autograd.grad(sdpa.square().sum(), leaves)])
        if any((a - b).abs().max() > _TOLERANCE * b.abs().max() for a, b in zip(*outputs, strict=True)):
            return False
    return True


def attend_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], options: AttentionOptions
) -> torch.Tensor:
    """Attend within each document; consecutive documents of equal length are computed together.

    [1, H, T, D], [1, K, T, D] -> [1, T, H, D]; the collator sorts documents by length.
    """
    runs = [(length, len([*same])) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    split = zip(*(torch.split(part[0].transpose(0, 1), sizes) for part in (query, key, value)), strict=True)
    outputs = []
    for (length, count), parts in zip(runs, split, strict=True):
        q, k, v = (part.reshape(count, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        outputs.append(_attend_run(q, k, v, options).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def attend_prefixed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    prefixes: Sequence[tuple[int, int]],
    options: AttentionOptions,
) -> torch.Tensor:
    """Attend one document at a time, each after its prefix: [1, H, T, D], [1, K, T, D] -> [1, T, H, D]; causal only."""
    outputs, begin = [], 0
    for length, (first, last) in zip(lengths, prefixes, strict=True):
        span, ahead = slice(begin, begin + length), last - first
        k, v = (torch.cat([part[:, :, first:last], part[:, :, span]], dim=2) for part in (key, value))
        mask = band(length, ahead + length, options.window, True, query.device, ahead)
        outputs.append(attend_scores(query[:, :, span], k, v, mask, options).transpose(1, 2))
        begin += length
    return torch.cat(outputs, dim=1)


def _attend_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Attend within documents of one length: [N, H, L, D], [N, K, L, D] -> [N, H, L, D].

    Scores are computed explicitly if they are capped or have sinks.
    """
    length, plain = query.shape[2], options.softcap is None and options.sinks is None
    whole = plain and (options.window is None or length <= options.window)
    mask = None if whole else band(length, length, options.window, options.causal, query.device)
    if not plain:
        return attend_scores(query, key, value, mask, options)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=whole and options.causal,
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: AttentionOptions
) -> torch.Tensor:
    """Attend with explicit scores: [B, H, Q, D], [B, K, T, D] -> [B, H, Q, D].

    `mask` is boolean (True is visible) or added to the scores. Without one a causal mask applies if the model is
    causal; a single query attends to everything.
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


def packed_mask(*args: object, **kwargs: object) -> torch.Tensor | None:
    """Build no mask for a packed row, SDPA's mask otherwise (padding, generation, a custom 4-D mask)."""
    return None if documents_inside.get() is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, packed_mask)


def choose_attention(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, recipe: Recipe, task: TaskInterface
) -> tuple[str | None, str | None]:
    """Return the attention to install (None: the model's own choice), and the reason if it is not packed attention.

    Packed attention needs a model that passes window, scale and the like to transformers' attention interface; models
    that support flash attention through it do. For other decoders rows are packed with a mask, for other
    models they are padded.
    """
    decodes = task.model_kind.decodes
    packs = task.packs and (decodes or recipe.data.packing) and not recipe.needs_rows_apart
    attention, reason = None, None
    if recipe.model.attn_implementation != "auto":
        attention = recipe.model.attn_implementation
        reason = "model.attn_implementation requests another attention" if packs and not decodes else None
    elif packs:
        attention, reason = _find_attention(model_class, config, decodes)
    if decodes:
        return attention, reason
    if attention == PACKED and not is_encoder(config):
        return None, "a decoder reads a text's class at its last token"
    if getattr(config, "is_encoder_decoder", False) and recipe.data.packing and TASK_FACTS[recipe.task].packs:
        return attention, "the model has an encoder and a decoder"
    return attention, reason


def _find_attention(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, decodes: bool
) -> tuple[str | None, str | None]:
    if not issubclass(model_class, PreTrainedModel):  # an Auto class: the model brings its own code
        return None, "the model comes with its own code"
    plain = None if not decodes else "sdpa" if model_class._supports_sdpa else "eager"
    if not (model_class._supports_flash_attn and model_class._supports_attention_backend):
        return plain, f"{model_class.__name__} does not use transformers' attention interface throughout"
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        return plain, "it attends in chunks"
    return PACKED, None


def install_packed(model: PreTrainedModel) -> None:
    """Make `model` pass document lengths to its attention, and build no mask on packed rows.

    Changes `model` in place with two hooks on its body, which wrappers (PEFT, DDP) leave alone.
    """
    body = model.base_model
    counts = "position_ids" in inspect.signature(type(body).forward).parameters
    embeddings, first = getattr(body, "embeddings", None), 0
    if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa and its relatives skip some numbers
        first = int(getattr(embeddings, "padding_idx", 0)) + 1

    def enter(
        module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[object, ...], dict[str, Any]]:
        starts = kwargs.get("cu_seq_lens_q")
        if starts is None or kwargs.get("attention_mask") is not None:
            documents_inside.set(None)
            return args, kwargs
        # Plain numbers instead of the tensor avoid a GPU synchronisation. Recomputed layers get them with their
        # inputs.
        lengths = kwargs[LENGTHS]
        documents_inside.set(lengths)
        if counts:
            positions_1T = kwargs.get("position_ids")
            if positions_1T is None:
                positions_1T = torch.cat([torch.arange(length, device=starts.device) for length in lengths])[None]
            kwargs = {**kwargs, "position_ids": positions_1T + first}
        return args, kwargs

    def leave(*_: object) -> None:
        documents_inside.set(None)

    body.register_forward_pre_hook(enter, with_kwargs=True)
    body.register_forward_hook(leave, always_call=True)


def pool_documents(model: PreTrainedModel) -> None:
    """Make a classifier read one class per document of a packed row, with hooks on its body; changes `model` in place.

    The model's own pooling still applies: for [D, 1, H] instead of [1, T, H], first token and mean are the same. A
    pooling layer in the body (BERT's) reads the first tokens.
    """
    body = model.base_model
    pool = means if getattr(model.config, "classifier_pooling", None) == "mean" else first_tokens
    pooler = getattr(body, "pooler", None)
    if isinstance(pooler, torch.nn.Module):
        pooler.register_forward_pre_hook(_first_tokens_to_pooler)

    def pool_output(
        module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any], output: BaseModelOutput
    ) -> BaseModelOutput:
        if LENGTHS in kwargs:
            output.last_hidden_state = pool(output.last_hidden_state, kwargs[LENGTHS])
        return output

    body.register_forward_hook(pool_output, with_kwargs=True)


def first_tokens(hidden_1TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Take the first token of each document: [1, T, H] -> [D, 1, H]."""
    starts_D = torch.tensor([0, *accumulate(lengths[:-1])], device=hidden_1TH.device)
    return hidden_1TH[0, starts_D, None]


def means(hidden_1TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Take the mean over each document: [1, T, H] -> [D, 1, H]."""
    return torch.stack([part_LH.mean(0, keepdim=True) for part_LH in torch.split(hidden_1TH[0], list(lengths))])


def _first_tokens_to_pooler(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    lengths = documents_inside.get()
    return None if lengths is None or args[0].dim() != 3 else (first_tokens(args[0], lengths), *args[1:])
