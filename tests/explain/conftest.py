"""Tiny models of every family and a run, each made once; tests only read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support import families
from support.explaining import ANSWERED, train
from support.image_text import build_image_text
from support.models import build_gpt2, build_llama
from support.pictures import save


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


@pytest.fixture(scope="session")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Gemma 3 that was tuned on rows with pictures; its base is `model` in the same folder."""
    folder = tmp_path_factory.mktemp("image_run")
    rows = []
    for number in range(12):
        picture = {"type": "image", "path": str(save(folder / f"{number}.png", seed=number))}
        text = {"type": "text", "text": f"Which colour is it? {number}"}
        turns = [{"role": "user", "content": [picture, text]}, {"role": "assistant", "content": "blue"}]
        rows.append({"messages": turns})
    quick = {"num_train_epochs": 2, "batch_size": 4, "learning_rate": 0.05}
    return train(
        folder, build_image_text(folder / "model", "gemma3"), rows, train=quick, evaluate={"metrics": ["loss"]}
    )
