"""Root-mean-square norms with frozen weights, in one autograd function that keeps only its input for the backward pass.

Left to autograd, a norm keeps copies of its input in float32, and goes over them a dozen times. Zhang and Sennrich,
"Root Mean Square Layer Normalization", 2019. Shapes: N tokens, D width.
"""

from __future__ import annotations

from inspect import signature
from types import MethodType
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.func import functional_call


def fuse_norms(model: torch.nn.Module) -> int:
    """Let norms that compute as Llama's do so by one function, in place; return how many there are.

    Each kind of norm is tried on a few numbers first, in the format of its weights. One that gives others (Gemma's adds
    one to its weights) stays as it is, as does one that takes more than its input, such as a gate, and one that has
    been replaced already.
    """
    count = 0
    verdicts: dict[tuple[type, float, torch.dtype], bool] = {}
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", None)
        weight = getattr(module, "weight", None)
        if eps is None or weight is None or weight.ndim != 1 or "forward" in vars(module):
            continue
        kind = type(module), float(eps), weight.dtype
        if kind not in verdicts:
            verdicts[kind] = _is_plain(module, float(eps))
        if verdicts[kind]:
            module.forward = MethodType(_forward, module)
            count += 1
    return count


@torch.no_grad()
def _is_plain(module: torch.nn.Module, eps: float) -> bool:
    if len(signature(module.forward).parameters) > 1:
        return False
    generator = torch.Generator().manual_seed(0)
    like = cast(torch.Tensor, module.weight)
    x, weight = (torch.randn(shape, generator=generator).to(like) for shape in ((3, len(like)), (len(like),)))
    own = functional_call(module, {"weight": weight}, (x,))
    return torch.equal(own, _RootMeanSquare.apply(x, weight, eps))  # type: ignore[no-untyped-call]


def _forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if self.weight.requires_grad:
        return cast(torch.Tensor, type(self).forward(self, hidden_states))
    out = _RootMeanSquare.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, out)


class _RootMeanSquare(torch.autograd.Function):
    """y = weight * x / sqrt(mean(x^2) + eps), the division in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        wide = x.to(torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_D, inverse)
        return weight_D * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of y -> of x."""
        x, weight_D, inverse = ctx.saved_tensors
        normed = x.to(torch.float32) * inverse
        raised = (outputs[0] * weight_D).to(torch.float32)
        along = (raised * normed).mean(-1, keepdim=True)
        return raised.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), None, None
