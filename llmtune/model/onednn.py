"""Products of float32 matrices on AMD's processors by oneDNN: MKL, which torch takes for them, uses no AVX-512 there.

On one core of an EPYC of family 26 oneDNN does 220 GFLOP/s where MKL does 92, and 104 with AVX2 alone.

Shapes: N tokens, I and O features in and out.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch.nn.functional import linear

from llmtune.store.machine import address_space_limit, is_amd

_TOLERANCE = 1e-4
"""Of the largest element; both round in float32, in other orders."""
_FEWEST = 16
"""Tokens below which weights are read more than multiplied."""


def multiply(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + bias, without a gradient: [..., I] -> [..., O]."""
    if not torch.compiler.is_compiling() and is_faster(x, weight_OI):
        return _multiply(x, weight_OI, bias_O)
    return linear(x, weight_OI, bias_O)


def is_faster(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether oneDNN multiplies these.

    Not where the address space is limited: it makes code for each shape, and torch 2.15 crashes where that fails.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight_OI.dtype != torch.float32:
        return False
    return x.numel() >= _FEWEST * x.shape[-1] and address_space_limit() is None and _is_right()


@cache
@torch.inference_mode(False)
@torch.no_grad()
def _is_right() -> bool:
    """Whether this processor wants it, and torch's own operator is there and gives what `linear` gives."""
    if not is_amd() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight_OI = (torch.randn(shape, generator=generator) for shape in ((_FEWEST, 24), (8, 24)))
    wanted = linear(x, weight_OI)
    try:
        return bool((_multiply(x, weight_OI, None) - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
    except (RuntimeError, TypeError):  # another torch's operator takes other arguments
        return False


def _multiply(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight_OI, bias_O, "none", [], ""))
