"""Which parts of a model carry what was trained, read from the header of the adapter's file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from llmtune.adapter import find_adapter
from llmtune.adapter.load import WEIGHTS
from llmtune.explain.target import Subject

Kind = Literal["LoRA", "DoRA", "whole", "tokens", "bias"]
PREFIX = "base_model.model."
LOW = (".lora_A.", ".lora_embedding_A")


@dataclass(frozen=True)
class Carrier:
    """What was trained at one module."""

    kind: Kind
    """LoRA or DoRA; `whole`: all of its weights; `tokens`: some rows of an embedding; `bias`."""
    parameters: int
    rank: int | None = None


@dataclass(frozen=True)
class Carriers:
    """What was trained of a model."""

    method: str
    """lora, qlora or full."""
    modules: dict[str, Carrier]
    """By name; empty with `full`."""

    @property
    def parameters(self) -> int:
        """Of the adapter, all modules together."""
        return sum(carrier.parameters for carrier in self.modules.values())

    def as_facts(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {**asdict(self), "parameters": self.parameters}


def find_carriers(subject: Subject) -> Carriers | None:
    """Return what was trained of a run's model; None where `subject` is no run.

    Raises EnvironmentProblem where the run's adapter is gone or damaged.
    """
    if subject.recipe is None:
        return None
    method = subject.recipe.adapter.method
    return Carriers(method, {} if method == "full" else read_carriers(find_adapter(Path(subject.name))))


def read_carriers(folder: Path) -> dict[str, Carrier]:
    """Return what each module carries by a PEFT folder; weights are not read."""
    shapes: dict[str, tuple[int, ...]] = {}
    with safe_open(str(folder / WEIGHTS), "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            shapes[name.removeprefix(PREFIX)] = tuple(file.get_slice(name).get_shape())
    found: dict[str, Carrier] = {}
    for name, shape in shapes.items():
        module, kind = _place(name)
        size = 1
        for edge in shape:
            size *= edge
        before = found.get(module, Carrier(kind, 0))
        rank = shape[0] if any(part in name for part in LOW) else before.rank
        stronger = before.kind if before.kind in ("LoRA", "DoRA", "whole") and kind in ("LoRA", "bias") else kind
        found[module] = Carrier(stronger, before.parameters + size, rank)
    return found


def _place(name: str) -> tuple[str, Kind]:
    """Return the module that a tensor of an adapter belongs to, and what kind of training it stands for."""
    if ".lora_" in name:
        return name.partition(".lora_")[0], "DoRA" if "magnitude" in name else "LoRA"
    if "trainable_tokens" in name:
        return name.partition(".token_adapter")[0].partition(".trainable_tokens")[0], "tokens"
    module, _, last = name.rpartition(".")
    return module, "bias" if last == "bias" else "whole"
