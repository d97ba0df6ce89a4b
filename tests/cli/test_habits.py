"""Commands typed by habit work, or get a hint."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import finish_run, invoke
from support.templates import NO_SYSTEM

from llmtune.cli.app import EXIT_CODES
from llmtune.data.message_fields import ROLES
from llmtune.display.blocks import Column, Table
from llmtune.display.console import print_blocks
from llmtune.evaluate.generation import generate_completions
from llmtune.serve.finished_run import FinishedRun

QUESTION = "What comes after 5 and before 7?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A working folder with one finished run."""
    place = tmp_path_factory.mktemp("habits")
    finish_run(place, tiny_llama, generation={"max_new_tokens": 4}, train={"num_train_epochs": 12})
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_generate_reads_text_from_argument_option_or_stdin_and_finds_runs_by_name() -> None:
    said = invoke("generate", "runs/tiny", "--prompt", QUESTION).stdout
    assert said.strip()
    assert invoke("generate", "tiny", QUESTION).stdout == said
    assert invoke("generate", "latest", "-", stdin=f"{QUESTION}\n").stdout == said
    assert invoke("generate", "latest", stdin=QUESTION).stdout == said
    assert invoke("generate", "latest", QUESTION, "--prompt", QUESTION).exit_code == 2


def test_a_file_of_rows_is_answered_row_by_row(folder: Path) -> None:
    (folder / "asked.csv").write_text(f"id,question\n1,{QUESTION}\n2,\n3,What comes after 8 and before 10?\n")
    done = invoke("generate", "latest", "--input", "asked.csv", "--output", "answered.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "2 rows answered to answered.jsonl; 1 could not be read" in done.stderr
    first, second, third = map(json.loads, (folder / "answered.jsonl").read_text().splitlines())
    assert first == {
        "id": "1",
        "question": QUESTION,
        "answer": invoke("generate", "latest", QUESTION).stdout.strip("\n"),
    }
    assert "answer" not in second
    assert "asked.csv:3" in second["error"]
    assert third["id"] == "3"
    (folder / "odd.csv").write_text("id,remark\n1,nothing here\n")
    done = invoke("generate", "latest", "--input", "odd.csv")
    assert done.exit_code == 2
    assert "no column for the prompt; found id, remark" in done.stderr


def test_conversations_and_instructions_are_answered_as_they_are_trained_on(folder: Path) -> None:
    head = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    earlier = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Yes?"}, {"from": "human", "value": "5?"}]
    rows: list[dict[str, object]] = [
        {"messages": [*head, {"role": "assistant", "content": "6"}]},  # the answer is the reference
        {"messages": head},
        {"prompt": QUESTION, "messages": head},
        {"conversations": earlier},
        {"prompt": head},
        {"instruction": "What comes after", "input": "5?"},
        {"messages": head[:1]},
    ]
    lines = []
    for row in rows:
        (folder / "conversation.jsonl").write_text(json.dumps(row) + "\n")
        lines.append(json.loads(invoke("generate", "latest", "--input", "conversation.jsonl").stdout))
    expected = invoke("generate", "latest", QUESTION, "--system", "Be brief.").stdout.strip("\n")
    assert [line.get("answer") for line in lines[:3]] == [expected] * 3
    assert lines[4]["answer"] == expected
    run = FinishedRun(Path("runs/tiny"))
    with_history = {"messages": [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in earlier]}
    joined = {"messages": [{"role": "user", "content": "What comes after\n\n5?"}]}
    served = run.load({"prompt": QUESTION}, base=False, max_new_tokens=None)
    prompts = [run.task.prompt(row, served.processor, served.recipe) for row in (with_history, joined)]
    outputs = generate_completions(served.model, prompts, served.processor, served.recipe, device=served.device)
    assert [lines[at]["answer"] for at in (3, 5)] == [served.read(output.token_ids) for output in outputs]
    assert "only a system message" in lines[6]["error"]


def test_an_error_of_a_row_names_the_column_of_the_file(folder: Path) -> None:
    (folder / "asked.csv").write_text(f"Instruction,id\n{QUESTION},1\n,2\n")
    done = invoke("generate", "latest", "--input", "asked.csv")
    assert "'Instruction' is empty" in json.loads(done.stdout.splitlines()[1])["error"], done.stdout


def test_a_file_of_rows_is_read_in_its_encoding(folder: Path) -> None:
    text = f"Größe,question\nüber,{QUESTION}\nweiß,Wie groß, wie schön?\n".replace("groß, wie", "groß; wie")
    (folder / "utf8.csv").write_text(text, encoding="utf-8")
    (folder / "windows.csv").write_text(text, encoding="cp1252")
    first, second = (invoke("generate", "latest", "--input", name) for name in ("utf8.csv", "windows.csv"))
    assert (second.stdout, "windows.csv is read as cp1252" in second.stderr) == (first.stdout, True), second.output
    assert "error" not in first.stdout


def test_a_row_that_the_template_refuses_gets_an_error_and_the_others_an_answer(
    tmp_path: Path, tiny_llama: Path
) -> None:
    (tmp_path / "no_system.jinja").write_text(NO_SYSTEM)
    model = {"chat_template": str(tmp_path / "no_system.jinja")}
    run = finish_run(tmp_path / "strict", tiny_llama, model=model, train={"max_steps": 1, "num_train_epochs": None})
    turn, system = {"role": "user", "content": QUESTION}, {"role": "system", "content": "Be brief."}
    rows = "".join(json.dumps({"messages": turns}) + "\n" for turns in ([system, turn], [turn]))
    (tmp_path / "odd.jsonl").write_text(rows)
    done = invoke("generate", run, "--input", tmp_path / "odd.jsonl")
    first, second = map(json.loads, done.stdout.splitlines())
    assert ("System role not supported" in first["error"], "answer" in second) == (True, True), done.output


def test_a_row_that_exceeds_the_models_context_gets_an_error_and_the_others_an_answer(folder: Path) -> None:
    (folder / "long.csv").write_text(f"question\n{'x ' * 10_000}\n{QUESTION}\n")
    done = invoke("generate", "latest", "--input", "long.csv", "--output", "long.jsonl")
    assert "1 row answered to long.jsonl; 1 could not be read" in done.stderr
    first, second = map(json.loads, (folder / "long.jsonl").read_text().splitlines())
    assert "tokens, but the model's context has room for" in first["error"]
    assert second["answer"] == invoke("generate", "latest", QUESTION).stdout.strip("\n")
    (folder / "only.csv").write_text(f"question\n{'x ' * 10_000}\n")
    done = invoke("generate", "latest", "--input", "only.csv")
    assert (done.exit_code, "no row could be answered" in done.stderr) == (3, True)
    assert "tokens, but the model's context has room for" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("output", ["asked_again.csv", "runs", "missing/answers.jsonl"])
def test_answers_are_not_written_over_the_input(folder: Path, output: str) -> None:
    (folder / "asked_again.csv").write_text(f"question\n{QUESTION}\n")
    done = invoke("generate", "latest", "--input", "asked_again.csv", "--output", output)
    assert (done.exit_code, f"{output}:" in done.stderr) == (2, True), done.stderr
    assert (folder / "asked_again.csv").read_text() == f"question\n{QUESTION}\n"


def test_a_rows_own_answer_is_kept_next_to_the_models(folder: Path) -> None:
    (folder / "known.csv").write_text(f"question,answer\n{QUESTION},seven\n,eight\n")
    done = invoke("generate", "latest", "--input", "known.csv", "--output", "known.jsonl")
    assert "1 row answered to known.jsonl; 1 could not be read" in done.stderr
    first, second = map(json.loads, (folder / "known.jsonl").read_text().splitlines())
    assert (first["reference"], second["reference"]) == ("seven", "eight")
    assert first["answer"] == invoke("generate", "latest", QUESTION).stdout.strip("\n")
    assert "answer" not in second


def test_runs_are_listed_with_their_verdicts() -> None:
    (run,) = json.loads(invoke("runs", "--json").stdout)
    assert (run["name"], run["task"], run["step"], run["trained"]) == ("tiny", "chat", "evaluate", True)
    assert run["verdict"] in {"better", "worse", "mixed", "inconclusive"}
    assert "runs/tiny  chat" in invoke("runs").stdout


@pytest.mark.parametrize(
    ("command", "instead"),
    [("serve", "llmtune deploy serve"), ("merge", "llmtune deploy merge"), ("predict", 'llmtune generate RUN "TEXT"')],
)
def test_command_names_of_other_tools_point_to_ours(command: str, instead: str) -> None:
    done = invoke(command, "runs/tiny", "--port", "8000")
    assert done.exit_code == 2
    assert f"Use: {instead}" in done.stderr


def test_messages_name_what_is_required_and_no_library() -> None:
    done = invoke("run", "tiny.yaml", "--until", "foo")
    assert (done.exit_code, "'--until': 'foo' is not one of" in done.stderr) == (2, True), done.stderr
    done = invoke("generate", "latest", "--pair", "x", stdin="")
    assert "Give --prompt, and optionally --system." in done.stderr


def test_settings_of_an_evaluation_are_saved_only_if_they_changed() -> None:
    saved = "Saved these settings with the run"
    assert saved not in invoke("evaluate", "runs/tiny").stderr
    assert saved in invoke("evaluate", "runs/tiny", "--set", "evaluate.metrics=[loss]").stderr
    assert saved in invoke("evaluate", "runs/tiny", "--set", "evaluate.metrics=[loss,accuracy,exact_match]").stderr


def test_help_and_version_also_work_as_commands() -> None:
    assert invoke("version").stdout == invoke("-V").stdout == invoke("--version").stdout
    assert "--dry-run" in invoke("help", "run").stdout
    shown = " ".join(invoke("--help").stdout.split())
    assert "--install-completion" in shown
    assert all(f"{code} {meaning}" in shown for code, meaning in EXIT_CODES.items())
    assert shown.index("Begin") < shown.index("init") < shown.index("Look closer") < shown.index("compare")
    assert 'Example: llmtune generate latest "TEXT"' in " ".join(invoke("generate", "--help").stdout.split())


def test_the_shell_completes_commands() -> None:
    words = {"_LLMTUNE_COMPLETE": "complete_bash", "COMP_WORDS": "llmtune ru", "COMP_CWORD": "1"}
    command = Path(sys.executable).with_name("llmtune")
    done = subprocess.run([command], env={**os.environ, **words}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["run", "runs"]


def test_a_run_ends_with_verdict_and_next_command_and_quiet_prints_nothing(folder: Path) -> None:
    done = invoke("run", "tiny.yaml", "--out", "runs/tiny")
    assert done.exit_code == 0, done.stderr
    verdict = json.loads((folder / "runs/tiny/report.json").read_text())["verdict"]
    assert f"{verdict['word']}: {verdict['reason']}" in done.stderr
    report, *steps = done.stderr.strip().splitlines()[-4:]
    assert report == "report: runs/tiny/report.html"
    commands = ("chat runs/tiny", 'generate runs/tiny "TEXT"', "deploy serve runs/tiny")
    assert steps == [f"next: llmtune {command}" for command in commands]
    quiet = invoke("run", "tiny.yaml", "--out", "runs/tiny", "--quiet")
    assert (quiet.exit_code, quiet.stderr) == (0, "")


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_truncates_no_number(width: int) -> None:
    names = ("base", "tuned", "difference", "95 % interval", "p", "rows")
    heads = [Column("metric"), *(Column(name, kind="number") for name in names)]
    numbers = ("0.1234", "0.9876", "+0.8642", "+0.8413 to +0.9524", "< 0.001", "1,234")
    console = Console(width=width, record=True, file=io.StringIO())
    print_blocks([Table(heads, [["a_metric_with_a_long_name", *numbers]])], console)
    words = console.export_text().split()
    assert all(word in words for number in numbers for word in number.split())


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--model", "x"), "It follows a command: llmtune run ... --model"),
        (("run", "quickstart", "--lr", "1"), "Use 'train.learning_rate'."),
        (("run", "quickstart", "--batch-size", "8"), "--set train.batch_size=VALUE"),
        (("run", "quickstart", "--modl", "x"), "Possible options: --model"),
    ],
)
def test_an_unknown_option_gets_a_hint(words: tuple[str, ...], hint: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2
    assert hint in " ".join(done.stderr.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
