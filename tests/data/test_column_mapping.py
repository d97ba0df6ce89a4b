"""Real users' files: other column names, several columns for one, other encodings."""

import csv
from pathlib import Path

import pytest
from support.audio import write_tone
from support.rows import prepare, rows_of

from llmtune.data.row_formats import COLUMNS
from llmtune.data.row_kind import KINDS
from llmtune.errors import DataError

ANSWERS = ("answer", "response", "output", "assistant", "reply", "targets", "solution")
TICKETS = [(f"Order {i}", f"Where is parcel number {i * 7}, please?", f"It is on its way, {i}.") for i in range(30)]


def write_csv(path: Path, header: str, *rows: tuple[str, ...], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def canonical(folder: Path, header: str, *rows: tuple[str, ...], task: str = "chat", **source: object) -> list[dict]:
    path = write_csv(folder / "rows.csv", header, *rows)
    return rows_of(prepare(folder, {"path": str(path), **source} if source else str(path), task=task))


def refusal(folder: Path, train: object, task: str = "chat") -> str:
    with pytest.raises(DataError) as caught:
        prepare(folder, train, task=task)
    return str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        *("prompt,response", "question,answer", "input,output", "instruction,response", "user,assistant"),
        *("Question,Answer", "query,reply", "id,question,answer,date", "inputs,targets", "problem,solution"),
    ],
)
def test_question_and_answer_under_usual_names_make_a_conversation(tmp_path, header):
    row = [
        "7" if name in ("id", "date") else "This." if name.lower() in ANSWERS else "What?" for name in header.split(",")
    ]
    (got,) = canonical(tmp_path, header, tuple(row))
    assert [turn["content"] for turn in got["messages"]] == ["What?", "This."]


@pytest.mark.parametrize(
    ("task", "header", "row", "expected"),
    [
        ("classify", "sentence,label", ("Good.", "pos"), {"text": "Good.", "label": "pos"}),
        ("classify", "text,category", ("Good.", "pos"), {"text": "Good.", "label": "pos"}),
        ("classify", "premise,hypothesis,label", ("A.", "B.", "no"), {"text": "A.", "pair": "B.", "label": "no"}),
        ("completion", "input,output", ("So", "it goes."), {"prompt": "So", "completion": "it goes."}),
        ("summarize", "article,highlights", ("Long text.", "Text."), {"document": "Long text.", "summary": "Text."}),
        ("qa", "question,passage,answer", ("Who?", "Ada did.", "Ada"), {"context": "Ada did."}),
        ("translate", "src,tgt", ("Dog", "Hund"), {"source": "Dog", "target": "Hund"}),
    ],
)
def test_the_task_decides_the_role_of_a_column(tmp_path, task, header, row, expected):
    (got,) = canonical(tmp_path, header, row, task=task)
    assert got.items() >= expected.items()


def test_recordings_are_found_under_other_names_and_are_hashed(tmp_path):
    write_tone(tmp_path / "a.wav")
    (got,) = canonical(tmp_path, "file_name,transcription", ("a.wav", "hello"), task="speech")
    assert got["text"] == "hello"
    (got,) = canonical(tmp_path, "path,sentence", ("a.wav", "hello"), task="speech")
    assert got["audio"].endswith("a.wav")


def test_an_ambiguous_column_is_not_chosen_silently(tmp_path):
    path = write_csv(tmp_path / "rows.csv", "question,input,answer", ("What is it?", "a thing here", "This one."))
    said = refusal(tmp_path, str(path))
    assert 'columns: {prompt: "{question}\\n\\n{input}", completion: answer}' in said


def test_several_columns_are_joined_by_a_template(tmp_path):
    columns = {"prompt": "{subject}\n\n{body}", "completion": "answer"}
    got = canonical(tmp_path, "subject,body,answer", *TICKETS, columns=columns)
    assert got[0]["messages"][0]["content"] == "Order 0\n\nWhere is parcel number 0, please?"
    said = refusal(tmp_path, {"path": str(tmp_path / "rows.csv"), "columns": {**columns, "prompt": "{subjekt}"}})
    assert "column 'subjekt' not found" in said
    assert "Did you mean 'subject'?" in said


@pytest.mark.parametrize(
    ("task", "header", "row", "columns", "named"),
    [
        ("chat", "Frage,Antwort", ("", "Ja."), {"prompt": "Frage", "completion": "Antwort"}, "'Frage' is empty"),
        ("chat", "Question,answer", ("Why?", ""), {}, "'answer' is empty"),
        ("classify", "premise,category", ("Good.", ""), {"text": "premise"}, "'category' is"),
        ("qa", "q,passage,a", ("", "Ada.", "Ada"), {"question": "q", "answer": "a"}, "'q' is empty"),
        ("chat", "a,b,c", ("", "", "So."), {"prompt": "{a}\n\n{b}", "completion": "c"}, "'{a} {b}' is empty"),
    ],
)
def test_an_error_of_a_row_names_the_column_of_the_file(tmp_path, task, header, row, columns, named):
    path = write_csv(tmp_path / "rows.csv", header, row)
    assert named in refusal(tmp_path, {"path": str(path), "columns": columns}, task)


@pytest.mark.parametrize(
    ("task", "header", "rows", "columns"),
    [
        ("chat", "subject,body,answer", TICKETS, '{prompt: "{subject}\\n\\n{body}", completion: answer}'),
        ("chat", "ticket,solved by", [row[1:] for row in TICKETS], '{prompt: ticket, completion: "solved by"}'),
        ("translate", "en,de", [("The dog", "Der Hund"), ("A cat", "Eine Katze")], "{source: en, target: de}"),
        (
            "classify",
            "Zeit,Anliegen,Art",
            [("9", f"Frage {i}?", "abc"[i % 3]) for i in range(9)],
            "{text: Anliegen, label: Art}",
        ),
    ],
)
def test_an_unknown_header_gives_a_line_to_paste_that_reads_the_file(
    tmp_path, monkeypatch, task, header, rows, columns
):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "rows.csv", header, *rows)
    said = refusal(tmp_path, "rows.csv", task)
    assert f"train: {{path: rows.csv, columns: {columns}}}" in said
    from ruamel.yaml import YAML

    pasted = YAML(typ="safe").load(said[said.index("train: {") :])["train"]
    assert prepare(tmp_path, pasted, task=task, max_dropped=0.0).rows_in == len(rows)


def test_the_suggested_encoding_of_a_file_that_is_not_utf_8_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(f"Où est la commande n° {i} ?", f"Elle est expédiée – déjà, {i}.") for i in range(40)]
    write_csv(tmp_path / "rows.csv", "question,answer", *rows, encoding="cp1252")
    assert "train: {path: rows.csv, encoding: cp1252}" in refusal(tmp_path, "rows.csv")
    got = rows_of(prepare(tmp_path, {"path": "rows.csv", "encoding": "cp1252"}))
    assert got[0]["messages"][1]["content"] == "Elle est expédiée – déjà, 0."
    assert "Set `encoding: cp1252`" in refusal(tmp_path, {"path": "rows.csv", "encoding": "utf-8"})


def test_aliases_refer_only_to_existing_columns():
    assert {ours for kind in KINDS for ours in kind.aliases} <= set(COLUMNS)
