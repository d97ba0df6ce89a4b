"""Fixtures that write and check recipe files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtune.errors import Problem, RecipeError
from llmtune.recipe.loader import load_recipe

MINIMAL = "task: chat\ndata: {train: rows.jsonl}\nmodel: {name: owner/model}\n"

Write = Callable[..., Path]
Refuse = Callable[..., tuple[Problem, ...]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a recipe to the working folder: a minimal one plus lines, or with `whole` only the lines."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str = "", name: str = "recipe.yaml", whole: bool = False) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if whole else MINIMAL + text, encoding="utf-8")
        return path

    return write_recipe


@pytest.fixture
def refuse(write: Write) -> Refuse:
    """Write a recipe, assert that it is refused with exit code 2, and return its problems."""

    def refuse_recipe(text: str = "", sets: tuple[str, ...] = (), whole: bool = False) -> tuple[Problem, ...]:
        path = write(text, whole=whole)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, sets)
        assert caught.value.exit_code == 2
        return caught.value.problems

    return refuse_recipe
