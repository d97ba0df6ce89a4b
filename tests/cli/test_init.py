"""From a file of rows to a runnable recipe that leaves only real decisions to the user."""

import codecs
import csv
import hashlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.audio import write_tone
from support.rows import rows_of
from support.runs import invoke
from typer.testing import Result

from llmtune.compare.model_fits import DeviceMemory, list_fits
from llmtune.data.preparation import prepare_rows
from llmtune.data.sources import local_input
from llmtune.evaluate.slices import read_slices
from llmtune.model.catalogue import find_catalogue_model
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.model_kind import PROPOSED_MODELS
from llmtune.records import SPLITS, Rows
from llmtune.store import machine
from llmtune.store.process_environment import OFFLINE
from llmtune.tasks.class_labels import REGRESSION_METRICS, choose_label_metrics

TICKETS = [(str(i), f"Order {i} late", f"Where is parcel number {i}?", f"It comes in {i} days.") for i in range(40)]


pytestmark = pytest.mark.usefixtures("here")


def write(name: str, header: str, rows: list[tuple[str, ...]], encoding: str = "utf-8") -> None:
    with open(name, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def talk(asks: str, question: str, answers: str, answer: str) -> list[dict[str, str]]:
    return [{"role": asks, "content": question}, {"role": answers, "content": answer}]


def prepare_all(recipe: str) -> Rows:
    return prepare_rows(load_recipe(recipe, ["data.deduplicate=none"]).recipe, Path("rows"), Console(quiet=True))


def init(*arguments: str) -> Result:
    return invoke("init", *arguments)


def test_a_ticket_file_gives_a_valid_recipe_and_the_next_command() -> None:
    write("tickets.csv", "id,subject,body,answer", [*TICKETS, TICKETS[0]])
    done = init()
    assert done.exit_code == 0, done.stderr
    assert "1 rows are copies of others" in done.stderr
    assert done.stdout.endswith("next: llmtune run tickets.yaml\n")
    recipe = load_recipe("tickets.yaml").recipe
    assert recipe.task == "chat"
    assert recipe.data.columns == {"prompt": "{subject}\n\n{body}", "completion": "answer"}
    assert (recipe.data.max_length, recipe.generation.max_new_tokens, recipe.data.test) == (128, 16, 0.5)
    assert not recipe.train.model_fields_set
    assert json.loads(Path("recipe.schema.json").read_text())["title"] == "llmtune recipe"
    assert invoke("recipes", "check", "tickets.yaml").exit_code == 0
    again = init("tickets.csv")
    assert (again.exit_code, "--out" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("header", "rows", "task"),
    [
        ("text,category", [(f"text number {i}", "abc"[i % 3]) for i in range(24)], "classify"),
        ("Anliegen,Art", [(f"Frage Nummer {i}", "abc"[i % 3]) for i in range(24)], "classify"),
        ("kind,body,answer", [("ticket", f"where is {i}?", "abc"[i % 3]) for i in range(24)], "chat"),
        ("subject,body,answer", [("Order", f"where is {i}?", f"It is at {i}.") for i in range(24)], "chat"),
        ("en,de", [("The dog", "Der Hund"), ("A cat", "Eine Katze")], "translate"),
        ("Deutsch,Englisch", [("Der Hund", "The dog"), ("Eine Katze", "A cat")], "translate"),
        ("question,passage,answer", [("Who wrote?", "Ada wrote.", "Ada")], "qa"),
        ("query,passage", [("Who wrote?", "Ada wrote.")], "embed"),
        ("query,passage,negative", [("Who wrote?", "Ada wrote.", "Ada read.")], "embed"),
        ("article,highlights", [("A long text.", "Text.")], "summarize"),
        ("question,chosen,rejected", [("Why?", "So.", "No.")], "preference"),
        ("question,answer", [("Why?", "So.")], "chat"),
        ("content", [("Once upon a time.",)], "completion"),
    ],
)
def test_the_task_is_detected_from_columns_and_values(header: str, rows: list[tuple[str, ...]], task: str) -> None:
    write("rows.csv", header, rows)
    done = init("rows.csv", "--yes", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["task"] == task


def test_given_options_win_and_paths_are_relative_to_the_recipe(here: Path) -> None:
    (here / "recipes").mkdir()
    write("rows.csv", "question,answer", [("Où ?", "Là–bas, à côté.")] * 3, encoding="cp1252")
    done = init("rows.csv", "--task", "completion", "--model", "owner/model", "--out", "recipes/mine.yaml")
    assert done.exit_code == 0, done.stderr
    recipe = load_recipe("recipes/mine.yaml").recipe
    assert (recipe.task, recipe.model.name, recipe.data.train[0].encoding) == ("completion", "owner/model", "cp1252")
    assert recipe.data.train[0].path == str(here / "rows.csv")


def test_columns_are_recognised_by_a_word_of_their_name() -> None:
    rows = [(str(i), f"Where is {i}?", f"It is at {i}.", ("mail", "phone")[i % 2]) for i in range(24)]
    write("desk.csv", "Ticket,Customer question,Our reply,channel", rows)
    assert init("desk.csv").exit_code == 0
    recipe = load_recipe("desk.yaml").recipe
    assert recipe.task == "chat"
    assert recipe.data.columns == {"prompt": "Customer question", "completion": "Our reply"}
    write("post.csv", "Betreff,Text,Antwort,Kanal", [(f"Nr. {a}", b, c, d) for a, b, c, d in rows])
    assert init("post.csv", "--task", "chat").exit_code == 0
    columns = load_recipe("post.yaml").recipe.data.columns
    assert columns == {"prompt": "{Betreff}\n\n{Text}", "completion": "Antwort"}


def test_unreadable_rows_are_named_and_the_recipe_runs_without_them() -> None:
    write("rows.csv", "question,answer", [(f"Which is {i}?", "This." if i % 10 else "") for i in range(60)])
    done = init("rows.csv")
    assert "6 rows cannot be read (no answer)" in done.stderr
    assert load_recipe("rows.yaml").recipe.data.max_dropped == 0.11
    assert "max_dropped: 0.11  # DECIDE: 6 of 60 rows cannot be read" in Path("rows.yaml").read_text()


def test_a_truncated_character_makes_only_its_row_bad(here: Path) -> None:
    good, half = '{"prompt": "Ask.", "completion": "Say."}\n', '{"prompt": "\\ud800", "completion": "Say."}\n'
    Path("rows.jsonl").write_text(good + half)
    done = init("rows.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "(not a character)" in done.stderr
    Path("rows.jsonl").write_text(half)
    assert init("rows.jsonl", "--out", "other.yaml").exit_code == 3


def test_a_book_is_split_into_rows_and_read_in_its_encoding() -> None:
    Path("book.txt").write_bytes(
        ("Où est le café de la meilleure des époques, et de la pire ?\n" * 200).encode("cp1252")
    )
    assert init("book.txt").exit_code == 0
    recipe = load_recipe("book.yaml").recipe
    assert (recipe.task, recipe.data.max_length, recipe.data.on_overlong) == ("completion", 1024, "split")
    assert recipe.data.train[0].encoding == "cp1252"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("rows.cvs",), 2, "Did you mean 'rows.csv'?"),
        (("rows.csv", "--task", "chatt"), 2, "Did you mean 'chat'?"),
        (("rows.csv", "--task", "speech"), 3, "task: speech does not read these rows; their columns are id, value"),
        (("rows.csv", "--task", "rerank"), 3, "query=YOUR_COLUMN,passage=YOUR_COLUMN,relevance=YOUR_COLUMN"),
    ],
)
def test_impossible_init_arguments_are_refused(arguments: tuple[str, ...], code: int, words: str) -> None:
    write("rows.csv", "id,value", [("1", "2")])
    done = init(*arguments)
    assert done.exit_code == code
    assert words in done.stderr


