"""The model before training, kept with the one that is trained: the reference of preference losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from llmtune.adapter.wiring_check import SWITCHES_OFF

KEPT = "weights_before_training"
"""On a model whose reference is not just its adapter switched off: what its trainable weights were, by name."""


def switches_off(model: torch.nn.Module) -> bool:
    """Whether `model` is what it was before training once its adapter, made anew, is switched off.

    It is not where biases are trained, nor where the adapter took a part of the base weights (PiSSA, OLoRA).
    """
    if not isinstance(model, PeftModel) or hasattr(model, "start_weights") or not getattr(model, SWITCHES_OFF, True):
        return False
    return all(getattr(config, "bias", "none") == "none" for config in model.peft_config.values())


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def keep_reference(model: torch.nn.Module) -> None:
    """Keep a copy of the trainable weights on the model, or of this process's part: as much memory as they take."""
    trained = {name: own_part(p).detach() for name, p in model.named_parameters() if p.requires_grad}
    setattr(model, KEPT, {name: part.clone() for name, part in trained.items()})


def reference_of(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Return a context in which `model`, which DDP may have wrapped, is what it was before training.

    With a fresh adapter that is the adapter switched off; with one that training went on from, or with all weights
    trained, the weights that were kept. A model that is neither is its own reference.
    """
    inner = cast(torch.nn.Module, getattr(model, "module", model))
    kept = getattr(inner, KEPT, None)
    if kept is not None:
        return _restored(inner, kept)
    return inner.disable_adapter() if isinstance(inner, PeftModel) else nullcontext()


@contextmanager
def _restored(model: torch.nn.Module, kept: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let parameters be other tensors for a while; nothing that autograd holds changes, and only shards are copied."""
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
    """Exchange the values of sharded parameters with those kept, in place: other code reads from their memory."""
    with torch.no_grad():
        for name in names:
            part = own_part(parameters[name])
            now = part.clone()
            part.copy_(kept[name])
            kept[name].copy_(now)
