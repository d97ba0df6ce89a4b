"""Flash attention over documents of different lengths on CUDA: flash-attn if it is installed, torch's own otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention


def _find(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return cast(Callable[..., Any], getattr(import_module(module), name))
    except (ImportError, AttributeError):  # not installed; torch before 2.10 lacks its own
        return None


flash_attn_varlen_func = _find("flash_attn", "flash_attn_varlen_func")
varlen_attn = _find("torch.nn.attention.varlen", "varlen_attn")

_TOLERANCE = 0.05
"""Of the largest element; flash attention and SDPA round differently in half precision."""


def has_varlen(query: torch.Tensor, dropout: float) -> bool:
    """Say whether `attend_varlen` computes this: half precision on CUDA, no dropout, and proven right on this card."""
    if not query.is_cuda or dropout > 0 or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _agrees_with_sdpa(query.shape[-1], query.dtype, torch.cuda.current_device())


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend causally within each document: [1, H, T, D], [1, K, T, D] -> [1, T, H, D].

    `starts` is int32 [documents + 1]: where each document begins, and the end of the last.
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    if flash_attn_varlen_func is not None:
        options: dict[str, Any] = {"softmax_scale": scaling, "causal": True, "window_size": window}
        options["deterministic"] = True  # the backward pass, at a few per cent of its time
        out = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options)
    else:
        assert varlen_attn is not None, "has_varlen found one of them"
        window = (-1, 0) if sliding_window is None else window
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
        )
    return cast(torch.Tensor, out[None])


@cache
def _agrees_with_sdpa(width: int, dtype: torch.dtype, card: int) -> bool:
    """Compare outputs and gradients with SDPA's on two short documents, once for a head width, format and card."""
    if flash_attn_varlen_func is None and varlen_attn is None:
        return False
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, 24, width) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]
    try:
        with torch.enable_grad():
            got = _with_gradients(inputs, flash=True)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # a kernel that this card or this width lacks
        return False
    with torch.enable_grad():
        wanted = _with_gradients(inputs, flash=False)
    return all((a - b).abs().max() <= _TOLERANCE * b.abs().max() for a, b in zip(got, wanted, strict=True))


def _with_gradients(inputs: list[torch.Tensor], flash: bool) -> list[torch.Tensor]:
    q, k, v = leaves = [part.clone().requires_grad_() for part in inputs]
    if flash:
        starts = torch.tensor([0, 7, 24], dtype=torch.int32, device=q.device)
        out = attend_varlen(q, k, v, starts, 17, None, None)
    else:
        documents = zip(*(torch.split(part, [7, 17], 2) for part in leaves), strict=True)
        parts = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in documents]
        out = torch.cat(parts, dim=2).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
