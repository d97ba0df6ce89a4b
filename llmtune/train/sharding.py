"""A model sharded over all processes with FSDP2: each layer is gathered while it computes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, cast

import dill
import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized

from llmtune.adapter.reference_model import KEPT, keep_reference, own_part
from llmtune.model.memory_plan import kept_together
from llmtune.records import AdaptedModel


def share_model(make: Callable[[], AdaptedModel]) -> AdaptedModel:
    """Let the first process make a model; the others get it with its weights on `meta`, until `shard_model` fills them.

    Modules, hooks, configuration and buffers are handed over as they are: all processes have one model, and one alone
    reads files, starts adapters and proves that they work. An error there ends the others. A model with weights that
    are computed from others (wav2vec2's) cannot be handed over, so each process makes it.
    """
    adapted = make() if torch.distributed.get_rank() == 0 else None
    if adapted is not None and hasattr(adapted.model, KEPT):
        setattr(adapted.model, KEPT, {})  # each process keeps its part, once it has one
    (packed,) = broadcast_object_list([None if adapted is None else _pack_model(adapted)])
    if adapted is None:
        adapted = make() if packed is None else cast(AdaptedModel, _Unpacking(io.BytesIO(packed)).load())
    return adapted


def _pack_model(adapted: AdaptedModel) -> bytes | None:
    if any(is_parametrized(module) for module in adapted.model.modules()):
        return None
    file = io.BytesIO()
    _Packing(file).dump(adapted)
    return file.getvalue()


class _Packing(dill.Pickler):  # type: ignore[misc]
    """Writes a model without its weights."""

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        """Describe a weight; all else is written as it is."""
        if not isinstance(value, torch.nn.Parameter):
            return None
        return id(value), value.shape, value.dtype, value.requires_grad


class _Unpacking(dill.Unpickler):  # type: ignore[misc]
    """Reads a model whose weights are then on `meta`; one that has two names stays one."""

    def __init__(self, *files: Any) -> None:
        super().__init__(*files)
        self._known: dict[int, torch.nn.Parameter] = {}

    def persistent_load(self, described: tuple[Any, ...]) -> torch.nn.Parameter:
        """Make a weight from its description."""
        key, shape, dtype, trained = described
        if key not in self._known:
            self._known[key] = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), trained)
        return self._known[key]


def shard_model(model: torch.nn.Module, device: torch.device) -> None:
    """Cut the parameters of `model` over all processes, in place; their numbers are those that the first one has.

    Each layer is a piece, and what is left is one more. Every piece is given up after its forward pass, the outermost
    too: so weights that change between two forward passes, as those of a reference model do, are never taken from an
    earlier one.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for piece in [*kept_together(model), model]:
        whole = {name: one.detach() for name, one in piece.named_parameters() if not isinstance(one, DTensor)}
        fully_shard(piece, mesh=mesh, reshard_after_forward=True)
        fill_meta: Any = piece._apply  # `to_empty` would empty buffers too
        fill_meta(lambda own: torch.empty_like(own, device=device) if own.is_meta else own)
        _fill_parts(piece, whole, mesh)
    switch = getattr(model, "set_reduce_scatter_unused_params", None)  # of newer torch
    if switch is not None:  # weights that the rows of one process need and those of another do not, as an expert's
        switch(True)
    if hasattr(model, KEPT):
        keep_reference(model)


@torch.no_grad()
def _fill_parts(piece: torch.nn.Module, whole: dict[str, torch.Tensor], mesh: DeviceMesh) -> None:
    """Give each process its part of the `whole` weights of the first; they are given up as they go."""
    for name in list(whole):
        parameter, here = piece.get_parameter(name), whole.pop(name)
        sent = torch.empty_like(here, device=mesh.device_type) if here.is_meta else here.to(mesh.device_type)
        own = distribute_tensor(sent, mesh, parameter.placements if isinstance(parameter, DTensor) else [Replicate()])
        own_part(parameter).copy_(own_part(own))


def cut_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return what this process has of a whole `value` for `parameter`: all of it where that is whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_state(model: torch.nn.Module, trained_only: bool) -> dict[str, torch.Tensor] | None:
    """Return the state of a sharded model put together again, on the CPU of the first process; all have to call it.

    With `trained_only` frozen weights are left out. A weight of two names is one tensor. None for any other model.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    state: dict[str, torch.Tensor] = {}
    known: dict[int, torch.Tensor] = {}
    first = torch.distributed.get_rank() == 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor) and trained_only and not tensor.requires_grad:
            continue
        if id(tensor) not in known:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            known[id(tensor)] = whole.detach().cpu() if first else torch.empty(0)
        state[name] = known[id(tensor)]
    return state


def load_whole(parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Copy whole `weights` into parameters of the same names, or into this process's parts of them, in place."""
    assert parameters.keys() == weights.keys(), "a checkpoint holds exactly the trainable parameters"
    with torch.no_grad():
        for name, parameter in parameters.items():
            own_part(parameter).copy_(own_part(cut_like(weights[name], parameter)))
