"""Which modules of a model were trained, read from the header of the adapter's file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from llmtune.adapter.load import WEIGHTS, find_adapter
from llmtune.explain.target import Target

Kind = Literal["LoRA", "DoRA", "whole", "tokens", "bias"]
PREFIX = "base_model.model."
LOW = (".lora_A.", ".lora_embedding_A")


@dataclass(frozen=True)
class TrainedModule:
    """What was trained at one module."""

    kind: Kind
    """LoRA or DoRA; `whole`: all of its weights; `tokens`: some rows of an embedding; `bias`."""
    parameters: int
    rank: int | None = None


@dataclass(frozen=True)
class TrainedModules:
    """What was trained of a model."""

    method: str
    """lora, qlora or full."""
    modules: dict[str, TrainedModule]
    """By name; empty with `full`."""

    @property
    def parameters(self) -> int:
        """Of the adapter, all modules together."""
        return sum(module.parameters for module in self.modules.values())

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        return {**asdict(self), "parameters": self.parameters}


def find_trained(target: Target) -> TrainedModules | None:
    """Return what was trained of a run's model; None where `target` is no run.

    Raises EnvironmentProblem where the run's adapter is gone or damaged.
    """
    if target.recipe is None:
        return None
    method = target.recipe.adapter.method
    return TrainedModules(method, {} if method == "full" else read_adapter(find_adapter(Path(target.name))))


def read_adapter(folder: Path) -> dict[str, TrainedModule]:
    """Return what a PEFT folder holds for each module; weights are not read."""
    shapes: dict[str, tuple[int, ...]] = {}
    with safe_open(str(folder / WEIGHTS), "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            shapes[name.removeprefix(PREFIX)] = tuple(file.get_slice(name).get_shape())
    found: dict[str, TrainedModule] = {}
    for name, shape in shapes.items():
        module, kind = _module_of(name)
        before = found.get(module, TrainedModule(kind, 0))
        rank = shape[0] if any(part in name for part in LOW) else before.rank
        stronger = before.kind if before.kind in ("LoRA", "DoRA", "whole") and kind in ("LoRA", "bias") else kind
        found[module] = TrainedModule(stronger, before.parameters + math.prod(shape), rank)
    return found


def _module_of(name: str) -> tuple[str, Kind]:
    """Return the module that a tensor of an adapter belongs to, and how that was trained."""
    if ".lora_" in name:
        return name.partition(".lora_")[0], "DoRA" if "magnitude" in name else "LoRA"
    if "trainable_tokens" in name:
        return name.partition(".token_adapter")[0].partition(".trainable_tokens")[0], "tokens"
    module, _, last = name.rpartition(".")
    return module, "bias" if last == "bias" else "whole"
