"""Which modules of a model were trained, read from the header of the adapter's file; and tensors read out of files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import safe_open

from llmtune.adapter.load import WEIGHTS, find_adapter
from llmtune.explain.target import Target
from llmtune.report.number_format import share

Kind = Literal["LoRA", "DoRA", "whole", "tokens", "bias", "weights"]
"""How a module was trained: `whole`, beside an adapter; `tokens`, some rows; `weights`, in a full training."""
WORDS: dict[Kind, str] = {"whole": "trained whole", "tokens": "new rows", "bias": "bias", "weights": "all weights"}
PREFIX = "base_model.model."
LOW = (".lora_A.", ".lora_embedding_A")


@dataclass(frozen=True)
class TrainedModule:
    """What was trained at one module."""

    kind: Kind
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

    def describe(self, parameters: int) -> str:
        """Say what was trained of a model with so many parameters."""
        if self.method == "full":
            return "all weights (method: full)"
        kinds = Counter(module.kind for module in self.modules.values())
        what = ", ".join(f"{WORDS.get(kind, kind)} on {number} modules" for kind, number in kinds.items())
        base = "; the base in 4 bits" if self.method == "qlora" else ""
        return f"{what}: {self.parameters:,} parameters, {share(self.parameters, parameters, 2)} of the base's{base}"

    def mark(self, names: Sequence[str]) -> str:
        """Return what was trained at modules that stand for one another in equal blocks; empty where nothing was."""
        found = [self.modules[name] for name in names if name in self.modules]
        if not found:
            return ""
        kinds = {WORDS.get(module.kind) or f"{module.kind} r {module.rank}" for module in found}
        word = kinds.pop() if len(kinds) == 1 else found[0].kind
        return word if len(found) == len(names) else f"{word} in {len(found)} of {len(names)}"


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
    found: dict[str, TrainedModule] = {}
    with safe_open(str(folder / WEIGHTS), "pt") as file:
        shapes = {name.removeprefix(PREFIX): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
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


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a folder of safetensors; only headers are read."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor."""
    with safe_open(str(path), "pt") as file:
        return cast(torch.Tensor, file.get_tensor(name))


def shorten(name: str, names: Sequence[str]) -> str:
    """Return the last part of a module's name, or as many as tell it from the others."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in names) == 1:
            return end
    return name
