"""Fused experts (one tensor for all): find them by name, and keep them in 4 bits between uses.

bitsandbytes quantises only linear modules. Most mixtures of experts in transformers have three-dimensional parameters
instead, [experts, ...], which silently stay in 16 bits.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

from llmtune.model.config import expert_parameters, linear_shape
from llmtune.model.quantized_base import is_quantized
from llmtune.recipe.adapter_section import AdapterSection

_PACKED = "packed_in_4_bits"


@torch.no_grad()
def quantize_experts(model: torch.nn.Module, adapter: AdapterSection) -> None:
    """Keep the fused experts of `model` in 4 bits, in place: unpacked when their module is called, then freed again."""
    for name in expert_parameters(model):
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        parameter = module.get_parameter(leaf)
        packed, state = quantize_4bit(
            parameter.data.contiguous(),
            compress_statistics=adapter.bnb_4bit_use_double_quant,
            quant_type=adapter.bnb_4bit_quant_type,
        )
        parameter.requires_grad_(False)
        vars(module).setdefault(_PACKED, {})[leaf] = (parameter, packed, state)
        _free(parameter)
        if len(vars(module)[_PACKED]) == 1:
            module.register_forward_pre_hook(_unpack)
            module.register_forward_hook(partial(_pack_again), always_call=True)


def unpacked_experts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the dequantized experts of `model`, by parameter name."""
    return {
        f"{name}.{leaf}": dequantize_4bit(packed, state)
        for name, module in model.named_modules()
        for leaf, (_, packed, state) in vars(module).get(_PACKED, {}).items()
    }


def count_quantized(model: torch.nn.Module) -> int:
    """Return how many weights of `model` are stored in fewer bits than they compute with."""
    linear = sum(math.prod(linear_shape(module) or ()) for module in model.modules() if is_quantized(module))
    packed = [state.shape for module in model.modules() for _, _, state in vars(module).get(_PACKED, {}).values()]
    return int(linear + sum(shape.numel() for shape in packed))


def _unpack(module: torch.nn.Module, inputs: object) -> None:
    """Give `module` its unpacked weights, as tensors of their own: autograd does not save a parameter's data.

    Under an adapter they become the parameter's data, which PEFT adds to before anything is saved.
    """
    kept: dict[str, tuple[torch.nn.Parameter, torch.Tensor, QuantState]] = vars(module)[_PACKED]
    for leaf, (parameter, packed, state) in kept.items():
        weights = dequantize_4bit(packed, state)
        if leaf in getattr(module, "parametrizations", ()):
            parameter.data = weights
        else:
            vars(module)[leaf] = weights


def _pack_again(module: torch.nn.Module, inputs: object, output: object) -> None:
    for leaf, (parameter, _, _) in vars(module)[_PACKED].items():
        vars(module).pop(leaf, None)
        _free(parameter)


def _free(parameter: torch.nn.Parameter) -> None:
    """Reduce a parameter to its shape, dtype and a single number."""
    parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
