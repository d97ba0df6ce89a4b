"""`prepare --write-test`: the test rows as their sources have them, in a file for a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.runs import invoke, write_colours, write_recipe

from llmtune.data.row_store import iterate_ids, load_rows


def ids_of_tests(run: Path) -> list[str]:
    return sorted(iterate_ids(load_rows(run / "data" / "rows"), "test"))


def add_rows(path: Path, count: int) -> None:
    turns = [
        [{"role": "user", "content": f"Is {i} even?"}, {"role": "assistant", "content": "no"}] for i in range(count)
    ]
    path.write_text(path.read_text() + "".join(json.dumps({"messages": one}) + "\n" for one in turns))


@pytest.mark.parametrize("name", ["test.csv", "test.parquet", "test", "test.jsonl.gz"])
def test_a_file_name_other_than_json_lines_is_refused_before_reading(here: Path, name: str) -> None:
    done = invoke("prepare", "none.yaml", "--write-test", name)
    assert done.exit_code == 2
    assert "written as JSON Lines" in done.stderr
    assert list(here.iterdir()) == []


def test_the_written_file_keeps_the_test_rows_when_the_data_grows(tmp_path: Path, tiny_llama: Path) -> None:
    rows = write_colours(tmp_path / "rows.jsonl")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, "rows.jsonl")
    done = invoke("prepare", recipe, "--out", tmp_path / "run", "--write-test", tmp_path / "held" / "test.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "Set in data: test: held/test.jsonl" in " ".join(done.stderr.split())
    written = (tmp_path / "held" / "test.jsonl").read_text().splitlines()
    assert {*written} <= {*rows.read_text().splitlines()}, "as the source has them"
    add_rows(rows, 30)
    grown = write_recipe(tmp_path / "grown.yaml", tiny_llama, "rows.jsonl", data={"test": "held/test.jsonl"})
    assert invoke("prepare", grown, "--out", tmp_path / "again").exit_code == 0
    assert ids_of_tests(tmp_path / "again") == ids_of_tests(tmp_path / "run")


def test_the_recipe_line_names_mapped_columns(tmp_path: Path, tiny_llama: Path) -> None:
    lines = ["Frage;Antwort", *(f"Was ist {i} + {i}?;{2 * i}" for i in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(lines).replace(";", ","), encoding="utf-8")
    source: Any = {"path": "rows.csv", "columns": {"prompt": "Frage", "completion": "Antwort"}, "format": "csv"}
    sections = {"task": "completion", "evaluate": {"metrics": ["loss"]}}
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, "x", data={"train": source}, **sections)
    done = invoke("prepare", recipe, "--out", tmp_path / "run", "--write-test", tmp_path / "test.jsonl")
    assert done.exit_code == 0, done.stderr
    line = " ".join(done.stderr.split()).rpartition("Set in data: ")[2]
    assert json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0]).keys() == {"Frage", "Antwort"}
    named = YAML(typ="safe").load(line)["test"]
    assert named == {"path": "test.jsonl", "columns": source["columns"]}
    again = write_recipe(tmp_path / "again.yaml", tiny_llama, "x", data={"train": source, "test": named}, **sections)
    assert invoke("prepare", again, "--out", tmp_path / "again").exit_code == 0
    assert ids_of_tests(tmp_path / "again") == ids_of_tests(tmp_path / "run")


@pytest.mark.parametrize(("options", "told"), [((), "the file exists"), (("--dry-run",), "exclude each other")])
def test_an_existing_file_and_a_dry_run_are_refused_immediately(
    tmp_path: Path, tiny_llama: Path, options: tuple[str, ...], told: str
) -> None:
    write_colours(tmp_path / "rows.jsonl")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, "rows.jsonl")
    (tmp_path / "test.jsonl").write_text("kept")
    done = invoke("prepare", recipe, "--out", tmp_path / "run", "--write-test", tmp_path / "test.jsonl", *options)
    assert done.exit_code == 2, done.output
    assert told in " ".join(done.stderr.split())
    assert (tmp_path / "test.jsonl").read_text() == "kept"
    assert not (tmp_path / "run" / "data").exists()


def test_without_test_rows_nothing_is_written(tmp_path: Path, tiny_llama: Path) -> None:
    write_colours(tmp_path / "rows.jsonl")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, "rows.jsonl", data={"test": 0.0}, evaluate=None)
    done = invoke("prepare", recipe, "--out", tmp_path / "run", "--write-test", tmp_path / "test.jsonl")
    assert done.exit_code == 3, done.output
    assert "no test rows to write" in " ".join(done.stderr.split())
    assert not (tmp_path / "test.jsonl").exists()
