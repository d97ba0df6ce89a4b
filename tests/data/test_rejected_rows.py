"""The lists of unused rows: they are where messages say, whatever happens to the step's own folder."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import write_recipe

from llmtune.data.rejected_rows import listed
from llmtune.errors import DataError
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

BAD = '{"messages": [{"role": "user", "con'
LONG = json.dumps({"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "yes"}]})


def prepare(folder: Path, model: Path, rows: Path, console: Console, **data: object) -> None:
    recipe = write_recipe(folder / "tiny.yaml", model, rows, data=data)
    run_pipeline(load_recipe(recipe), RunRequest(out=folder / "run", until="prepare"), console)


def spoil(rows: Path, *lines: str) -> None:
    kept = rows.read_text().splitlines()
    rows.write_text("\n".join([*kept[: len(kept) - len(lines)], *lines]) + "\n")


def entries(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_list_named_in_an_error_about_bad_rows_exists(tmp_path, tiny_llama, chat_rows, console):
    spoil(chat_rows, *[BAD] * 25)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tiny_llama, chat_rows, console)
    named = re.search(r"All of them: (\S+)", caught.value.problems[0].fix)
    assert named
    assert Path(named[1]) == tmp_path / "run/data/bad_rows.jsonl"
    assert len(entries(Path(named[1]))) == 25
    assert caught.value.problems[-1].where == named[1]
    assert not list((tmp_path / "run/data").glob(".*"))


def test_rows_are_not_read_again_after_an_error_in_encoding_them(tmp_path, tiny_llama, chat_rows, console):
    spoil(chat_rows, LONG)
    for _ in range(2):
        with pytest.raises(DataError, match="on_overlong") as caught:
            prepare(tmp_path, tiny_llama, chat_rows, console)
    assert console.file.getvalue().count("unchanged, skipped") == 1
    path = tmp_path / "run/data/left_out.jsonl"
    assert str(path) in str(caught.value)
    (entry,) = entries(path)
    assert entry["where"].endswith("chat.jsonl:40")


def test_an_unfinished_list_leaves_the_old_one(tmp_path):
    path = tmp_path / "list.jsonl"
    with listed(path) as add:
        add({"where": "old"})
    with pytest.raises(TypeError), listed(path) as add:
        add({"where": object()})
    assert entries(path) == [{"where": "old"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["list.jsonl"]
