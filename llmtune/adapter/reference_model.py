"""The model before training, kept next to the trained one: the reference of preference losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor

from llmtune.adapter.wiring_check import SWITCHES_OFF

REFERENCE = "weights_before_training"
"""Attribute with the initial trainable weights by name, if switching the adapter off does not restore them."""


def switches_off(model: torch.nn.Module) -> bool:
    """Whether switching off a fresh adapter restores `model` to its state before training.

    It does not if biases are trained, or if the adapter took over some of the base weights (PiSSA, OLoRA).
    """
    if not isinstance(model, PeftModel) or hasattr(model, "start_weights") or not getattr(model, SWITCHES_OFF, True):
        return False
    return all(getattr(config, "bias", "none") == "none" for config in model.peft_config.values())


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def keep_reference(model: torch.nn.Module) -> None:
    """Keep a copy of the trainable weights on the model (of this process's shards), which needs as much memory."""
    trained = {name: own_part(p).detach() for name, p in model.named_parameters() if p.requires_grad}
    setattr(model, REFERENCE, {name: part.clone() for name, part in trained.items()})


def reference_of(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Return a context in which `model`, possibly wrapped by DDP, is in its state before training.

    For a fresh adapter, the adapter is switched off. After continuing an adapter, or with all weights trained, the
    kept weights are restored. Any other model is its own reference.
    """
    inner = cast(torch.nn.Module, getattr(model, "module", model))
    weights = getattr(inner, REFERENCE, None)
    if weights is not None:
        return _restored(inner, weights)
    return inner.disable_adapter() if isinstance(inner, PeftModel) else nullcontext()


@contextmanager
def without_adapter(model: PeftModel, *, keeps_head: bool) -> Iterator[None]:
    """Switch the adapter off for a while; with `keeps_head`, trained modules other than adapters stay on."""
    if not keeps_head:
        with model.disable_adapter():
            yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def _restored(model: torch.nn.Module, kept: dict[str, torch.Tensor]) -> Iterator[None]:
    """Swap the parameters' tensors for a while; autograd's tensors do not change, and only shards are copied."""
    parameters = dict(model.named_parameters())
    sharded = [name for name in kept if own_part(parameters[name]) is not parameters[name]]
    now = {name: parameters[name].data for name in kept if name not in sharded}
    try:
        _exchange(parameters, kept, sharded)
        for name in now:
            parameters[name].data = kept[name]
        yield
    finally:
        for name, weights in now.items():
            parameters[name].data = weights
        _exchange(parameters, kept, sharded)


def _exchange(parameters: dict[str, torch.nn.Parameter], kept: dict[str, torch.Tensor], names: list[str]) -> None:
    """Exchange the values of sharded parameters with those kept, in place: other code reads their memory."""
    with torch.no_grad():
        for name in names:
            part = own_part(parameters[name])
            now = part.clone()
            part.copy_(kept[name])
            kept[name].copy_(now)