def write_lines(name: str, rows: list[dict[str, object]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_compared_answers_become_preferences_not_replies() -> None:
    asked = "\n\nHuman: Who was number {i}?\n\nAssistant: "
    rows = [{one: asked.format(i=i) + f"The {one} one, {i}." for one in ("chosen", "rejected")} for i in range(40)]
    write_lines("hh.jsonl", rows)
    assert init().exit_code == 0
    assert load_recipe("hh.yaml").recipe.task == "preference"
    write_lines("compared.jsonl", [{"topic": f"Ships of {i}", **row} for i, row in enumerate(rows)])
    assert init("compared.jsonl", "--task", "chat").exit_code == 3


def test_rows_without_a_task_are_refused_with_the_first_rows_problem() -> None:
    write_lines("conll.jsonl", [{"tokens": ["Ada", "wrote"], "ner_tags": [1, 0]}] * 20)
    for arguments in ((), ("--task", "token-classify")):
        done = init(*arguments)
        assert done.exit_code == 3
        assert "as token-classify: not a tag: tag 1 is 1;" in done.stderr


def test_all_rows_are_counted_and_each_cause_has_its_own_count() -> None:
    lines = [f"Order {i} late,Where is parcel {i}?,It comes in {i} days." for i in range(30)]
    lines += ["a,b,c,d", "a,b", "a,b,", "e,f,g,h"]
    Path("tickets.csv").write_text("\n".join(["subject,body,answer", *lines]) + "\n")
    done = init()
    assert done.exit_code == 0, done.stderr
    assert "tickets.csv: 34 rows" in done.stderr
    assert "3 rows cannot be read (wrong number of columns)" in done.stderr
    assert "1 rows cannot be read (no answer)" in done.stderr
    assert "4 of 34 rows cannot be read" in Path("tickets.yaml").read_text()


def test_duplicates_do_not_count_for_the_test_share() -> None:
    write("tickets.csv", "id,subject,body,answer", TICKETS)
    write("copied.csv", "id,subject,body,answer", TICKETS * 4)
    assert init("tickets.csv").exit_code == init("copied.csv").exit_code == 0
    shares = [load_recipe(f"{name}.yaml").recipe.data.test for name in ("tickets", "copied")]
    assert shares[0] == shares[1]


def test_missing_recordings_are_named_and_never_become_another_task() -> None:
    write(
        "metadata.csv", "file_name,transcription", [(f"{i}.wav", f"Good morning to all {i} of you.") for i in range(20)]
    )
    done = init()
    assert done.exit_code == 3
    assert "as speech: audio missing: file not found:" in done.stderr
    assert not Path("metadata.yaml").exists()


def test_a_column_of_recordings_is_never_a_text_to_learn(here: Path) -> None:
    for i in range(24):
        write_tone(here / f"recordings/tone {i}.wav", 0.2)
    write("recordings/metadata.csv", "Datei,Text", [(f"tone {i}.wav", "abcd"[i % 4] * 3) for i in range(24)])
    assert "task: speech" in init("recordings", "--out", "mine.yaml").stderr
    assert load_recipe("mine.yaml").recipe.data.columns == {"audio": "Datei", "text": "Text"}
    write("recordings/metadata.csv", "Datei,Text", [(f"missing {i}.wav", "abcd"[i % 4] * 3) for i in range(24)])
    assert init("recordings", "--out", "other.yaml").exit_code == 3


def test_another_tools_configuration_becomes_the_same_recipe_by_init_and_by_migrate() -> None:
    write("rows.csv", "id,subject,body,answer", TICKETS)
    keys = {
        "base_model": "builtin:minilm-l6-v2",
        "datasets": [{"path": "./rows.csv", "type": "alpaca"}],
        "strict": True,
    }
    Path("their.yaml").write_text(json.dumps({**keys, "adapter": "lora", "lora_r": 4, "hub_token": "hf_secret"}))
    done = invoke("recipes", "migrate", "their.yaml", "--out", "one.yaml")
    assert done.exit_code == 0, done.stderr
    assert "refused  hub_token: [removed]: recipes must not contain secrets" in done.stderr
    assert done.stdout.endswith("next: llmtune recipes check one.yaml\n")
    assert invoke("init", "--from", "their.yaml", "--out", "two.yaml").exit_code == 0
    assert Path("one.yaml").read_text() == Path("two.yaml").read_text()
    assert load_recipe("one.yaml").recipe.adapter.r == 4
    again = invoke("recipes", "migrate", "their.yaml", "--out", "one.yaml")
    assert (again.exit_code, "the file exists" in again.stderr) == (2, True)
    found = json.loads(invoke("recipes", "migrate", "their.yaml", "--out", "three.yaml", "--json").stdout)
    assert (found["counts"]["refused"], found["counts"]["not needed"]) == (1, 1)


ASKED = [(f"Where is parcel number {i}?", f"It comes in {i} days.") for i in range(40)]


@pytest.mark.parametrize(
    ("document", "columns", "roles"),
    [
        ({"conversations": [{"question": q, "answer": a} for q, a in ASKED]}, {}, {}),
        ({"conversations": [{"messages": talk("user", q, "assistant", a)} for q, a in ASKED]}, {}, {}),
        (
            {"by": "", "conversations": [{"thread": {"messages": talk("customer", q, "agent", a)}} for q, a in ASKED]},
            {"messages": "thread.messages"},
            {"user": ("customer",), "assistant": ("agent",)},
        ),
        (
            [{"messages": [{"sender": "Kunde", "text": q}, {"sender": "Berater", "text": a}]} for q, a in ASKED],
            {},
            {"user": ("Kunde",), "assistant": ("Berater",)},
        ),
        (
            [{"ticket": {"question": q, "reply": {"answer": a}}} for q, a in ASKED],
            {"prompt": "ticket.question", "completion": "ticket.reply.answer"},
            {},
        ),
    ],
)
def test_a_json_export_is_read_with_nested_keys_and_its_own_roles(
    document: object, columns: dict[str, str], roles: dict[str, tuple[str, ...]]
) -> None:
    Path("export.json").write_text(json.dumps(document))
    done = init("export.json")
    assert done.exit_code == 0, done.stderr
    assert "export.json: 40 rows" in done.stderr
    recipe = load_recipe("export.yaml").recipe
    assert (recipe.task, recipe.data.columns, recipe.data.roles) == ("chat", columns, roles)
    rows = prepare_all("export.yaml")
    assert (rows.rows_in, rows.dropped) == (40, {})
    said = [
        [(turn["role"], turn["content"]) for turn in row["messages"]]
        for split in SPLITS
        for row in rows_of(rows, split)
    ]
    assert sorted(said) == sorted([("user", q), ("assistant", a)] for q, a in ASKED)


def test_a_single_conversation_in_a_json_file_is_one_row() -> None:
    Path("one.json").write_text(
        json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    )
    assert [row for _, row in local_input(Path("one.json")).raw_rows()] == [json.loads(Path("one.json").read_text())]


@pytest.mark.parametrize("named", ["tickets", "tickets/", "tickets/*.jsonl", "tickets/*"])
def test_a_folder_or_a_glob_is_one_data_set(named: str, here: Path) -> None:
    (here / "tickets").mkdir()
    for part in range(2):
        write_lines(f"tickets/{part}.jsonl", [{"prompt": q, "completion": a} for q, a in ASKED[part::2]])
    done = init(named)
    assert done.exit_code == 0, done.stderr
    assert "2 files, 40 rows" in done.stderr
    assert invoke("recipes", "check", "tickets.yaml").exit_code == 0


def test_a_recipe_is_not_written_among_the_rows(here: Path) -> None:
    (here / "tickets").mkdir()
    write("tickets/a.csv", "question,answer", [("Où ?", "Là.")] * 3, encoding="cp1252")
    assert "would be among the rows" in init("tickets", "--out", "tickets/mine.yaml").stderr


def test_files_with_different_encodings_are_a_source_each(here: Path) -> None:
    (here / "tickets").mkdir()
    encodings = {"a.csv": "cp1252", "b.csv": None, "c.tsv": "utf-16"}
    for name, encoding in encodings.items():
        lines = [f"Où est {name} {i} ?\tÀ côté de {i}." for i in range(20)]
        Path("tickets", name).write_text("question\tanswer\n" + "\n".join(lines), encoding or "utf-8")
    done = init("tickets")
    assert done.exit_code == 0, done.stderr
    sources = load_recipe("tickets.yaml").recipe.data.train
    assert {Path(one.path).name: one.encoding for one in sources} == encodings
    rows = prepare_all("tickets.yaml")
    assert (rows.rows_in, rows.dropped) == (60, {})
    assert all("Où est" in str(row) for row in rows_of(rows))


def test_ascii_files_take_the_encoding_of_the_others_unless_it_is_utf16(here: Path) -> None:
    (here / "tickets").mkdir()
    write("tickets/a.csv", "question,answer", [("Who?", "You.")] * 3)
    for encoding, count in (("cp1252", 1), ("utf-16", 2)):
        write("tickets/b.csv", "question,answer", [("Où ?", "Là.")] * 3, encoding=encoding)
        assert init("tickets", "--out", f"{encoding}.yaml").exit_code == 0
        assert len(load_recipe(f"{encoding}.yaml").recipe.data.train) == count


def test_a_file_without_a_readable_row_is_named_and_never_dropped_as_bad_rows(here: Path) -> None:
    (here / "tickets").mkdir()
    write("tickets/a.csv", "question,answer", ASKED)
    write("tickets/b.csv", "question,number", [("Where?", "7")] * 4)
    done = init("tickets")
    assert (done.exit_code, "tickets/b.csv: no row can be read as chat" in done.stderr) == (3, True), done.stderr
    Path("tickets/b.csv").write_text("question,answer\na,b,c\n")
    done = init("tickets")
    assert (done.exit_code, "tickets/b.csv:2: no row can be read: wrong number of" in done.stderr) == (3, True)
    assert not Path("tickets.yaml").exists()


def test_a_utf8_bom_before_another_encoding_is_not_part_of_the_first_column() -> None:
    text = "Frage;Antwort\n" + "\n".join(f"Wo ist das Päckchen {i}?;Es ist für Sie da, {i}" for i in range(40))
    Path("bom.csv").write_bytes(codecs.BOM_UTF8 + text.encode("cp1252"))
    done = init("bom.csv")
    assert done.exit_code == 0, done.stderr
    assert load_recipe("bom.yaml").recipe.data.columns == {"prompt": "Frage", "completion": "Antwort"}
    rows = prepare_all("bom.yaml")
    assert (sum(rows.counts.values()), rows.dropped) == (40, {})
    assert "Päckchen" in str(rows_of(rows)[0])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE], ids=["little", "big"])
