"""One small recipe, run once, and copies of that run."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.runs import write_recipe, write_sums

from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

ROWS = 60
SHORT = {"num_train_epochs": 3, "learning_rate": 1e-2}

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_sums(folder / "rows.jsonl", ROWS)
    write_recipe(folder / "tiny.yaml", tiny_llama, "rows.jsonl", train=SHORT)
    return folder


@pytest.fixture(scope="session")
def train(place: Path) -> Train:
    """Run the recipe with changes into a folder of `place`, once for all tests."""

    def run(name: str, *sets: str, until: str = "run") -> Path:
        torch.set_num_threads(1)
        if not (place / name).exists():
            options = RunRequest(out=place / name, until=until)
            run_pipeline(load_recipe(place / "tiny.yaml", sets), options, Console(file=io.StringIO()))
        return place / name

    return run


@pytest.fixture(scope="session")
def good(train: Train) -> Path:
    return train("good")


@pytest.fixture
def twin(good: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return shutil.copytree(good, tmp_path / "twin")


@pytest.fixture
def read(console: Console) -> Callable[[], str]:
    """Text that a person has read so far."""

    def said() -> str:
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return said
