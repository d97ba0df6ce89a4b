"""A tiny chat model with an adapter that does something, as a run would have left it."""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from llmtune.adapter.injection import inject
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel
from llmtune.tasks.registry import get_task
from support.runs import write_recipe

Tuned = tuple[AdaptedModel, Recipe]
Tune = Callable[..., Tuned]


def tuner(model: Path, rows: Path, folder: Path, console: Console) -> Tune:
    """What makes `model`, or another base, with an adapter of `strength`, and the recipe in `folder` that says so."""

    def build(base: Path = model, strength: float = 0.3, **sections: object) -> Tuned:
        recipe = load_recipe(write_recipe(folder / "tiny.yaml", base, rows, **sections)).recipe
        place = resolve_model(str(base), recipe.model, console, offline=True)
        processor = load_processor(place, recipe.model)
        selected = load_model(place, recipe, get_task(recipe.task), processor, device="cpu", training=False)
        adapted = inject(selected, recipe, console)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.data = strength * torch.randn(parameter.shape, generator=generator)
        return adapted, recipe

    return build
