"""First steps of new users: typical mistakes and the terminal's answers."""

import csv
import json
import re
from pathlib import Path

import pytest
from support.runs import invoke

from llmtune.cli.output_streams import WordWrap

pytestmark = pytest.mark.usefixtures("here")

RECIPE = (
    "recipe_version: 1\ntask: {task}\ndata: {{train: {rows}, deduplicate: exact}}\nmodel: {{name: builtin:{model}}}\n"
)


def write_rows(name: str, header: str, rows: list[tuple[str, ...]], task: str = "chat") -> None:
    with open(name, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    model = "minilm-l6-v2" if task == "classify" else "smollm2-135m-instruct"
    Path("mine.yaml").write_text(RECIPE.format(task=task, rows=name, model=model))


def test_data_given_as_a_recipe_gets_a_hint() -> None:
    Path("rows.csv").write_text("question,answer\nWhy?,So.\n")
    Path("rows.json").write_text('[{"question": "Why?", "answer": "So."}]')
    Path("tickets").mkdir()
    for name in ("rows.csv", "rows.json", "tickets"):
        done = invoke("run", name)
        assert done.exit_code == 2
        assert f"llmtune init {name}" in done.stderr
    Path("recipe.json").write_text(json.dumps({"recipe_version": 1, "task": "chat", "data": {"train": "rows.csv"}}))
    assert "this is data" not in invoke("recipes", "check", "recipe.json").stderr


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(f"Where is {i}?", "") for i in range(40)], "40 of 40 rows are bad: 100.0%"),
        ([(f"Where is {i}?", "Here." if i % 4 else "") for i in range(40)], "10 of 40 rows are bad: 25.0%"),
        ([("Where?", "Here.")] * 40, "are too few for"),
    ],
)
def test_a_check_and_a_dry_run_refuse_what_prepare_refuses(rows: list[tuple[str, ...]], words: str) -> None:
    write_rows("rows.csv", "question,answer", rows)
    for command in (("recipes", "check", "mine.yaml"), ("run", "mine.yaml", "--dry-run"), ("prepare", "mine.yaml")):
        done = invoke(*command)
        assert (done.exit_code, words in done.stderr) == (3, True), (command, done.stderr)
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.arrow"))


def test_a_row_after_cells_with_line_breaks_is_named_by_row_and_line() -> None:
    rows = [(f"Hello,\nwhere is {i}?", "Here.") for i in range(30)]
    write_rows("rows.csv", "question,answer", [*rows, ("Why?", "")])
    done = invoke("prepare", "mine.yaml", "--out", "run")
    assert "rows.csv:row 32 (line 62): no answer" in done.stderr
    write_rows("plain.csv", "question,answer", [(f"Where is {i}?", "Here.") for i in range(30)] + [("Why?", "")])
    assert "plain.csv:32: no answer" in invoke("prepare", "mine.yaml", "--out", "other").stderr


def test_contradictions_and_missing_value_markers_are_on_the_terminal() -> None:
    rows = [(f"Where is {i}?", f"In {i}.") for i in range(30)]
    write_rows("rows.csv", "question,answer", [*rows, ("Where is 3?", "Nowhere."), ("Which?", "#N/A")])
    for done in (invoke("init", "rows.csv"), invoke("prepare", "mine.yaml", "--out", "run")):
        assert "questions with different answers in different rows: 1" in done.stderr
        assert "rows with '#N/A', a placeholder for a missing value: 1" in done.stderr
    assert "rows.csv:5 and rows.csv:32" in done.stderr or "rows.csv:32 and rows.csv:5" in done.stderr


def test_a_class_without_training_rows_is_on_the_terminal(tiny_llama: Path) -> None:
    write_rows("rows.csv", "text,label", [(f"text number {i}", "ab"[i % 2]) for i in range(30)], "classify")
    Path("test.csv").write_text("text,label\n" + "\n".join(f"another text {i},{'abc'[i % 3]}" for i in range(9)))
    sets = (f"model.name={tiny_llama}", "data.test=test.csv", "classify.labels=[a, b, c]", "data.validation=0")
    done = invoke("prepare", "mine.yaml", *(part for one in sets for part in ("--set", one)), "--out", "run")
    assert done.exit_code == 0, done.stderr
    assert "1 of 3 classes have no training rows and cannot be learned: c" in done.stderr


@pytest.mark.parametrize(
    ("method", "meant"),
    [
        *(("LoRA", "Did you mean 'lora'?"), ("IA3", "Did you mean 'ia3'?"), ("adalroa", "Did you mean 'adalora'?")),
        ("DoRA", "use_dora: true"),
    ],
)
def test_a_wrong_method_gets_the_nearest_name(method: str, meant: str) -> None:
    write_rows("rows.csv", "question,answer", [("Where?", "Here.")])
    done = invoke("recipes", "check", "mine.yaml", "--set", f"adapter.method={method}")
    assert (done.exit_code, meant in done.stderr) == (2, True), done.stderr


def test_a_new_recipe_is_written_to_the_given_file() -> None:
    assert invoke("recipes", "new", "mine.yaml", "--task", "classify").exit_code == 0
    assert "task: classify" in Path("mine.yaml").read_text()
    assert invoke("recipes", "new", "mine.yaml").exit_code == 2
    assert invoke("recipes", "new", "a.yaml", "--out", "b.yaml").exit_code == 2


@pytest.mark.slow
def test_models_that_fit_are_shown_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = invoke("models", "fits", "--memory", "24GB")
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(r"^ \S+[/-] ", done.stdout, re.MULTILINE), "names break after slashes and hyphens"


def test_streamed_text_wraps_between_words() -> None:
    text = "A fox is a clever animal.\n\nIt has\ta red coat, and antidisestablishmentarianism is not its business."
    for size in (1, 3, 7, len(text)):
        wrapped = WordWrap(20)
        shown = "".join(wrapped.add(text[at : at + size]) for at in range(0, len(text), size)) + wrapped.rest()
        assert shown.split() == text.split()
        assert all(len(line.expandtabs()) <= 20 or len(line.split()) == 1 for line in shown.splitlines()), shown
    wrapped = WordWrap()
    assert wrapped.add("into a file ") + wrapped.rest() == "into a file "
