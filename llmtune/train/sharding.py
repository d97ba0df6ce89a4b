"""FSDP2: weights, gradients and optimiser state cut over all processes; a layer is whole only while it computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llmtune.adapter.reference_model import KEPT
from llmtune.model.causal_lm_loss import unwrap


def shard_model(model: torch.nn.Module, device: torch.device) -> None:
    """Cut the parameters of `model` over all processes, in place; all processes hold the same ones before.

    Layers are those that the model must not be split within (`_no_split_modules`); what is left is one more piece.
    Every piece is given up after its forward pass, the outermost too: so weights that change between two forward
    passes, as those of a reference model do, are never taken from an earlier one.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names = set(getattr(unwrap(model), "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in [child for one in lists for child in one if type(child).__name__ in names]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    switch = getattr(model, "set_reduce_scatter_unused_params", None)  # of newer torch
    if switch is not None:  # weights that the rows of one process need and those of another do not, as an expert's
        switch(True)
    kept = getattr(model, KEPT, None)
    if kept is not None:
        parameters = dict(model.named_parameters())
        setattr(model, KEPT, {name: own_part(cut_like(whole, parameters[name])) for name, whole in kept.items()})


def cut_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return what this process has of a whole `value` for `parameter`: all of it where that is whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_state(model: torch.nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
    """Return the state of a sharded model put together again, on the CPU of the first process; all have to call it.

    With `trained_only` the weights that are held still are left out. A weight of two names is one tensor.
    """
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


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_whole(parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Copy whole `weights` into parameters of the same names, or into this process's parts of them, in place."""
    assert parameters.keys() == weights.keys(), "a checkpoint holds exactly the trainable parameters"
    with torch.no_grad():
        for name, parameter in parameters.items():
            own_part(parameter).copy_(own_part(cut_like(weights[name], parameter)))