def test_excels_unicode_text_is_read_by_its_bom(encoding: str, mark: bytes) -> None:
    order = "le" if mark == codecs.BOM_UTF16_LE else "be"
    lines = ["Frage\tAntwort", *(f"Wo ist Päckchen {i}?\tEs ist für Sie da, {i}" for i in range(40))]
    Path("umfrage.tsv").write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:]]).encode(f"{encoding}-{order}"))
    done = init("umfrage.tsv")
    assert done.exit_code == 0, done.stderr
    assert f"40 rows, {encoding}; columns Frage, Antwort" in done.stderr
    assert load_recipe("umfrage.yaml").recipe.data.train[0].encoding == encoding
    assert "Päckchen" in str(rows_of(prepare_all("umfrage.yaml"))[0])


def test_numeric_labels_get_numeric_metrics() -> None:
    write("scores.csv", "text,label", [(f"stay number {i}", f"{i % 40 / 10}") for i in range(1, 60)])
    assert init("scores.csv").exit_code == 0
    evaluate = load_recipe("scores.yaml").recipe.evaluate
    assert choose_label_metrics(evaluate.metrics, "regression") == evaluate.metrics == REGRESSION_METRICS


@pytest.mark.parametrize(
    ("header", "answer", "gate"),
    [
        ("text,label", "{}.5", "mse.high < base"),
        ("text,label", "word", "accuracy.low > base"),
        ("content,number", "{}", "bits_per_byte.high < base"),
        ("question,answer", "It is at {}.", "chrf.low > base"),
        ("query,passage,label", "It is at {}.,{}", "ndcg@10.low > base"),
    ],
)
def test_the_proposed_gate_passes_for_a_better_model(header: str, answer: str, gate: str) -> None:
    write("rows.csv", header, [(f"Where is number {i}?", *answer.format(i, i % 2).split(",")) for i in range(24)])
    assert init("rows.csv").exit_code == 0
    assert f"e.g. [{gate}]" in Path("rows.yaml").read_text("utf-8")
    assert parse_gate(gate).metric == gate.partition(".")[0]


