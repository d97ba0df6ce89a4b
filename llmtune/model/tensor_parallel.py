"""A decoder whose matrices are split over processes by transformers' tensor-parallel plan: all run the same passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import add_lora_tp_hooks_dtensor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import layer_configs
from llmtune.model.device import SuppressRefusal, page_out
from llmtune.model.self_checks import logits_agree
from llmtune.store.processes import offloads_params, world_size

_COMPLETE_OUTPUT = {None, "colwise_gather_output", "colwise_rep", "rowwise_rep", "rowwise_split_input", "replicate"}
"""Styles of a linear layer that has complete inputs and outputs, so its LoRA stays complete."""
_TOKENS = 8
_lockstep = ContextVar("lockstep", default=False)
_Holder = tuple[torch.nn.Module, str, torch.nn.Parameter]


def is_split(model: torch.nn.Module) -> bool:
    """Whether all processes must run the same passes of `model`, because each has a slice of its matrices."""
    return getattr(unwrap(model), "_tp_size", None) is not None


@contextmanager
def lockstep(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, `in_lockstep` returns whether `model` is split."""
    before = _lockstep.set(is_split(model))
    try:
        yield
    finally:
        _lockstep.reset(before)


def in_lockstep() -> bool:
    """Whether all processes must take the same decisions, because a split model runs."""
    return _lockstep.get()


def same_everywhere(number: int | None) -> int | None:
    """Return the least number of all processes if a split model runs, else `number`."""
    if number is None or not in_lockstep():
        return number
    numbers: list[int] = [0] * world_size()
    distributed.all_gather_object(numbers, number)
    return min(numbers)


def why_unsplit(model: torch.nn.Module) -> str | None:
    """Return why the matrices of `model` cannot be split over all processes; None if they can."""
    inner, count = unwrap(model), world_size()
    if not inner.can_generate() or inner.config.is_encoder_decoder:
        return f"{type(inner).__name__} is not a decoder"
    if not _expand_plan(inner):
        return f"transformers has no tensor-parallel plan for {type(inner).__name__}"
    if getattr(inner.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if offloads_params():
        return "--fsdp-offload-params keeps its weights in main memory"
    for layer in layer_configs(inner.config.get_text_config(decoder=True)):
        for key in ("num_attention_heads", "num_key_value_heads"):
            if (getattr(layer, key, None) or count) % count:
                return f"{key} ({getattr(layer, key)}) is not a multiple of {count} processes"
    return _why_unsplit_adapter(model) if isinstance(model, PeftModel) else None


def _why_unsplit_adapter(model: PeftModel) -> str | None:
    """Return why PEFT cannot split the adapter of `model`; None if it can."""
    kinds = {config.peft_type.value.lower() for config in model.peft_config.values()}
    if kinds != {"lora"}:
        return f"PEFT does not split {', '.join(sorted(kinds))}"
    styles = _expand_plan(model.get_base_model())
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, ParamWrapper):
            return "PEFT does not split LoRA on experts"
        if isinstance(layer, LoraLayer) and layer.lora_variant:
            return "PEFT does not split DoRA, activated LoRA and other variants"
        style = styles.get(f"{name}.base_layer")
        if isinstance(layer, LoraLayer) and style not in _COMPLETE_OUTPUT | {"colwise", "rowwise"}:
            return f"PEFT does not split LoRA on {name} ({style})"
    return None


def _expand_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the style of each module and parameter inside layers, by name; embedding and head stay complete."""
    rules = {name: style for name, style in (model.tp_plan or {}).items() if "*" in name}
    styles: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue  # its base layer has the rule
        rule = re.sub(r"\.\d+(?=\.|$)", ".*", name.removesuffix(".base_layer"))
        for own, parameter in module._parameters.items():
            style = rules.get(f"{rule}.{own}", rules.get(rule))
            if style is not None and parameter is not None:
                styles[f"{name}.{own}"] = style
        if rule in rules:
            styles[name] = rules[rule]
    return styles


@torch.no_grad()
def split_model(model: torch.nn.Module, device: torch.device) -> bool:
    """Split the matrices of `model` over all processes, in place, with the weights of the first process.

    Returns False, and leaves `model` as it was, if its logits on a few tokens then differ from those of the complete
    model, in the first process. All processes must call this, and `why_unsplit` must return None.
    """
    inner, mesh = unwrap(model), init_device_mesh(device.type, (world_size(),))
    expected = _probe(model) if distributed.get_rank() == 0 else None
    holders = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    forwards = [(module, vars(module).get("forward")) for module in model.modules()]
    for module, name, parameter in holders:
        module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    styles = _expand_plan(inner)
    apply_tensor_parallelism(inner, mesh, styles)
    for name, layer in inner.named_modules():
        style = styles.get(f"{name}.base_layer")
        if isinstance(layer, LoraLayer) and style in ("colwise", "rowwise"):
            for part in (layer.lora_B if style == "colwise" else layer.lora_A).values():
                add_lora_tp_hooks_dtensor(part, style, mesh, base_layer=layer.get_base_layer(), module_name=name)
    _fill(holders, mesh)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    inner._tp_size = world_size()
    actual = _probe(model)
    agrees = [expected is not None and actual is not None and logits_agree(actual, expected, inner.dtype)]
    distributed.broadcast_object_list(agrees)
    if not agrees[0]:
        inner._tp_size = None
        for module, name, parameter in holders:
            module._parameters[name] = parameter
        for module, forward in forwards:
            vars(module).pop("forward", None)
            vars(module).update({} if forward is None else {"forward": forward})
    return agrees[0]


def _fill(holders: list[_Holder], mesh: DeviceMesh) -> None:
    """Give each process its slices of the first process's weights, on its device; tied weights stay tied."""
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module, name, parameter in holders:
        if parameter not in moved:
            kind, place = parameter.detach(), mesh.device_type
            sent = torch.empty_like(kind, device=place) if kind.is_meta else kind.to(place).contiguous()
            target: Any = module._parameters[name]
            if isinstance(target, DTensor):
                sent = distribute_tensor(sent, mesh, target.placements)
            else:
                distributed.broadcast(sent, 0)
            moved[parameter] = torch.nn.Parameter(sent, parameter.requires_grad)
            if kind.device.type == "cpu" and isinstance(target, DTensor):
                page_out(kind)
        module._parameters[name] = moved[parameter]


def _probe(model: torch.nn.Module) -> torch.Tensor | None:
    """Return the logits [1, T, V] of a few tokens, in main memory; None if the model refuses them."""
    size = unwrap(model).get_input_embeddings().weight.shape[0]
    ids_1T = torch.tensor([[size * (7 * i % 10) // 10 for i in range(_TOKENS)]], device=unwrap(model).device)
    with SuppressRefusal(), torch.inference_mode():
        return cast(torch.Tensor, model(input_ids=ids_1T, use_cache=False).logits.float().cpu())
    return None
