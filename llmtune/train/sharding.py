"""A model sharded over all processes with FSDP2: each layer is gathered while it computes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import dill
import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import BitsAndBytesConfig

from llmtune.adapter.reference_model import REFERENCE, keep_reference, own_part
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.device import page_out
from llmtune.model.sharded_plan import kept_together
from llmtune.model.sharded_quantization import make_shardable, move_states
from llmtune.records import AdaptedModel, SelectedModel
from llmtune.store.processes import offloads_params

Made = TypeVar("Made", AdaptedModel, SelectedModel)


def share_model(make: Callable[[], Made]) -> Made:
    """Make a model in the first process; the others receive it with weights on `meta`, filled later by `shard_model`.

    Modules, hooks, configuration and buffers are sent unchanged, so only the first process reads files, initialises
    adapters and checks them. An error there ends the others. A model with parametrized weights (wav2vec2) cannot be
    pickled, so each process makes its own.
    """
    made = _make_shardable(make) if torch.distributed.get_rank() == 0 else None
    (packed,) = broadcast_object_list([None if made is None else _pack_model(made)])
    if made is None:
        made = _make_shardable(make) if packed is None else cast(Made, _Unpacking(io.BytesIO(packed)).load())
    return made


def _make_shardable(make: Callable[[], Made]) -> Made:
    made = make()
    if hasattr(made.model, REFERENCE):
        setattr(made.model, REFERENCE, {})  # `shard_model` fills it with each process's shard
    quantization = getattr(unwrap(made.model).config, "quantization_config", None)
    if isinstance(quantization, BitsAndBytesConfig):
        quantization.bnb_4bit_quant_storage = quantization.bnb_4bit_compute_dtype
        make_shardable(made.model, quantization.bnb_4bit_quant_storage)
    return made


def _pack_model(made: AdaptedModel | SelectedModel) -> bytes | None:
    if any(is_parametrized(module) for module in made.model.modules()):
        return None
    file = io.BytesIO()
    _Packing(file).dump(made)
    return file.getvalue()


class _Packing(dill.Pickler):  # type: ignore[misc]
    """Pickle a model without its weights."""

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        """Return a description of a weight, and None for anything else."""
        if not isinstance(value, torch.nn.Parameter):
            return None
        return id(value), value.shape, value.dtype, value.requires_grad


class _Unpacking(dill.Unpickler):  # type: ignore[misc]
    """Unpickle a model with its weights on `meta`; tied weights stay tied."""

    def __init__(self, *files: Any) -> None:
        super().__init__(*files)
        self._known: dict[int, torch.nn.Parameter] = {}

    def persistent_load(self, described: tuple[Any, ...]) -> torch.nn.Parameter:
        """Make a weight from its description."""
        key, shape, dtype, trained = described
        if key not in self._known:
            self._known[key] = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), trained)
        return self._known[key]


def shard_model(
    model: torch.nn.Module, device: torch.device, *, training: bool = False, param_dtype: torch.dtype | None = None
) -> None:
    """Shard the parameters of `model` over all processes, in place, with the values of the first process.

    With `training`, trainable parameters become float32, one layer at a time. `param_dtype` is that of FSDP2's
    MixedPrecisionPolicy: layers are gathered in it instead of the dtype of their shards, and gradients are summed in
    float32. Autocast would keep a copy of all complete layers in it.

    The shards are on `device`, or in main memory if the environment says so. Each layer is a unit, and the remaining
    parameters form one more. Every unit, the outermost included, is resharded after its forward pass. Weights that
    change between two forward passes (those of a reference model) are therefore never stale.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    ignored, place, options = move_states(model, device), device, dict[str, Any]()
    if offloads_params():
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        place = torch.device("cpu")
    layers = MixedPrecisionPolicy(param_dtype, torch.float32 if param_dtype else None, cast_forward_inputs=False)
    for piece in [*kept_together(model), model]:
        options["mp_policy"] = MixedPrecisionPolicy() if piece is model else layers
        parameters = {name: one for name, one in piece.named_parameters() if not isinstance(one, DTensor)}
        for one in parameters.values():
            if training and one.requires_grad:
                one.data = one.data.float()
        whole = {name: one.detach() for name, one in parameters.items() if one not in ignored}
        del parameters
        fully_shard(piece, mesh=mesh, reshard_after_forward=True, ignored_params=ignored, **options)
        fill_meta: Any = piece._apply  # `to_empty` would empty buffers too
        fill_meta(lambda tensor: torch.empty_like(tensor, device=place) if tensor.is_meta else tensor)
        _fill_parts(piece, whole, mesh)
    switch = getattr(model, "set_reduce_scatter_unused_params", None)  # of newer torch
    if switch is not None:  # some weights, such as an expert's, get gradients in some processes only
        switch(True)
    if hasattr(model, REFERENCE):
        keep_reference(model)


@torch.no_grad()
def _fill_parts(piece: torch.nn.Module, whole: dict[str, torch.Tensor], mesh: DeviceMesh) -> None:
    """Give each process its shard of the first process's `whole` weights, freeing each weight once it is sent."""
    for name in list(whole):
        parameter, here = piece.get_parameter(name), whole.pop(name)
        sent = torch.empty_like(here, device=mesh.device_type) if here.is_meta else here.to(mesh.device_type)
        shard = distribute_tensor(sent, mesh, parameter.placements if isinstance(parameter, DTensor) else [Replicate()])
        own_part(parameter).copy_(own_part(shard))
        if here.device.type == "cpu":
            page_out(here)


def cut_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a full `value` for `parameter`; all of it if the parameter is not sharded."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    cut = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    shard = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)  # it may be in main memory
    own_part(shard).copy_(own_part(cut))
    return shard


def whole_state(
    model: torch.nn.Module, trained_only: bool, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor] | None:
    """Gather the state of a sharded model on the CPU of the first process, in `dtype`; all processes must call it.

    With `trained_only`, frozen weights are omitted. Tied weights share one tensor. Returns None for any other model.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    state: dict[str, torch.Tensor] = {}
    cpu_tensors: dict[int, torch.Tensor] = {}
    first = torch.distributed.get_rank() == 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.nn.Parameter) and trained_only and not tensor.requires_grad:
            continue
        if id(tensor) not in cpu_tensors:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            cpu_tensors[id(tensor)] = whole.detach().to("cpu", dtype) if first else torch.empty(0)
        state[name] = cpu_tensors[id(tensor)]
    return state


def load_whole(parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Copy full `weights` into the parameters of the same names, or into this process's shards of them, in place."""
    assert parameters.keys() == weights.keys(), "a checkpoint contains exactly the trainable parameters"
    with torch.no_grad():
        for name, parameter in parameters.items():
            own_part(parameter).copy_(own_part(cut_like(weights[name], parameter)))