def test_columns_mapped_by_the_user_are_used() -> None:
    write("desk.csv", "a,b,c", [(f"Where is {i}?", f"It is at {i}.", f"See {i}.") for i in range(24)])
    done = init("desk.csv", "--columns", "prompt={a} {c},completion=b")
    assert done.exit_code == 0, done.stderr
    assert load_recipe("desk.yaml").recipe.data.columns == {"prompt": "{a} {c}", "completion": "b"}
    refusals = {"prompt=d": (3, "column 'd' not found"), "prompt": (2, "Write OURS=THEIRS")}
    refusals["prompt=a, prompt=b"] = (2, "'prompt' is given twice")
    for given, (code, words) in refusals.items():
        refused = init("desk.csv", "--columns", given, "--out", "other.yaml")
        assert (refused.exit_code, words in refused.stderr) == (code, True), refused.stderr


def random_id(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()[:24]


@pytest.mark.parametrize("task", [(), ("--task", "chat"), ("--task", "completion"), ("--task", "embed")])
@pytest.mark.parametrize("names", [("id", "request_id"), ("ticket", "answer_id"), ("trace", "our reply")])
def test_a_column_of_identifiers_is_never_an_answer(names: tuple[str, str], task: tuple[str, ...]) -> None:
    message = {"message": {"role": "assistant", "content": "Hello."}}
    rows = [{names[0]: f"chatcmpl-{random_id(i)}", names[1]: f"req_{random_id(-i)}"} for i in range(1, 41)]
    write_lines("stored.jsonl", [{**row, "choices": [message]} for row in rows])
    done = init("stored.jsonl", *task)
    assert (done.exit_code, Path("stored.yaml").exists()) == (3, False), done.stdout


def test_columns_and_roles_of_a_recipe_are_checked() -> None:
    write("rows.csv", "question,answer", ASKED)
    recipe = "recipe_version: 1\ntask: chat\ndata: {train: rows.csv, %s}\nmodel: {name: owner/model}\n"
    for stated, words in (
        ("columns: {prompt: Frage}", "no file has 'Frage'"),
        ("columns: {promt: question}", "Did you mean 'prompt'?"),
        ("roles: {user: client, assistant: Client}", "maps 'client' to two roles"),
        ("roles: {customer: user}", "data.roles"),
    ):
        Path("mine.yaml").write_text(recipe % stated)
        done = invoke("recipes", "check", "mine.yaml")
        assert done.exit_code in (2, 3), stated
        assert words in done.stderr, done.stderr


TEAMS = ("Netz", "Konto", "Drucker", "Telefon")


def write_tickets(name: str, *columns: str, encoding: str = "utf-8") -> None:
    """Write an office's export: semicolons, local dates, decimal commas, quoted line breaks."""
    with open(name, "w", encoding=encoding, newline="") as file:
        table = csv.DictWriter(file, columns, delimiter=";", extrasaction="ignore")
        table.writeheader()
        for i in range(120):
            table.writerow(
                {
                    "Nr": f"T-{i}",
                    "Datum": f"{i % 28 + 1:02d}.03.2026",
                    "Betreff": f"Frage {i} zum Gerät" if i % 6 else "",
                    "Text": f"Seit Tag {i} geht es nicht.\nGrüße aus Büro {i}",
                    "Team": TEAMS[i % 7 % 4],
                    "Priorität": "hoch" if i % 5 else "niedrig",
                    "Stunden": f"{i % 40},5",
                    "Antwort": f"Wir prüfen Gerät {i}.",
                }
            )


def test_every_possible_label_is_listed_and_the_recipe_refused_until_one_is_chosen() -> None:
    write_tickets("desk.csv", "Nr", "Datum", "Betreff", "Text", "Team", "Priorität", "Stunden", encoding="cp1252")
    done = init("desk.csv")
    assert done.exit_code == 0, done.stderr
    assert "Team (4 classes: Netz 35, " in done.stderr
    assert "Priorität (2 classes: hoch 96, niedrig 24)" in done.stderr
    assert "choose data.columns.label in desk.yaml" in done.stdout
    assert 'text: "{Betreff}\\n\\n{Text}"  # joined in this order' in Path("desk.yaml").read_text()
    for command in (("recipes", "check"), ("run", "--dry-run"), ("run",), ("prepare",)):
        refused = invoke(*command, "desk.yaml")
        assert refused.exit_code == 2
        assert "'data.columns.label' is DECIDE" in refused.stderr
        assert "one of Team (4 classes: Netz 35, " in refused.stderr
        assert "Priorität (2 classes" in refused.stderr
    checked = invoke("recipes", "check", "desk.yaml", "--set", "data.columns.label=Team")
    assert checked.exit_code == 0, checked.stderr
    found = json.loads(init("desk.csv", "--json", "--out", "other.yaml").stdout)
    assert found["undecided"] == ["data.columns.label"]
    assert [(one["column"], len(one["classes"])) for one in found["candidates"]] == [("Team", 4), ("Priorität", 2)]


def test_a_single_possible_label_and_a_column_called_label_need_no_answer() -> None:
    write_tickets("one.csv", "Nr", "Datum", "Betreff", "Text", "Team", "Stunden")
    assert init("one.csv").exit_code == 0
    assert load_recipe("one.yaml").recipe.data.columns["label"] == "Team"
    write("named.csv", "text,label,source", [(f"text number {i}", "abc"[i % 3], "xy"[i % 2]) for i in range(24)])
    assert init("named.csv").exit_code == 0
    assert load_recipe("named.yaml").recipe.data.columns == {}
    write_tickets("many.csv", "Text", "Team", "Priorität")
    assert init("many.csv", "--columns", "label=Priorität").exit_code == 0
    assert load_recipe("many.yaml").recipe.data.columns == {"label": "Priorität"}


def test_subject_and_body_are_one_text_and_an_empty_part_leaves_no_gap() -> None:
    write_tickets("desk.csv", "Betreff", "Text", "Team")
    write_tickets("replies.csv", "Betreff", "Text", "Antwort")
    assert init("desk.csv").exit_code == init("replies.csv", "--task", "chat").exit_code == 0
    texts = {row["text"] for row in rows_of(prepare_all("desk.yaml"))}
    asked = {row["messages"][0]["content"] for row in rows_of(prepare_all("replies.yaml"))}
    joined = {f"Frage {i} zum Gerät\n\nSeit Tag {i} geht es nicht.\nGrüße aus Büro {i}" for i in range(120) if i % 6}
    alone = {f"Seit Tag {i} geht es nicht.\nGrüße aus Büro {i}" for i in range(0, 120, 6)}
    for found in (texts, asked):
        assert found <= joined | alone
        assert found & joined
        assert found & alone


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("text,day", [f"2026-01-{i % 28 + 1:02d}" for i in range(140)]),
        ("text,day", [f"{i % 28 + 1:02d}.01.2026" for i in range(140)]),
        ("text,number", [f"A-{i}" for i in range(140)]),
        ("text,customer_id", [f"c{i % 9}" for i in range(140)]),
        ("text,price", [f"{i % 30},50" for i in range(140)]),
        ("text,always", ["yes"] * 140),
        ("text,label", [f"x{i}" for i in range(140)]),
    ],
)
def test_dates_identifiers_amounts_and_constants_are_no_labels(header: str, values: list[str]) -> None:
    write("rows.csv", header, [(f"words about the number {i}", value) for i, value in enumerate(values)])
    done = init("rows.csv", "--json")
    assert json.loads(done.stdout)["task"] == "completion", done.stderr


