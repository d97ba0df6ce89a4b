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

PACKED_EXPERTS = "packed_in_4_bits"
"""Attribute of a module with such experts: the state of each 4-bit parameter, by its name."""
BYTES, SCALES = "_packed", "_absmax"
"""Endings of the attributes with a parameter's packed weights and, if they are sharded, its scales."""


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
        vars(module).setdefault(PACKED_EXPERTS, {})[leaf] = state
        setattr(module, leaf + BYTES, packed)
        _free(parameter)
        if len(vars(module)[PACKED_EXPERTS]) == 1:
            module.register_forward_pre_hook(_unpack)
            module.register_forward_hook(partial(_pack_again), always_call=True)


def unpacked_experts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the dequantized experts of `model`, by parameter name."""
    return {
        f"{name}.{leaf}": dequantize_4bit(getattr(module, leaf + BYTES), state)
        for name, module in model.named_modules()
        for leaf, state in vars(module).get(PACKED_EXPERTS, {}).items()
    }


def count_quantized(model: torch.nn.Module) -> int:
    """Return how many weights of `model` are stored in fewer bits than they compute with."""
    linear = sum(math.prod(linear_shape(module) or ()) for module in model.modules() if is_quantized(module))
    packed = [state.shape for module in model.modules() for state in vars(module).get(PACKED_EXPERTS, {}).values()]
    return int(linear + sum(shape.numel() for shape in packed))


def _unpack(module: torch.nn.Module, inputs: object) -> None:
    """Give `module` its unpacked weights, as tensors of their own: autograd does not save a parameter's data.

    Under an adapter they become the parameter's data, which PEFT adds to before anything is saved.
    """
    kept: dict[str, QuantState] = vars(module)[PACKED_EXPERTS]
    for leaf, state in kept.items():
        state.absmax = getattr(module, leaf + SCALES, state.absmax)
        weights = dequantize_4bit(getattr(module, leaf + BYTES), state)
        if leaf in getattr(module, "parametrizations", ()):
            _placeholder(module, leaf).data = weights
        else:
            vars(module)[leaf] = weights


def _pack_again(module: torch.nn.Module, inputs: object, output: object) -> None:
    for leaf in vars(module)[PACKED_EXPERTS]:
        vars(module).pop(leaf, None)
        _free(_placeholder(module, leaf))


def _placeholder(module: torch.nn.Module, leaf: str) -> torch.nn.Parameter:
    parametrized = leaf in getattr(module, "parametrizations", ())
    return module.get_parameter(f"parametrizations.{leaf}.original" if parametrized else leaf)


def _free(parameter: torch.nn.Parameter) -> None:
    """Reduce a parameter to its shape, dtype and a single number."""
    parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
