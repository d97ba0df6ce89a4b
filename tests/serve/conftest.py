"""A tiny chat model with an adapter, and two finished runs on one base."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from support.finished import finish_run
from support.tuned import Tune, tuner


@pytest.fixture
def tune(tiny_llama: Path, chat_rows: Path, tmp_path: Path, console: Console) -> Tune:
    return tuner(tiny_llama, chat_rows, tmp_path, console)


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """Two runs on one base, which say different things."""
    folder = tmp_path_factory.mktemp("served")
    quick = {"num_train_epochs": 1}
    return {
        "plain": finish_run(folder / "one", tiny_llama, train=quick, generation={"max_new_tokens": 24}),
        "other": finish_run(folder / "two", tiny_llama, train={**quick, "learning_rate": 0.05}, seed=9),
    }
