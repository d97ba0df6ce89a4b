"""A tiny chat model with an adapter that does something, as a run would have left it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from support.tuned import Tune, tuner


@pytest.fixture
def tune(tiny_llama: Path, chat_rows: Path, tmp_path: Path, console: Console) -> Tune:
    return tuner(tiny_llama, chat_rows, tmp_path, console)
