"""Which modules of a model were trained, read from the adapter's file, and how far each moved.

The measures are the relative norm of the change and its effective rank. Shapes: I inputs, O
outputs, R rank.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper, transpose
from safetensors import safe_open

from llmtune.adapter.load import WEIGHTS, find_adapter
from llmtune.display.number_format import share
from llmtune.explain.explainer import Target

TrainingKind = Literal["LoRA", "DoRA", "whole", "tokens", "bias", "weights"]
"""How a module was trained: `whole` next to an adapter, `tokens` for some rows, `weights` in full training."""
WORDS: dict[TrainingKind, str] = {
    "whole": "fully trained",
    "tokens": "new rows",
    "bias": "bias",
    "weights": "all weights",
}
PREFIX = "base_model.model."
LOW = (".lora_A.", ".lora_embedding_A")


@dataclass(frozen=True)
class TrainedModule:
    """One trained module."""

    kind: TrainingKind
    parameters: int
    rank: int | None = None


@dataclass(frozen=True)
class TrainedModules:
    """The trained modules of a model."""

    method: str
    """lora, qlora or full."""
    modules: dict[str, TrainedModule]
    """Modules by name; empty for `full`."""

    @property
    def parameters(self) -> int:
        """Total parameters of the adapter."""
        return sum(module.parameters for module in self.modules.values())

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        return {**asdict(self), "parameters": self.parameters}

    def describe(self, parameters: int) -> str:
        """Describe the trained part of a model with `parameters` parameters."""
        if self.method == "full":
            return "all weights (method: full)"
        kinds = Counter(module.kind for module in self.modules.values())
        what = ", ".join(f"{WORDS.get(kind, kind)} on {number} modules" for kind, number in kinds.items())
        base = "; the base in 4 bits" if self.method == "qlora" else ""
        return f"{what}: {self.parameters:,} parameters, {share(self.parameters, parameters, 2)} of the base's{base}"

    def count_inside(self, name: str) -> int:
        """Return the trained parameters in a module."""
        return sum(one.parameters for module, one in self.modules.items() if f"{module}.".startswith(f"{name}."))

    def mark(self, names: Sequence[str]) -> str:
        """Return a label for one trained module across equal blocks; empty if none was trained."""
        modules = [self.modules[name] for name in names if name in self.modules]
        if not modules:
            return ""
        kinds = {WORDS.get(module.kind) or f"{module.kind} r {module.rank}" for module in modules}
        word = kinds.pop() if len(kinds) == 1 else modules[0].kind
        return word if len(modules) == len(names) else f"{word} in {len(modules)} of {len(names)}"


def find_trained(target: Target) -> TrainedModules | None:
    """Return the trained modules of a run; None if `target` is not a run.

    Raises EnvironmentProblem if the run's adapter is missing or damaged.
    """
    if target.recipe is None:
        return None
    method = target.recipe.adapter.method
    return TrainedModules(method, {} if method == "full" else read_adapter(find_adapter(Path(target.name))))


def read_adapter(folder: Path) -> dict[str, TrainedModule]:
    """Return the trained modules of a PEFT folder, without reading weights."""
    modules: dict[str, TrainedModule] = {}
    with safe_open(str(folder / WEIGHTS), "pt") as file:
        shapes = {name.removeprefix(PREFIX): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        module, kind = _module_of(name)
        before = modules.get(module, TrainedModule(kind, 0))
        rank = shape[0] if any(part in name for part in LOW) else before.rank
        stronger = before.kind if before.kind in ("LoRA", "DoRA", "whole") and kind in ("LoRA", "bias") else kind
        modules[module] = TrainedModule(stronger, before.parameters + math.prod(shape), rank)
    return modules


def _module_of(name: str) -> tuple[str, TrainingKind]:
    """Return the module of an adapter's tensor, and how it was trained."""
    if ".lora_" in name:
        return name.partition(".lora_")[0], "DoRA" if "magnitude" in name else "LoRA"
    if "trainable_tokens" in name:
        return name.partition(".token_adapter")[0].partition(".trainable_tokens")[0], "tokens"
    module, _, last = name.rpartition(".")
    return module, "bias" if last == "bias" else "whole"


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor in a safetensors folder, reading only headers."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor."""
    with safe_open(str(path), "pt") as file:
        return cast(torch.Tensor, file.get_tensor(name))