@pytest.mark.parametrize("values", [["True", "False"], ["1", "2", "3", "4", "5"], ["ok"] * 49 + ["bad"]])
def test_booleans_ratings_and_a_rare_class_are_labels(values: list[str]) -> None:
    rows = [(f"words about the number {i}", values[i % len(values)]) for i in range(150)]
    write("rows.csv", "comment,outcome", rows)
    found = json.loads(init("rows.csv", "--json").stdout)
    assert (found["task"], found["columns"]["label"]) == ("classify", "outcome")


def test_in_a_terminal_init_asks_for_the_task_and_the_label() -> None:
    write_tickets("desk.csv", "Betreff", "Text", "Team", "Priorität")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llmtune", "init", "desk.csv"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, "\nStunden\nPriorität\n".encode())
    _, printed = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, printed
    assert "unknown: 'Stunden'" in printed
    assert "label is 'Priorität'; not used: Team (4 classes" in printed
    recipe = load_recipe("desk.yaml").recipe
    assert recipe.data.columns == {"text": "{Betreff}\n\n{Text}", "label": "Priorität"}


def test_folders_with_the_names_of_classes_are_explained(here: Path) -> None:
    for name in ("news", "sport"):
        (here / "texts" / name).mkdir(parents=True)
        for i in range(20):
            (here / "texts" / name / f"{i}.txt").write_text(f"A text about {name} and the number {i}.")
    done = init("texts")
    assert "in 2 folders (news, sport)" in done.stderr
    assert "text and label" in done.stderr


