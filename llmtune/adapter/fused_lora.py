"""LoRA's products in one autograd function, instead of PEFT's chain of casts, products, scaling and a sum.

The results are equal up to rounding. This saves six passes over activations per layer and step, and float32 copies
of the inputs. Shapes: N tokens, I and O features in and out, R rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable


def fuse_products(model: torch.nn.Module) -> int:
    """Make the plain LoRA layers of `model` use `FusedLinear`, in place; return their number.

    Layers with more than two matrices and a linear layer (DoRA, their own bias, transposed weights) keep PEFT's code.
    A quantised base layer keeps its own product.
    """
    layers = [module for module in model.modules() if type(module) is Linear and not module.fan_in_fan_out]
    for layer in layers:
        layer.__class__ = FusedLinear
    return len(layers)


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer; a single adapter on ordinary weights takes the short way, everything else PEFT's own."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        name = self._short_way(x) if not args and not kwargs else None
        if name is None:
            return cast(torch.Tensor, super().forward(x, *args, **kwargs))
        base, dropout, scale = self.get_base_layer(), self.lora_dropout[name], self.scaling[name]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        a_RI, b_OR = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        if isinstance(dropout, torch.nn.Identity) or not self.training:
            bias = None if base.bias is None else base.bias.to(dtype)
            whole = x.to(dtype), base.weight.to(dtype), bias, a_RI, b_OR, scale
            return cast(torch.Tensor, _LinearWithLowRank.apply(*whole))  # type: ignore[no-untyped-call]
        parts = base(x), dropout(x.to(dtype)), a_RI, b_OR, scale
        return cast(torch.Tensor, _LowRank.apply(*parts))  # type: ignore[no-untyped-call]

    def _short_way(self, x: torch.Tensor) -> str | None:
        """Return the adapter's name if this layer is in its simplest state."""
        if self.disable_adapters or self.merged or self.lora_variant:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)  # the last: it is split
        trained = any(parameter.requires_grad for parameter in base.parameters())  # e.g. `bias: lora_only`
        if len(names) != 1 or type(base) is not torch.nn.Linear or hooked or trained:
            return None
        down, up = self.lora_A[names[0]], self.lora_B[names[0]]
        mixed = (
            not torch.is_autocast_enabled(x.device.type) and len({x.dtype, down.weight.dtype, base.weight.dtype}) > 1
        )
        return None if up.bias is not None or mixed else names[0]


class _LinearWithLowRank(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T, for frozen weights W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        with torch.autocast(x.device.type, enabled=False):
            x_NI = x.reshape(-1, x.shape[-1])
            y = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
            y_NO = y.view(-1, y.shape[-1])
            if bias_O is None:
                torch.mm(x_NI, weight_OI.T, out=y_NO)
            else:
                torch.addmm(bias_O, x_NI, weight_OI.T, out=y_NO)
            low_NR = x_NI @ a_RI.T
            y_NO.addmm_(low_NR, b_OR.T, alpha=scale)
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR, low_NR)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of y -> of x, A and B."""
        x, weight_OI, a_RI, b_OR, low_NR = ctx.saved_tensors
        gradient_NO = outputs[0].reshape(-1, weight_OI.shape[0])
        into_NR, da_RI, db_OR = _low_rank_gradients(gradient_NO, x, low_NR, b_OR, ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (gradient_NO @ weight_OI).addmm_(into_NR, a_RI).view(x.shape)
        return dx, None, None, da_RI, db_OR, None


class _LowRank(torch.autograd.Function):
    """y + scale (x A^T) B^T."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[..., O], [..., I] -> [..., O]."""
        with torch.autocast(x.device.type, enabled=False):
            low_NR = x.reshape(-1, x.shape[-1]) @ a_RI.T
            out = y.clone(memory_format=torch.contiguous_format)  # not a view: a layer may modify it in place
            out.view(-1, y.shape[-1]).addmm_(low_NR, b_OR.T, alpha=scale)
        ctx.save_for_backward(x, a_RI, b_OR, low_NR)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the sum -> of y, x, A and B."""
        x, a_RI, b_OR, low_NR = ctx.saved_tensors
        gradient_NO = outputs[0].reshape(-1, b_OR.shape[0])
        into_NR, da_RI, db_OR = _low_rank_gradients(gradient_NO, x, low_NR, b_OR, ctx.scale)
        dx = (into_NR @ a_RI).view(x.shape) if ctx.needs_input_grad[1] else None
        return outputs[0], dx, da_RI, db_OR, None


def _low_rank_gradients(
    gradient_NO: torch.Tensor, x: torch.Tensor, low_NR: torch.Tensor, b_OR: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x A^T [N, R], of A and of B."""
    into_NR = (gradient_NO @ b_OR).mul_(scale)
    da_RI = into_NR.T @ x.reshape(-1, x.shape[-1])
    db_OR = (low_NR.T @ gradient_NO).mul_(scale).T
    return into_NR, da_RI, db_OR
