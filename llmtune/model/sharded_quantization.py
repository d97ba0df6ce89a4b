"""4-bit weights that FSDP can shard: packed weights and their scales as plain parameters, gathered to compute.

FSDP replaces a parameter by its shard, which loses the scales that bitsandbytes keeps as attributes of the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit

from llmtune.model.experts import BYTES, PACKED_EXPERTS, SCALES


class ShardableLinear4bit(Linear4bit):  # type: ignore[misc]
    """bitsandbytes' 4-bit layer with two plain parameters: packed weights, and the scale of each block (`absmax`)."""

    weight: torch.nn.Parameter
    absmax: torch.nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        self.quant_state.absmax = self.absmax
        # FSDP puts the shard back after the forward pass; until then PEFT's DoRA unpacks the weight too.
        self.weight = Params4bit(self.weight, quant_state=self.quant_state, bnb_quantized=True)
        output: torch.Tensor = super().forward(x)
        return output


@torch.no_grad()
def make_shardable(model: torch.nn.Module, storage: torch.dtype) -> None:
    """Give the 4-bit layers and experts of `model` plain parameters, in place; bits and results stay the same.

    The packed bytes become numbers of dtype `storage`, as with bitsandbytes' `bnb_4bit_quant_storage`.
    """
    for module in model.modules():
        if type(module) is Linear4bit:
            _make_layer_shardable(module, storage)
        for leaf, state in vars(module).get(PACKED_EXPERTS, {}).items():
            packed = vars(module).pop(leaf + BYTES)
            module.register_parameter(leaf + BYTES, _stored(packed, storage))
            state.absmax = _frozen(state.absmax)
            module.register_parameter(leaf + SCALES, state.absmax)


def _make_layer_shardable(layer: Any, storage: torch.dtype) -> None:
    layer.quant_state, layer.quant_storage = layer.weight.quant_state, storage
    layer.weight = _stored(layer.weight.data, storage)
    layer.absmax = layer.quant_state.absmax = _frozen(layer.quant_state.absmax)
    layer.__class__ = ShardableLinear4bit


@torch.no_grad()
def move_states(model: torch.nn.Module, device: torch.device) -> set[torch.nn.Parameter]:
    """Move what every process holds of 4-bit weights to `device`, in place; return the parameters not to shard.

    Those are the placeholders of packed experts, which have a shape but no memory.
    """
    placeholders = set()
    for module in model.modules():
        if isinstance(module, ShardableLinear4bit):
            _move_state(module.quant_state, device)
        for leaf, state in vars(module).get(PACKED_EXPERTS, {}).items():
            _move_state(state, device)
            parameter = module.get_parameter(leaf)
            number = torch.zeros((), dtype=parameter.dtype, device=device)
            placeholder = _frozen(number.expand(parameter.shape))
            module.register_parameter(leaf, placeholder)
            placeholders.add(placeholder)
    return placeholders


def _move_state(state: QuantState, device: torch.device) -> None:
    state.code = state.code.to(device)
    if state.nested:
        state.offset = state.offset.to(device)
        state.state2.absmax, state.state2.code = state.state2.absmax.to(device), state.state2.code.to(device)


def _stored(packed: torch.Tensor, storage: torch.dtype) -> torch.nn.Parameter:
    fits = packed.numel() * packed.element_size() % storage.itemsize == 0
    return _frozen(packed.reshape(-1).view(storage if fits else packed.dtype)[:, None])


def _frozen(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)
