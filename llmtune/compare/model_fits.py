"""Which models of the catalogue can be tuned in so much memory, by which method, and with how long rows.

The plan is that of `--dry-run` and `select` (`llmtune.model.memory_plan`), for the shapes that the catalogue states.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from llmtune.data.task_interface import TaskInterface
from llmtune.errors import EnvironmentProblem, RecipeError, nearest
from llmtune.model.catalogue import CatalogueModel
from llmtune.model.config import build_skeleton, find_class, read_model_config
from llmtune.model.device import memory_limit
from llmtune.model.memory_plan import USABLE, plan_skeleton
from llmtune.recipe.schema import Recipe
from llmtune.records import MemoryPlan, ModelRef
from llmtune.tasks.registry import choose_variant

METHODS = ("full", "lora", "qlora")
CARDS: Mapping[str, tuple[float, float]] = {
    "b200": (180e9, 2250e12),
    "h200": (141e9, 989e12),
    "h100": (80e9, 989e12),
    "a100-80": (80e9, 312e12),
    "a100-40": (40e9, 312e12),
    "l40s": (48e9, 362e12),
    "a10": (24e9, 125e12),
    "l4": (24e9, 121e12),
    "4090": (24e9, 165e12),
    "3090": (24e9, 71e12),
    "t4": (16e9, 65e12),
}
"""Cards by name: bytes of memory, and operations a second in 16 bits, dense, by their makers' data sheets."""
EFFICIENCY = 0.35
"""Share of those operations that training reaches; 0.3 to 0.45 is usual on one card."""
DRIVER_BYTES = 600_000_000
"""What CUDA and its libraries keep on a card."""
FLOPS = {"full": 6, "lora": 4, "qlora": 4}
"""Operations a parameter and token: forward 2, backward 4; 2 where weights are frozen."""


@dataclass(frozen=True)
class Fit:
    """One model with one method: what it needs at least, and what fits."""

    model: str
    method: str
    parameters: int
    lower_bound: int
    longest: int
    """Tokens of the longest row that fits, at most the model's context; 0 where none does."""
    rows: int
    """Rows of the asked length in one micro-batch."""
    checkpointing: bool
    """Whether a row of the asked length needs `train.gradient_checkpointing`."""
    seconds: float | None
    """Of a million tokens, where the card is known."""


def find_device(name: str) -> tuple[float, float | None]:
    """Return memory in bytes and operations a second of a card or of this machine (`cpu`). Raises RecipeError."""
    if name == "cpu":
        return float(memory_limit("cpu") or 0), None
    if name not in CARDS:
        fix = f"{nearest(name, list(CARDS))} Cards: {', '.join(CARDS)}, cpu.".strip()
        raise RecipeError.of(f"the card {name!r} is not known", "--device", fix)
    return CARDS[name]


def list_fits(
    models: Sequence[CatalogueModel], task: str, memory: float, length: int, speed: float | None, device: str
) -> Iterator[Fit]:
    """Yield what fits, a model and method at a time; `device` is cpu or cuda. What cannot be built is left out."""
    with tempfile.TemporaryDirectory() as name:
        for number, model in enumerate(models):
            folder = Path(name) / str(number)
            model.write_config(folder)
            model_ref = ModelRef(model.name, folder, None, "")
            try:
                recipe = _recipe(task, "lora", False)
                variant = choose_variant(recipe, read_model_config(model_ref, recipe.model), model.name)
                model_class, config = find_class(model_ref, recipe, variant)
                skeleton = build_skeleton(model_class, config, recipe)
            except (RecipeError, EnvironmentProblem):
                continue
            for method in METHODS:
                yield _fit(model, skeleton, variant, method, memory, length, speed, device)


def _fit(
    model: CatalogueModel,
    skeleton: PreTrainedModel,
    variant: TaskInterface,
    method: str,
    memory: float,
    length: int,
    speed: float | None,
    device: str,
) -> Fit:
    length, room = min(length, model.context), int(USABLE * memory)
    plans = [
        plan_skeleton(skeleton, _recipe(variant.name, method, saving), variant, length, device, int(memory))
        for saving in (False, True)
    ]
    tokens = [_tokens(plan, length, room) for plan in plans]
    saving = tokens[0] < length
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    return Fit(
        model=model.name,
        method=method,
        parameters=parameters,
        lower_bound=plans[0].lower_bound,
        longest=min(model.context, max(tokens)),
        rows=tokens[saving] // length,
        checkpointing=saving,
        seconds=None if speed is None else FLOPS[method] * parameters * 1e6 / (speed * EFFICIENCY),
    )


def _recipe(task: str, method: str, checkpointing: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "task": task,
            "data": {"train": "rows.jsonl"},
            "model": {"name": "model", "dtype": "bfloat16"},
            "adapter": {"method": method},
            "train": {"gradient_checkpointing": checkpointing},
        }
    )


def _tokens(plan: MemoryPlan, length: int, room: int) -> int:
    """Return the tokens of the largest micro-batch that leaves room for all that does not grow with it."""
    growing = plan.parts["activations"] / length
    fixed = plan.total - plan.parts["activations"]
    return max(0, int((room - fixed) / growing))
