"""Recipes and data files for tests of the rows."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmtune.data.file_readers import parse_lines, read_lazily
from llmtune.data.preparation import prepare_rows
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import FORMATS, detect_format, parse_row
from llmtune.data.row_store import iterate_rows
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import SPLITS, Rows


def chat(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_row(row: dict[str, Any], task: str = "chat", name: str | None = None) -> dict[str, Any]:
    """Return the canonical row; its format is detected from its columns, unless it is named."""
    return parse_row(row, FORMATS[name] if name else detect_format([row], task, {}, None, "file"), task)


def read_file(path: Path, name: str, container: str) -> list[Any]:
    """Return the rows of a file, each with its origin."""
    return list(parse_lines(read_lazily(path, name, container)))


def refusal(row: dict[str, Any], task: str = "chat", name: str | None = None) -> str:
    """Return the error of a bad row."""
    with pytest.raises(RowError) as caught:
        read_row(row, task, name)
    return str(caught.value)


def make_recipe(folder: Path, train: object, task: str = "chat", **data: Any) -> Recipe:
    """Write a recipe in `folder`, without validation and test shares unless given."""
    section = {"train": train, "validation": 0, "test": 0, "deduplicate": "exact", **data}
    text = {"recipe_version": 1, "name": "t", "task": task, "data": section, "model": {"name": "x/y"}}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(text))  # JSON is YAML
    return load_recipe(path).recipe


def prepare(folder: Path, train: object, task: str = "chat", out: str = "out", **data: Any) -> Rows:
    recipe = make_recipe(folder, train, task, **data)
    return prepare_rows(recipe, folder / out, Console(file=io.StringIO(), width=200))


def rows_of(rows: Rows, side: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in iterate_rows(rows, side)]


def questions(rows: Rows) -> dict[str, list[str]]:
    """Return the first message of every row, by split, sorted."""
    return {side: sorted(row["messages"][0]["content"] for row in rows_of(rows, side)) for side in SPLITS}


def write_workbook(path, *sheets):
    """Write sheets, each a title and lines."""
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, lines in sheets:
        sheet = book.create_sheet(title)
        for line in lines:
            sheet.append(line)
    book.save(path)
    return path
