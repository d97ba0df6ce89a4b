"""Causes of a failed certificate: a share of a LoRA that the weights lack, and the first layer that differs.

Outputs alone can hide a halved adapter: a saturated model answers the same, a barely trained one hardly moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose

from llmtune.deploy.parity import SLACK, measure_step
from llmtune.model.causal_lm_loss import unwrap

LOST = 0.25
"""Below this share the adapter is lost."""
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerStep:
    """The step that a LoRA adds to the weights of one layer, in factors."""

    name: str
    """As in the merged model, without `.weight`."""
    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    transposed: bool
    start: float
    """Inner product of the base weights with the step."""
    rms: float
    """Root mean square of the base weights."""

    def matrix(self) -> torch.Tensor:
        """Return the step, in float64 on the CPU."""
        step = self.scaling * (self.up.double() @ self.down.double())
        return cast(torch.Tensor, transpose(step, self.transposed))


def record_steps(model: torch.nn.Module) -> list[LayerStep]:
    """Return the steps of a model's LoRA layers, before they are merged; none of other methods and quantised bases."""
    return [*_find_steps(unwrap(model))]


def _find_steps(model: torch.nn.Module) -> Iterator[LayerStep]:
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or layer.lora_variant or list(layer.active_adapters) != ["default"]:
            continue
        weight = layer.get_base_layer().weight
        if weight.dtype not in FORMATS or "default" not in layer.lora_A or layer.lora_bias["default"]:
            continue
        factors = [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
        up, down = (factor.detach().float().cpu().clone() for factor in factors)
        step = LayerStep(name, up, down, float(layer.scaling["default"]), bool(layer.fan_in_fan_out), 0.0, 0.0)
        base = weight.detach().double().cpu()
        start, rms = float((base * step.matrix()).sum()), float(base.square().mean().sqrt())
        yield LayerStep(step.name, up, down, step.scaling, step.transposed, start, rms)


def find_lost_steps(steps: Sequence[LayerStep], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Describe a share of the steps in a product's weights that differs from 1 by more than rounding explains."""
    taken, total, off = 0.0, 0.0, list[tuple[float, float, str]]()
    noise = 0.0
    for step in steps:
        product = weights.get(f"{step.name}.weight")
        if product is None or product.is_meta or product.dtype not in FORMATS:
            return []
        matrix = step.matrix()
        size = float(matrix.square().sum())
        finest = torch.finfo(product.dtype).eps * step.rms
        if product.shape != matrix.shape or size / matrix.numel() <= finest**2:  # rounding alone may undo such a step
            continue
        part = float((product.detach().double().cpu() * matrix).sum()) - step.start
        rounding = finest * size**0.5
        taken, total, noise = taken + part, total + size, noise + rounding**2
        if not abs(part / size - 1) <= SLACK + 4 * rounding / size:
            off.append((abs(part / size - 1), part / size, step.name))
    if not total:
        return []
    share = taken / total
    if share < LOST:
        moved = f"{round(share, 2) + 0.0:.0%} of what tuning did to the base model's"
        return [f"the adapter is lost: its weights moved by {moved}"]
    if not abs(share - 1) <= SLACK + 4 * noise**0.5 / total:
        return [f"its weights moved by {round(share, 2) + 0.0:.0%} of what tuning did to the base model's"]
    if off:
        _, worst, name = max(off)
        return [f"the weights of {name} moved by {round(worst, 2) + 0.0:.0%} of what tuning did to the base model's"]
    return []


# Layers


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
    outputs: RecordedLayers = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            plain = getattr(module, "base_layer", None)
            base = None if plain is None else plain(given[0]).float().cpu()
            outputs[name] = LayerOutputs(output.float().cpu(), base)

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
    return outputs


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
                share, _ = measure_step([layer.base], [layer.tuned], [actual[name]], "layer")
                text += "" if share is None else f", and have {round(share, 2) + 0.0:.0%} of its adapter's effect"
            text += f"; those of earlier layers differ by at most {before:.1%}" if before else ""
            first = LayerDifference(name, text)
        before = max(before, difference)
    return first
