"""Tiny models of every family and a run, each made once; tests only read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support import families
from support.explaining import ANSWERED, train
from support.models import build_gpt2, build_llama


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder: `built("bert")`."""
    folder = tmp_path_factory.mktemp("families")
    decoders = {"llama": build_llama, "gpt2": build_gpt2}

    @cache
    def build(family: str) -> Path:
        builder = decoders.get(family) or getattr(families, f"build_{family}")
        return builder(folder / family)

    return build


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model learned to answer `blue`; its base is `model` in the same folder."""
    folder = tmp_path_factory.mktemp("chat")
    longer = {"num_train_epochs": 12}
    return train(folder, build_llama(folder / "model"), ANSWERED, train=longer, evaluate={"metrics": ["loss"]})
