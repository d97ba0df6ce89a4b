"""Excel workbooks: read like the CSV file that Excel saves of a sheet."""

import csv
import datetime
import zipfile

import pytest
from rich.console import Console
from support.pictures import save
from support.rows import write_workbook
from support.runs import invoke

from llmtune.data.preparation import prepare_rows
from llmtune.data.sources import find_files, hash_sources, local_input
from llmtune.errors import DataError
from llmtune.recipe.data_section import Source
from llmtune.recipe.loader import load_recipe

HEADER = ["text", "label", "hours", "day", "note"]
ROWS = [[f"Größe {i}\nund mehr", "ja" if i % 2 else "nein", i / 2, "2026-12-01", None] for i in range(30)]


def read(path, **source):
    one = local_input(path)
    if source:
        one = type(one)(**{**vars(one), "source": one.source.model_copy(update=source)})
    return [row for _, row in one.raw_rows()]


def test_a_sheet_has_the_rows_of_its_csv_file(tmp_path):
    dated = [[*row[:3], datetime.datetime(2026, 12, 1), None] for row in ROWS]
    book = write_workbook(tmp_path / "rows.xlsx", ("Erste", [HEADER, *dated, [None] * 5, [" ", "", None, None, None]]))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        numbers = [[*row[:2], int(row[2]) if row[2] % 1 == 0 else row[2], *row[3:]] for row in ROWS]
        csv.writer(file).writerows([HEADER, *numbers])
    rows = [{**row, "note": ""} for row in read(book)[:-1]]  # a column without a cell is no column
    assert rows == read(tmp_path / "rows.csv")
    assert next(origin for origin, _ in local_input(book).raw_rows()).endswith("rows.xlsx:row 2")


def test_the_sheet_that_a_source_names_is_read_and_another_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book = write_workbook(tmp_path / "rows.xlsx", ("Erste", [["a"], ["1"]]), ("Zweite", [HEADER[:2], ["x", "y"]]))
    assert read(book) == [{"a": "1"}]
    assert read(book, config="Zweite") == [{"text": "x", "label": "y"}]
    with pytest.raises(DataError, match=r"no sheet 'Zweit'\n.*Erste, Zweite.*Did you mean 'Zweite'"):
        read(book, config="Zweit")
    done = invoke("init", "rows.xlsx", "--task", "completion", "--columns", "text=a")
    assert "the first sheet of 'Erste', 'Zweite' is read" in done.stderr


@pytest.mark.parametrize("kind", ["csv renamed", "half a workbook", "another archive", "no sheet's names"])
def test_a_file_that_is_no_workbook_is_refused_with_what_to_save(kind, tmp_path):
    path = write_workbook(tmp_path / "rows.xlsx", ("Erste", [HEADER, *ROWS]))
    content = path.read_bytes()
    if kind == "another archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "no sheet's names":
        write_workbook(path, ("Erste", [["a", "a"], ["1", "2"]]))
    else:
        path.write_bytes(b"a,b\n1,2\n" if kind == "csv renamed" else content[: len(content) // 2])
    with pytest.raises(DataError, match="two columns with the name 'a'" if "names" in kind else "CSV UTF-8"):
        read(path)


def test_a_workbook_that_unpacks_to_far_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", b"<a>" + b" " * 2**25)
    with pytest.raises(DataError, match="unpacks to more than 200 times"):
        read(tmp_path / "rows.xlsx")


def test_a_recipe_learns_from_a_workbook_and_notices_a_changed_picture(tmp_path):
    save(tmp_path / "1.png", 1)
    lines = [["image", "question", "answer"], *(["1.png", f"What is {i}?", f"It is {i}."] for i in range(30))]
    write_workbook(tmp_path / "rows.xlsx", ("Erste", lines))
    (tmp_path / "recipe.yaml").write_text(
        "task: chat\nmodel: {name: x/y}\ndata: {train: rows.xlsx, deduplicate: exact, validation: 0, test: 0}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert prepare_rows(recipe, tmp_path / "rows", Console(quiet=True)).rows_in == 30
    before = hash_sources(recipe.data, "chat")
    save(tmp_path / "1.png", 2)
    assert hash_sources(recipe.data, "chat") != before


def test_keys_without_effect_on_a_workbook_and_the_file_of_an_open_one_are_left_out(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "task: chat\nmodel: {name: x/y}\ndata: {train: {path: rows.xlsx, encoding: cp1252, split: a, config: b}}\n"
    )
    with pytest.raises(Exception, match="encoding") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert ("split" in str(caught.value), "config" in str(caught.value)) == (True, False)
    write_workbook(tmp_path / "in" if (tmp_path / "in").mkdir() else tmp_path / "in/rows.xlsx", ("A", [["a"], ["1"]]))
    (tmp_path / "in/~$rows.xlsx").write_bytes(b"owner")
    assert [path.name for path in find_files(Source(path=str(tmp_path / "in")), "data.train")] == ["rows.xlsx"]