def short_module_name(name: str, names: Sequence[str]) -> str:
    """Return the last parts of a module's name, as few as identify it."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in names) == 1:
            return end
    return name


# How far each moved

ADAPTER = "default"
WIDEST = 2048
"""Maximum smaller side of a matrix for computing the singular values of a full-rank change."""


@dataclass(frozen=True)
class Move:
    """How far one module moved."""

    module: str
    kind: TrainingKind
    change: float
    """Frobenius norm of the change."""
    weight: float
    """Frobenius norm of the weights before training; dequantised if quantised."""
    parameters: int
    """Number of changed weights; for LoRA the size of the base matrix."""
    rank: int | None = None
    """Maximum possible rank of the change."""
    effective_rank: float | None = None
    """exp of the entropy of the singular values as shares (Roy and Vetterli, 2007): the number of directions in use.
    For DoRA that of BA alone. None if it is not a matrix, or too large."""
    layer: str | None = None
    """Its layer; None outside the layers."""
    column: str | None = None
    """Its name within the layer."""

    @property
    def relative(self) -> float | None:
        """The change relative to the weights; None if these are zero."""
        return self.change / self.weight if self.weight else None


def adapter_moves(model: torch.nn.Module) -> Iterator[Move]:
    """Yield a move for each adapted or fully trained module of a PEFT model, without changing the model."""
    taken = ""
    for name, module in model.named_modules():
        if taken and name.startswith(taken):
            continue
        plain, layer = name.removeprefix(PREFIX), cast(Any, module)
        if isinstance(module, LoraLayer):
            yield lora_move(plain, module)
        elif isinstance(module, ModulesToSaveWrapper):
            before, after = layer.original_module, layer.modules_to_save[ADAPTER]
            yield compare_weights(plain, "whole", dict(before.named_parameters()), dict(after.named_parameters()))
        elif isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            rows, changed = layer.trainable_tokens_original[ADAPTER], layer.trainable_tokens_delta[ADAPTER]
            yield compare_weights(plain.removesuffix(".token_adapter"), "tokens", {"rows": rows}, {"rows": changed})
        else:
            continue
        taken = f"{name}."


@torch.no_grad()
def lora_move(name: str, module: Any) -> Move:
    """Measure a LoRA without computing its product; for a DoRA, which scales the sum, compute the full matrix."""
    a_RI, b_OR = factors(module)
    # B A = Q1 (R1 R2^T) Q2^T, so its singular values are those of the small product R1 R2^T
    first, second = (torch.linalg.qr(part.double(), mode="r").R for part in (b_OR, a_RI.T))
    singular_R = module.scaling[ADAPTER] * torch.linalg.svdvals(first @ second.T)
    weight = dequantize_module_weight(module.get_base_layer()).detach()
    varied = bool(getattr(module, "use_dora", {}).get(ADAPTER))
    change = float((merged(module, weight) - weight.float()).norm()) if varied else float(singular_R.norm())
    rank = min(a_RI.shape[0], a_RI.shape[1], b_OR.shape[0])
    kind: TrainingKind = "DoRA" if varied else "LoRA"
    return Move(name, kind, change, float(weight.float().norm()), weight.numel(), rank, effective_rank(singular_R))


def factors(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [R, I] and B [O, R] of a LoRA; a convolution's window counts as inputs."""
    if ADAPTER in getattr(module, "lora_embedding_A", {}):
        return module.lora_embedding_A[ADAPTER].detach(), module.lora_embedding_B[ADAPTER].detach()
    a, b = module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight.detach()
    return a.flatten(1), b.flatten(1)


def effective_rank(singular: torch.Tensor) -> float | None:
    """Return exp of the entropy of singular values as shares of their sum; None if all are zero."""
    total = singular.sum()
    return float(torch.special.entr(singular / total).sum().exp()) if total else None


def merged(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return the effective weights of a DoRA: a magnitude per output times the direction of W + s B A."""
    if weight.ndim != 2 or ADAPTER in getattr(module, "lora_embedding_A", {}):
        twin = copy.deepcopy(module)  # an embedding or a convolution, never quantised
        twin.merge()
        return cast(torch.Tensor, twin.get_base_layer().weight.detach().float())
    a_RI, b_OR = factors(module)
    flipped = bool(module.fan_in_fan_out)
    moved_OI = transpose(weight, flipped).float() + module.scaling[ADAPTER] * (b_OR @ a_RI).float()
    magnitude_O = module.lora_magnitude_vector[ADAPTER].weight.detach().float()
    return cast(torch.Tensor, transpose((magnitude_O / moved_OI.norm(dim=1))[:, None] * moved_OI, flipped))


@torch.no_grad()
def compare_weights(
    name: str, kind: TrainingKind, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> Move:
    """Measure a fully trained module by the weights named in both; the rank is that of its only matrix."""
    change = weight = 0.0
    parameters, matrices = 0, []
    for key in before.keys() & after.keys():
        old, new = before[key].detach().double(), after[key].detach().to(before[key].device).double()
        change, weight = change + float((new - old).square().sum()), weight + float(old.square().sum())
        parameters += old.numel()
        if old.ndim == 2:
            matrices.append(new - old)
    rank = effective = None
    if len(matrices) == 1:
        (delta,) = matrices
        rank = min(delta.shape)
        if rank <= WIDEST:  # from the Gram matrix of the shorter side; half the digits suffice for shares
            small = delta @ delta.T if delta.shape[0] < delta.shape[1] else delta.T @ delta
            effective = effective_rank(torch.linalg.eigvalsh(small).clamp(min=0).sqrt())
    return Move(name, kind, change**0.5, weight**0.5, parameters, rank, effective)
