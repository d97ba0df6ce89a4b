"""The first layer of an export whose outputs differ from the tuned model's: a cause for a failed certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from llmtune.model.causal_lm_loss import unwrap

Layers = dict[str, torch.Tensor]
"""The outputs of linear layers by module name, in the order of computation."""
WRAPPERS = ".modules_to_save.default"
INSIDE = ("base_layer", "lora_", "original_module")
"""Parts of an adapted layer; the layer itself is compared."""
SLIGHT = 1e-3
"""Smaller relative differences are not reported."""


@torch.inference_mode()
def record_layers(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Layers:
    """Return the outputs of the linear layers of a model, with or without adapter, for one batch."""
    found: Layers = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: object, output: torch.Tensor) -> None:
            found[name] = output.float().cpu()

        return hook

    linear = [
        (name.replace(WRAPPERS, ""), module)
        for name, module in unwrap(model).named_modules()
        if isinstance(module, torch.nn.Linear | BaseTunerLayer) and not any(part in name for part in INSIDE)
    ]
    handles = [module.register_forward_hook(keep(name)) for name, module in linear]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def find_first_difference(expected: Layers, actual: Layers) -> str | None:
    """Describe the layer where the relative difference of outputs grows most; None if all differ slightly."""
    worst, text, before = 1.0, None, 0.0
    for name, outputs in expected.items():
        if name not in actual or actual[name].shape != outputs.shape:
            continue
        difference = float((actual[name] - outputs).norm() / outputs.norm().clamp_min(1e-12))
        growth = difference / max(before, SLIGHT)
        if growth > worst:
            known = f", those of earlier layers by at most {before:.1%}" if before else ""
            worst, text = (
                growth,
                f"the first layer that differs is {name}: its outputs differ by {difference:.1%}{known}",
            )
        before = max(before, difference)
    return text
