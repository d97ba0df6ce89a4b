"""A tiny chat model with an adapter, and two finished runs on one base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.finished import finish_run
from support.runs import write_recipe

from llmtune.adapter import inject
from llmtune.model import load_model, load_processor, locate
from llmtune.recipe import load_recipe
from llmtune.tasks import get_task


@pytest.fixture
def tune(tiny_llama: Path, chat_rows: Path, tmp_path: Path, console: Console) -> Callable[..., object]:
    def build(base: Path = tiny_llama, strength: float = 0.3, **sections: object) -> object:
        recipe = load_recipe(write_recipe(tmp_path / "tiny.yaml", base, chat_rows, **sections)).recipe
        place = locate(str(base), recipe.model, console, offline=True)
        processor = load_processor(place, recipe.model)
        selected = load_model(place, recipe, get_task(recipe.task), processor, device="cpu", training=False)
        adapted = inject(selected, recipe, console)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.data = strength * torch.randn(parameter.shape, generator=generator)
        return adapted, recipe

    return build


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """Two runs on one base, which say different things."""
    folder = tmp_path_factory.mktemp("served")
    quick = {"num_train_epochs": 1}
    return {
        "plain": finish_run(folder / "one", tiny_llama, train=quick, generation={"max_new_tokens": 24}),
        "other": finish_run(folder / "two", tiny_llama, train={**quick, "learning_rate": 0.05}, seed=9),
    }
