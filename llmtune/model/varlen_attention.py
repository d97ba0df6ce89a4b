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


def has_varlen(query: torch.Tensor, dropout: float, causal: bool = True) -> bool:
    """Say whether `attend_varlen` computes this: half precision on CUDA, no dropout, and proven right on this card."""
    if not query.is_cuda or dropout > 0 or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _agrees_with_sdpa(query.shape[-1], query.dtype, causal, torch.cuda.current_device())


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
    """Attend within each document: [1, H, T, D], [1, K, T, D] -> [1, T, H, D].

    `starts` is int32 [documents + 1]: where each document begins, and the end of the last. A query sees
    `sliding_window` keys up to its own when causal, else those less than that many positions away on either side.
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    back = -1 if sliding_window is None else sliding_window - 1
    window = (back, 0 if causal else back)
    if flash_attn_varlen_func is not None:
        options: dict[str, Any] = {"softmax_scale": scaling, "causal": causal, "window_size": window}
        options["deterministic"] = True  # the backward pass, at a few per cent of its time
        out = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options)
    else:
        assert varlen_attn is not None, "has_varlen found one of them"
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped
        )
    return cast(torch.Tensor, out[None])


@cache
def _agrees_with_sdpa(width: int, dtype: torch.dtype, causal: bool, card: int) -> bool:
    """Compare outputs and gradients with SDPA's on two short documents, once for a head width, format and card."""
    if flash_attn_varlen_func is None and varlen_attn is None:
        return False
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, 24, width) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]
    for window in (None, 5):
        try:
            with torch.enable_grad():
                got = _with_gradients(inputs, window, causal, flash=True)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):  # what this card or this width lacks
            return False
        with torch.enable_grad():
            wanted = _with_gradients(inputs, window, causal, flash=False)
        if any((a - b).abs().max() > _TOLERANCE * b.abs().max() for a, b in zip(got, wanted, strict=True)):
            return False
    return True


def _with_gradients(inputs: list[torch.Tensor], window: int | None, causal: bool, flash: bool) -> list[torch.Tensor]:
    q, k, v = leaves = [part.clone().requires_grad_() for part in inputs]
    if flash:
        starts = torch.tensor([0, 7, 24], dtype=torch.int32, device=q.device)
        out = attend_varlen(q, k, v, starts, 17, None, window, causal)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=_seen(window, causal, q.device), enable_gqa=True)
        out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def _seen(window: int | None, causal: bool, device: torch.device) -> torch.Tensor:
    """Say which of 24 positions see which, the first seven being one document and the others another."""
    places = torch.arange(24, device=device)
    distance = places[:, None] - places[None, :]
    seen = (places[:, None] < 7) == (places[None, :] < 7)
    if causal:
        seen &= distance >= 0
    return seen if window is None else seen & (distance.abs() < window)