def test_rows_without_a_label_or_with_a_placeholder_are_counted_with_the_candidate() -> None:
    teams = ["Netz", "Konto", "", "N/A", "NaN"]
    write("desk.csv", "body,team,state", [(f"words about {i}", teams[i % 5], "ab"[i % 2]) for i in range(100)])
    assert "team (2 classes: Netz 20, Konto 20, 60 rows without)" in init("desk.csv").stderr


@pytest.mark.parametrize(
    ("mebibytes", "proposed"),
    [
        (6144, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (8188, "Qwen/Qwen3.5-0.8B"),
        (15360, "Qwen/Qwen3.5-2B"),
        (23034, "Qwen/Qwen3.5-4B"),
        (24564, "Qwen/Qwen3.5-4B"),
        (40960, "Qwen/Qwen3.5-9B"),
    ],
)
def test_a_gpu_gets_a_model_by_its_memory(mebibytes: int, proposed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path("bin/nvidia-smi")
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 'Some card, {mebibytes}, 8.9'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent.resolve()}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", *OFFLINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "torch_cuda", lambda: "13.0")  # as in a build of torch for CUDA
    write("tickets.csv", "id,subject,body,answer", TICKETS)
    assert init().exit_code == 0
    recipe = load_recipe("tickets.yaml").recipe
    assert recipe.model.name == proposed
    assert recipe.data.packing == ("Qwen3.5" not in proposed)  # packed rows of its linear attention see one another


@pytest.mark.parametrize(
    ("config", "packs"),
    [
        ({"text_config": {"layer_types": ["linear_attention", "full_attention"]}}, False),
        ({"linear_num_value_heads": 32}, False),
        ({"layer_types": ["full_attention"]}, True),
    ],
)
def test_a_model_with_linear_attention_in_a_folder_gets_padded_rows(config: dict[str, Any], packs: bool) -> None:
    Path("base").mkdir()
    Path("base/config.json").write_text(json.dumps({"model_type": "any", **config}))
    write("tickets.csv", "id,subject,body,answer", TICKETS)
    assert init("tickets.csv", "--model", "base").exit_code == 0
    assert load_recipe("tickets.yaml").recipe.data.packing == packs


@pytest.mark.parametrize(("least", "name"), PROPOSED_MODELS["decoder"].hub[1:])
def test_a_proposed_model_may_be_used_freely_and_can_be_tuned_in_its_memory(least: float, name: str) -> None:
    model = find_catalogue_model(name)
    assert model.licence in ("apache-2.0", "mit")
    fits = list_fits([model], "chat", DeviceMemory(least, "cuda"), 1024)
    assert [one.rows >= 1 for one in fits if one.method == "lora"] == [True]


def test_texts_that_are_longer_than_the_packaged_encoder_reads_are_truncated() -> None:
    long = "word " * 900
    write("long.csv", "text,label", [(f"{i} {long}", "ab"[i % 2]) for i in range(40)])
    assert init("long.csv", "--model", "builtin:minilm-l6-v2").exit_code == 0
    data = load_recipe("long.yaml").recipe.data
    assert (data.max_length, data.on_overlong) == (512, "truncate")


def test_a_file_with_another_encoding_and_decimal_commas_gives_the_same_rows_and_slices() -> None:
    lines = [f"Größe {i};{'AB'[i % 2]};{{}}" for i in range(60)]
    hours = [i / 4 for i in range(60)]
    points = "\n".join(["text;label;hours", *(line.format(hour) for line, hour in zip(lines, hours, strict=True))])
    commas = points.replace(".", ",")
    found = []
    for week, (text, encoding) in enumerate(((points, "utf-8"), (commas, "cp1252"), (commas, "utf-16"))):
        Path(f"week{week}.csv").write_text(text, encoding)
        assert init(f"week{week}.csv").exit_code == 0
        sets = ["data.deduplicate=none", "evaluate.slices=[hours]", "data.test=0.5"]
        rows = prepare_rows(load_recipe(f"week{week}.yaml", sets).recipe, Path(f"rows{week}"), Console(quiet=True))
        found.append((rows.content_hash, read_slices(rows, ["hours"], range(rows.counts["test"]))))
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]["hours"]) == 4


