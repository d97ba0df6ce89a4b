"""A tiny chat model with an effective adapter, as left by a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support.adapting import tuner

from llmtune.deploy.tuned_model import TunedModel
from llmtune.tasks.registry import get_task


@pytest.fixture
def tune(tiny_llama: Path, chat_rows: Path, tmp_path: Path, console: Console) -> Callable[..., TunedModel]:
    build = tuner(tiny_llama, chat_rows, tmp_path, console)

    def make(*model: object, **sections: object) -> TunedModel:
        adapted, recipe = build(*model, **sections)
        return TunedModel(adapted, recipe, get_task(recipe.task), console=console)

    return make
