"""The list of suspicious rows opens in the reader's spreadsheet, with the source's separator."""

import csv
from pathlib import Path

import pytest
from support.rows import write_workbook

from llmtune.cli.rows import choose_delimiter
from llmtune.evaluate.suites.label_errors import Suspect, write_suspects
from llmtune.recipe.data_section import DataSection, Source

GERMAN, ENGLISH = "Die Rechnung ist falsch und das Paket ist nicht da", "The invoice is wrong and the parcel is late"


@pytest.mark.parametrize(
    ("name", "content", "encoding", "text", "delimiter"),
    [
        ("rows.csv", "text;label\n", "cp1252", ENGLISH, ";"),
        ("rows.csv", "text,label\n", None, GERMAN, ","),
        ("rows.csv", "sep=;\ntext;label\n", None, ENGLISH, ";"),
        ("rows.tsv", "text\tlabel\n", "utf-16", ENGLISH, "\t"),
        ("rows.xlsx", "", None, GERMAN, ";"),
        ("rows.xlsx", "", None, ENGLISH, ","),
        ("gone.csv", None, None, GERMAN, ";"),
        ("rows.jsonl", "{}", None, "", ","),
    ],
)
def test_the_separator_is_that_of_the_source_or_of_the_language(
    name: str, content: str | None, encoding: str | None, text: str, delimiter: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name.endswith("xlsx"):
        write_workbook(path, ("A", [["text", "label"], ["a", "b"]]))
    elif content is not None:
        path.write_text(content, encoding or "utf-8")
    source = Source(path=str(path), encoding=encoding)
    assert choose_delimiter(DataSection(train=(source,)), [text] * 3) == delimiter


def test_the_list_has_a_byte_order_mark_and_decimal_commas_with_semicolons(tmp_path: Path) -> None:
    suspect = Suspect("r.csv", 2, None, "test", "Größe", "Farbe", 0.25, "Zu groß; zu rot", None, None)
    for delimiter, score in ((";", "0,25"), (",", "0.25")):
        write_suspects([suspect], tmp_path / "s.csv", delimiter)
        assert (tmp_path / "s.csv").read_bytes().startswith(b"\xef\xbb\xbffile")
        with (tmp_path / "s.csv").open(encoding="utf-8-sig", newline="") as file:
            (row,) = csv.DictReader(file, delimiter=delimiter)
        assert (row["given"], row["text"], row["score"]) == ("Größe", "Zu groß; zu rot", score)