TICKET_LINES = [f"Ticket number {i} about money;{('billing', 'shipping')[i % 2]};{i},50" for i in range(40)]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("export.csv", TICKET_LINES, "the first line is a row, not the names of the columns: 'billing'"),
        ("export.csv", ["Export of 1 December", "by: Anna", "text;team;amount", *TICKET_LINES], "The first line must"),
        ("export.csv", ["Export, 1 December", "text;team;amount", *TICKET_LINES], "The first line must have the names"),
        ("export.txt", ["text;team;amount", *TICKET_LINES], "the file looks like a table: its lines have 3 cells"),
    ],
)
def test_a_table_without_its_header_in_the_first_line_is_refused(name: str, lines: list[str], message: str) -> None:
    Path(name).write_text("\n".join(lines), encoding="utf-8")
    done = init(name)
    assert done.exit_code == 3
    assert message in done.stderr
    assert not Path("export.yaml").exists()


def test_numbers_and_single_values_as_names_of_columns_are_a_header() -> None:
    write("sales.csv", "question,answer,2024,2025", [(f"Where is {i}?", "answer", str(i), "7") for i in range(20)])
    assert init("sales.csv").exit_code == 0


def test_a_text_with_tabs_is_no_table() -> None:
    Path("book.txt").write_text("\n".join(f"Chapter {i}\tpage {i}\n\nIt was a {i}. dark night." for i in range(9)))
    assert "a table" not in init("book.txt").stderr


