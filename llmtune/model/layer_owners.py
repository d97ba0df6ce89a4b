"""Complete layers in one process each, so that evaluation and generation move activations instead of weights.

The layers are divided into contiguous ranges of equal bytes, one per process. Weights outside layers (embeddings, head)
are complete in every process. `layer_calls` runs passes of such a model.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor

from llmtune.errors import EnvironmentProblem
from llmtune.model.device import MEMORY_ERRORS, is_out_of_memory
from llmtune.model.sharded_plan import kept_together
from llmtune.model.sharded_quantization import move_states
from llmtune.store.processes import offloads_params

PLACED = "layer_owners"
"""Attribute of a model that has been divided by `place_layers`."""
REFERENCE = "weights_before_training"
"""Attribute with the initial trainable weights by name, if switching the adapter off does not restore them."""
IN_REFERENCE = "computes_reference"
"""Attribute of a model: whether it computes with the weights of `REFERENCE`."""
_MADV_PAGEOUT = 21
"""Value of MADV_PAGEOUT on Linux; Python's mmap does not define it."""
_MANAGED = "_is_fsdp_managed_module"
"""Attribute of FSDP2's modules; with it, transformers makes all processes generate the same number of tokens."""


@dataclass(eq=False)
class LayerOwners:
    """The layers of a model, and the rank of the process that has each; elsewhere their weights are on `meta`."""

    layers: Sequence[torch.nn.Module]
    owners: list[int]
    device: torch.device
    """Where layers compute; their weights may be in main memory."""
    versions: dict[int, list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    """By layer, parameters of this process that have a reference, with their current and their reference weights."""


def divide_layers(layers: Sequence[torch.nn.Module], processes: int) -> list[int]:
    """Return the owner of each layer: contiguous ranges with about the same number of bytes."""
    sizes = [sum(one.numel() * one.element_size() for one in layer.parameters()) for layer in layers]
    total, before, owners = max(1, sum(sizes)), 0, []
    for size in sizes:
        owners.append(min(processes - 1, (2 * before + size) * processes // (2 * total)))
        before += size
    return owners


@torch.no_grad()
def place_layers(model: torch.nn.Module, device: torch.device) -> None:
    """Divide `model` over all processes, in place, with the weights of the first process; all processes must call this.

    The first process keeps the weights of its own layers where they are, if they are on `device`.
    """
    device = torch.empty(0, device=device).device  # with its index
    ignored, layers = move_states(model, device), kept_together(model)
    placement = LayerOwners(layers, divide_layers(layers, distributed.get_world_size()), device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    weights_device = torch.device("cpu") if offloads_params() else device
    for layer, owner in zip(layers, placement.owners, strict=True):
        _place_weights(layer, owner, device, weights_device, ignored)
    _place_weights(model, None, device, device, {*ignored, *(one for layer in layers for one in layer.parameters())})
    setattr(model, PLACED, placement)


def _place_weights(
    module: torch.nn.Module,
    owner: int | None,
    device: torch.device,
    weights_device: torch.device,
    ignored: set[torch.nn.Parameter],
) -> None:
    """Send the first process's weights of `module` to the rank `owner`, or to all if it is None.

    They are sent through `device`, and are on `weights_device` there and on `meta` in other processes. Parameters in
    `ignored` stay as they are.
    """
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for holder in module.modules():
        for name, parameter in holder._parameters.items():
            if parameter is None or parameter in ignored:
                continue
            if parameter not in moved:
                weights = _send_weights(parameter.detach(), owner, device)
                weights = weights if weights.is_meta else weights.to(weights_device)
                moved[parameter] = torch.nn.Parameter(weights, parameter.requires_grad)
            holder._parameters[name] = moved[parameter]


def _send_weights(weights: torch.Tensor, owner: int | None, device: torch.device) -> torch.Tensor:
    rank = distributed.get_rank()
    elsewhere = torch.empty(weights.shape, dtype=weights.dtype, device="meta")
    if owner == 0:
        return weights.to(device) if rank == 0 else elsewhere
    received = weights.to(device).contiguous() if rank == 0 else torch.empty_like(elsewhere, device=device)
    distributed.broadcast(received, 0)
    if owner in (None, rank):
        return received
    if rank == 0 and weights.device.type == "cpu":
        page_out(weights)
    return elsewhere


def page_out(tensor: torch.Tensor) -> None:
    """Drop the memory of weights that are mapped from a file (`madvise(2)`, MADV_PAGEOUT); other memory stays."""
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    size = tensor.data_ptr() + tensor.nbytes - start
    if sys.platform == "linux" and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_PAGEOUT)


@contextmanager
def layers_of_shards(model: FSDPModule) -> Iterator[LayerOwners]:
    """Divide a model sharded by FSDP2 for the length of the block; all processes must enter and leave it together.

    Shards with the dtype of the complete weights are freed meanwhile. They come back with the same values, in the same
    parameters. After an error the model cannot be used any more.
    """
    assert isinstance(model, torch.nn.Module)
    state: Any = model._get_fsdp_state()
    state._lazy_init()
    root, *layers = (module for module in model.modules() if isinstance(module, FSDPModule))
    placement = LayerOwners(layers, divide_layers(layers, distributed.get_world_size()), state._device)
    shards: dict[str, torch.Tensor] = getattr(model, REFERENCE, {})
    names = {parameter: name for name, parameter in model.named_parameters()}
    # No process receives all its layers before the others free theirs.
    units = sorted((_Unit(unit, placement) for unit in (root, *layers)), key=lambda unit: unit.turn)
    managed = [module for module in model.modules() if getattr(module, _MANAGED, False)]
    with torch.inference_mode(False), torch.no_grad():
        reference = {name: weights for unit in units for name, weights in unit.gather_layer(names, shards).items()}
    for module in managed:
        setattr(module, _MANAGED, False)
    if shards:
        setattr(model, REFERENCE, reference)
    yield placement
    if shards:
        setattr(model, REFERENCE, shards)
    for module in managed:
        setattr(module, _MANAGED, True)
    with torch.inference_mode(False), torch.no_grad():
        for unit in reversed(units):
            unit.shard_again()


class _Unit:
    """A part of a model that FSDP2 gathers at once: a layer, or everything outside layers."""

    def __init__(self, unit: Any, placement: LayerOwners) -> None:
        self.unit, self.state, self.placement = unit, unit._get_fsdp_state(), placement
        self.number = placement.layers.index(unit) if unit in placement.layers else None
        self.owner = None if self.number is None else placement.owners[self.number]
        self.is_here = self.owner in (None, distributed.get_rank())
        groups = getattr(self.state, "_fsdp_param_groups", None) or [self.state._fsdp_param_group]  # newer torch
        self.shards = [shard for group in groups if group is not None for shard in group.fsdp_params]
        self.complete: list[torch.nn.Parameter] = []
        self.freed_bytes: dict[Any, int] = {}
        """By shard, the bytes that were freed."""

    @property
    def turn(self) -> tuple[int, int]:
        """The order of units: weights outside layers, then the first layer of each process, then the second of each."""
        if self.number is None or self.owner is None:
            return -1, 0
        return self.number - self.placement.owners.index(self.owner), self.owner

    def gather_layer(
        self, names: Mapping[torch.nn.Parameter, str], reference_shards: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Give the owner complete weights; return the complete weights of the reference, by name.

        The owner of weights outside layers is every process. `names` has the name of each sharded parameter.
        """
        weights = self._gather()
        shards = {names[shard.sharded_param]: shard.sharded_param.to_local() for shard in self.shards}
        changed = {name: local.clone() for name, local in shards.items() if name in reference_shards}
        for name in changed:
            shards[name].copy_(reference_shards[name])
        before = dict(zip(shards, self._gather() if changed else [], strict=bool(changed)))
        for name, local in changed.items():
            shards[name].copy_(local)
        for shard, value in zip(self.shards, weights, strict=True):
            parameter = shard.sharded_param
            self.complete.append(torch.nn.Parameter(value, parameter.requires_grad))
            storage = shard._sharded_param_data.untyped_storage()
            shared = storage.data_ptr() == parameter.to_local().untyped_storage().data_ptr()
            if shared and value.dtype == parameter.dtype and not offloads_params():
                self.freed_bytes[shard] = storage.nbytes()
                storage.resize_(0)
            shard._setattr_on_modules(self.complete[-1])
        self.state._pre_forward_hook_handle.remove()
        self.state._post_forward_hook_handle.remove()
        if self.is_here and self.number is not None and changed:
            pairs = zip(shards, self.complete, strict=True)
            self.placement.versions[self.number] = [
                (one, one.data, before[name]) for name, one in pairs if name in changed
            ]
        return {name: before[name] for name in changed}

    def _gather(self) -> list[torch.Tensor]:
        """Return copies of the unit's complete weights, on `meta` where another process owns them."""
        try:
            self.unit.unshard()
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            what = "out of memory while gathering a layer of the sharded model"
            fix = "Use more processes or cards with more memory, or lower data.max_length."
            raise EnvironmentProblem.of(what, f"process {distributed.get_rank()}", fix) from error
        device = "cpu" if offloads_params() and self.owner is not None else self.placement.device
        gathered = [shard.unsharded_param.detach() for shard in self.shards]
        complete = [
            one.to(device, copy=True) if self.is_here else torch.empty_like(one, device="meta") for one in gathered
        ]
        self.unit.reshard()
        return complete

    def shard_again(self) -> None:
        """Put the shards back in place of complete weights, with FSDP2's hooks."""
        for shard, complete in zip(self.shards, self.complete, strict=True):
            parameter = shard.sharded_param
            if shard in self.freed_bytes:
                shard._sharded_param_data.untyped_storage().resize_(self.freed_bytes[shard])
                value = complete.data if self.is_here else torch.empty_like(complete, device=self.placement.device)
                cut = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=self.owner)
                shard._sharded_param_data.zero_()
                parameter.to_local().copy_(cut.to_local())
            shard._setattr_on_modules(parameter)
        state, before, after = self.state, self.state._pre_forward, self.state._post_forward
        state._pre_forward_hook_handle = self.unit.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        state._post_forward_hook_handle = self.unit.register_forward_hook(after)
