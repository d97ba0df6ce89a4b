"""A folder to break things in, real commands in it, and the messages quoted in docs/guarantees.md."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.runs import FAST, invoke, write_colours, write_recipe


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder: a model, chat rows, space for a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "4000")  # no message is cut into lines
    shutil.copytree(tiny_llama, tmp_path / "model")
    write_colours(tmp_path / "rows.jsonl")
    return tmp_path


@pytest.fixture
def run(place: Path) -> Callable[..., str]:
    """Write the tiny recipe with changes and run a command of llmtune on it; returns the command's output."""

    def command(*words: object, code: int = 0, recipe: str = "tiny.yaml", out: str = "run", **sections: Any) -> str:
        write_recipe(place / recipe, "./model", "rows.jsonl", **{"train": FAST, **sections})
        result = invoke(words[0], recipe, "--out", out, *words[1:])
        assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return " ".join(result.stderr.split())

    return command


@pytest.fixture
def without() -> Callable[[str, object], AbstractContextManager[None]]:
    """Disables a guard: a replacement is used while the block runs."""

    @contextmanager
    def take_away(guard: str, instead: object) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard, instead)
            yield

    return take_away


@pytest.fixture
def shows(request: pytest.FixtureRequest) -> Iterator[Callable[[object], None]]:
    """Compares the output with the message quoted in the test's mark; `...` stands for any text."""
    quoted = request.node.get_closest_marker("guarantee").kwargs["shows"]
    pattern = ".*".join(map(re.escape, quoted.split("...")))
    checked: list[bool] = []

    def check(text: object) -> None:
        line = " ".join(str(text).split())
        assert re.search(pattern, line), line
        checked.append(True)

    yield check
    assert checked, "the page quotes a message that the test has seen"
