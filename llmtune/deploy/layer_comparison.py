"""The first layer of an export whose outputs differ from the tuned model's: a cause for a failed certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from llmtune.deploy.parity import measure_share
from llmtune.model.causal_lm_loss import unwrap


@dataclass(frozen=True)
class LayerOutputs:
    """What a linear layer of the tuned model returned, and what its base weights return for the same inputs."""

    tuned: torch.Tensor
    base: torch.Tensor | None


@dataclass(frozen=True)
class LayerDifference:
    """A layer whose outputs differ from those of the tuned model."""

    layer: str
    """Module name."""
    text: str
    """By how much, for a certificate."""


RecordedLayers = dict[str, LayerOutputs]
"""By module name, in the order of computation."""
WRAPPERS = ".modules_to_save.default"
INSIDE = ("base_layer", "lora_", "original_module")
"""Parts of an adapted layer; the layer itself is compared."""


@torch.inference_mode()
def record_layers(model: torch.nn.Module, inputs: Mapping[str, Any]) -> RecordedLayers:
    """Return the outputs of the linear layers of a model, with or without adapter, for one batch."""
    found: RecordedLayers = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            plain = getattr(module, "base_layer", None)
            base = None if plain is None else plain(given[0]).float().cpu()
            found[name] = LayerOutputs(output.float().cpu(), base)

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


def find_first_difference(
    expected: RecordedLayers, actual: Mapping[str, torch.Tensor], least: float
) -> LayerDifference | None:
    """Return the layer where the relative difference of outputs grows most; None if none differs by `least`.

    Up to this layer both models compute nearly the same, so its own weights, or their rounding, are the cause.
    """
    worst, first, before = 0.0, None, 0.0
    for name, layer in expected.items():
        if name not in actual or actual[name].shape != layer.tuned.shape:
            continue
        difference = float((actual[name] - layer.tuned).norm() / layer.tuned.norm().clamp_min(1e-12))
        growth = difference / max(before, 1e-3)
        if growth > worst and not difference < least:
            worst, text = growth, f"the first layer that differs is {name}: its outputs differ by {difference:.1%}"
            if layer.base is not None:
                share = measure_share([layer.base], [layer.tuned], [actual[name]], "layer")
                text += "" if share is None else f", and have {share:.0%} of its adapter's effect"
            text += f"; those of earlier layers differ by at most {before:.1%}" if before else ""
            first = LayerDifference(name, text)
        before = max(before, difference)
    return first
