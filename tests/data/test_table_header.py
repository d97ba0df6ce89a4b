"""Titles and merged headers above the names of columns are named once; ordinary headers are left alone."""

import csv

import pytest
from support.rows import write_workbook
from support.runs import invoke

from llmtune.data.table_header import refuse_title
from llmtune.errors import DataError

NAMES = ["Nr", "Anfrage", "Thema"]
ROWS = [[str(i), f"Wo ist mein Paket Nummer {i}?", ("Logistik", "Rechnung")[i % 2]] for i in range(40)]
ABOVE = {
    "a title": [["Kundenanfragen 2026", "", ""]],
    "a title above a merged header": [["Kundenanfragen 2026", "", ""], ["Anfrage", "", "Einordnung"]],
    "a merged header": [["", "", "Einordnung"]],
    "a title above an empty line": [["Kundenanfragen 2026", "", ""], ["", "", ""]],
}


@pytest.mark.parametrize("kind", ABOVE)
@pytest.mark.parametrize("name", ["rows.csv", "rows.xlsx"])
def test_a_title_is_named_once_with_the_line_of_the_names(kind, name, here):
    lines = [*ABOVE[kind], NAMES, *ROWS]
    if name == "rows.xlsx":
        write_workbook(here / name, ("Anfragen", lines))
    else:
        with (here / name).open("w", newline="", encoding="cp1252") as file:
            csv.writer(file, delimiter=";").writerows(lines)
    (here / "mine.yaml").write_text(
        f"task: classify\nmodel: {{name: x/y}}\ndata: {{train: {name}, columns: {{text: Anfrage, label: Thema}}}}\n"
    )
    for command in (("init", name, "--out", "new.yaml"), ("recipes", "check", "mine.yaml")):
        done = invoke(*command)
        assert (done.exit_code, done.stderr.count("title")) == (3, 1), done.stderr
        assert f"Line {len(ABOVE[kind]) + 1} seems to have them: Nr, Anfrage, Thema." in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [["text"], ["Hello, you"], ["Hello"]],
        [["", "text", "label"], ["a", "Hello there", "spam"], ["b", "Buy this", "ham"]],
        [["", "text"], ["a", "Hello there"], ["b", "Buy this"]],
        [["text", "label", "note"], ["Hello", "spam", "x"], ["Buy", "ham", "y"]],
        [["text", "", "label"], ["Hello", "so", "spam"], ["Buy", "too", "ham"]],
        [["text", "label"], ["Hello"], ["Buy"], ["Hi", "ham"]],
    ],
)
def test_an_ordinary_header_is_left_alone(lines):
    refuse_title(lines, "rows.csv:1")


def test_a_title_without_names_below_is_named_without_a_line():
    with pytest.raises(DataError, match=r"'Export'\n    The first line must .* Remove the lines above it.$"):
        refuse_title([["Export", "", ""], ["1", "2", "3"], ["4", "5", "6"]], "rows.csv:1")
