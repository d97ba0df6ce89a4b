"""The share of a LoRA that the weights of a product contain, measured without running it.

Outputs alone can hide a halved adapter: a saturated model answers the same, a barely trained one hardly moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora import Linear
from peft.utils.other import transpose

from llmtune.model.causal_lm_loss import unwrap

SLACK = 0.1
"""A share this far from 1 is an error of the product."""
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
        return [f"the adapter is lost: its weights moved by {share:.0%} of what tuning did to the base model's"]
    if not abs(share - 1) <= SLACK + 4 * noise**0.5 / total:
        return [f"its weights moved by {share:.0%} of what tuning did to the base model's"]
    if off:
        _, worst, name = max(off)
        return [f"the weights of {name} moved by {worst:.0%} of what tuning did to the base model's"]
    return []