def test_what_has_to_be_fixed_is_the_next_step() -> None:
    write("tickets.csv", "question,answer", [("Where is it?", "It is here.")] * 60)
    done = init("tickets.csv")
    assert "next: fix the problems above, in the rows or in tickets.yaml; then llmtune run" in done.stdout
    assert json.loads(init("tickets.csv", "--json", "--out", "other.yaml").stdout)["ready"] is False


def test_a_file_in_two_encodings_is_named_and_its_rows_are_not_to_be_dropped() -> None:
    lines = [f"Anfrage für Größe {i},{('Köln', 'Bonn')[i % 2]}" for i in range(60)]
    encoded = [line.encode("cp1252" if i > 30 else "utf-8") for i, line in enumerate(lines)]
    Path("mixed.csv").write_bytes(b"\n".join([b"text,label", *encoded]))
    done = init("mixed.csv")
    assert "come from a file in another encoding" in done.stderr
    assert "set data.max_dropped" not in done.stderr


TEXTS = [f"The quick {animal} number {i} is {('red', 'blue')[i % 2]}." for i, animal in enumerate(["cat", "dog"] * 15)]
PROPOSED = {
    "thumbs": (
        "llama",
        [{"prompt": f"{text} Is it?", "completion": "It is.", "label": i % 3 != 0} for i, text in enumerate(TEXTS)],
        {"task": "preference", "preference.loss": "kto", "evaluate.metrics": ["accuracy", "margin", "kl"]},
    ),
    "encoder": (
        "bert",
        [{"text": text} for text in TEXTS],
        {"task": "completion", "completion.objective": "masked", "evaluate.metrics": ["loss", "accuracy"]},
    ),
    "pairs for an encoder": (
        "bert",
        [{"prompt": text, "completion": "It is."} for text in TEXTS],
        {"task": "completion", "completion.objective": "masked"},
    ),
    "T5": (
        "t5",
        [{"en": text, "de": text} for text in TEXTS],
        {"translate.source_language": None, "translate.target_language": None},
    ),
    "Marian": ("marian", [{"en": text, "de": text} for text in TEXTS], {"translate": None}),
    "scores": (
        "bert",
        [{"query": text, "passage": TEXTS[0], "score": i / 30} for i, text in enumerate(TEXTS)],
        {"task": "embed", "evaluate.metrics": ["spearman", "pearson", "random_cosine", "effective_rank"]},
    ),
    "questions": ("bert", [{"question": "Who?", "context": text, "answer": "quick"} for text in TEXTS], {"task": "qa"}),
}
"""Model, rows, and values that the proposed recipe must have."""


def propose(kind: str, built: Callable[..., Path]) -> dict[str, Any]:
    """Write the proposed recipe into `rows.yaml`, and check it; returns the recipe."""
    family, rows, expected = PROPOSED[kind]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--task", expected.get("task", "translate")]
    done = init("rows.jsonl", "--model", str(built(family)), *task)
    assert (done.exit_code, "next: llmtune run rows.yaml" in done.stdout) == (0, True), done.output
    recipe = load_recipe("rows.yaml").recipe.model_dump(mode="json")
    for key, value in expected.items():
        section, _, name = key.rpartition(".")
        assert (recipe[section] if section else recipe)[name] == value, key
    assert invoke("recipes", "check", "rows.yaml").exit_code == 0
    return recipe


@pytest.mark.parametrize("kind", PROPOSED)
def test_a_proposed_recipe_fits_the_rows_and_the_model(kind: str, built: Callable[..., Path]) -> None:
    propose(kind, built)
    prepared = invoke("prepare", "rows.yaml", "--out", "run", "--set", "data.deduplicate=exact")
    assert prepared.exit_code == 0, prepared.stderr


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in ("thumbs", "T5") else [pytest.mark.slow]) for kind in PROPOSED],
)
def test_a_proposed_recipe_fits_the_rows_and_the_model_and_runs(kind: str, built: Callable[..., Path]) -> None:
    recipe = propose(kind, built)
    ran = invoke("run", "rows.yaml", "--out", "run", "--set", "train.max_steps=1", "--set", "data.deduplicate=exact")
    assert ran.exit_code == 0, ran.stderr
    scores = json.loads(Path("run/report.json").read_text())["evaluation"]["tuned"]
    assert set(recipe["evaluate"]["metrics"]) <= {*scores}
