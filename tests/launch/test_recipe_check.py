"""Problems with the files and tools that a recipe names are reported before heavy imports."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from junitparser.xunit2 import JUnitXml
from support.conversation_table import SHAPES, tools_of
from support.models import build_llama
from support.runs import invoke, write_recipe
from support.templates import CHATML, HERMES

PIPELINE = importlib.import_module("llmtune.pipeline")

LIGHT = ["recipes", "check"]


@pytest.fixture(autouse=True)
def without_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmtune.pipeline", None)  # importing it would be an error


COMMANDS = pytest.mark.parametrize("command", [["recipes", "check"], ["run", "--dry-run"], ["run"]], ids=" ".join)


@COMMANDS
def test_an_unedited_template_is_refused(here: Path, command: list[str]) -> None:
    assert invoke("recipes", "new", "--task", "classify", "--out", "mine.yaml").exit_code == 0
    found = invoke(*command, "mine.yaml")
    assert found.exit_code == 3
    assert "still the starter's value: line 5: name: my-classify" in found.stderr
    assert "file not found:" in found.stderr


@COMMANDS
@pytest.mark.parametrize(
    ("sections", "code", "words"),
    [
        ({"data": {"train": "tickets.csv"}}, 3, 'columns: {prompt: "{subject}\\n\\n{body}", completion: answer}'),
        ({"data": {"train": "tickets.cvs"}}, 3, "Did you mean 'tickets.csv'?"),
        ({"model": {"name": "/no/such/model"}}, 4, "folder /no/such/model not found"),
    ],
)
def test_files_columns_and_models_are_checked(
    here: Path, command: list[str], sections: dict, code: int, words: str
) -> None:
    (here / "tickets.csv").write_text("subject,body,answer\nLate,Where is my parcel?,On its way.\n")
    (here / "rows.csv").write_text("question,answer\nWhere is my parcel?,On its way.\n")
    write_recipe(here / "mine.yaml", "owner/model", "rows.csv", **sections)
    found = invoke(*command, "mine.yaml")
    assert found.exit_code == code
    assert words in found.stderr.replace("\n    ", " ") or words in found.stderr


def test_problems_of_all_stages_are_reported_at_once(here: Path) -> None:
    (here / "rows.csv").write_text("question,answer\n,Here.\nWhere?,There.\n")
    evaluate = {"champion": "runs/none", "metrics": ["loss", "own.py:f"]}
    write_recipe(here / "mine.yaml", "/no/such/model", "rows.csv", evaluate=evaluate)
    found = invoke(*LIGHT, "mine.yaml")
    assert found.exit_code == 2
    for words in ("runs/none: run folder not found", "own.py: cannot be read", "/no/such/model", "'question' is empty"):
        assert words in found.stderr


@pytest.mark.parametrize("tracker", ["swanlab", "comet_ml"])
def test_a_missing_tracker_is_a_note_of_check_and_an_error_before_training(here: Path, tracker: str) -> None:
    (here / "rows.csv").write_text("question,answer\n" + "".join(f"Where is parcel {i}?,Here {i}.\n" for i in range(9)))
    write_recipe(here / "mine.yaml", "owner/model", "rows.csv", train={"report_to": [tracker]})
    what, fix = f"the tracker {tracker} is not installed", f"pip install {tracker.replace('_', '-')}"
    checked = invoke(*LIGHT, "mine.yaml", "--json")
    assert checked.exit_code == 0, checked.stderr
    assert json.loads(checked.stdout)["notes"] == [f"{what}; a run needs it: {fix}"]
    assert fix in checked.stderr
    for command in (["run"], ["train"], ["evaluate"], ["run", "--dry-run"]):
        refused = invoke(*command, "mine.yaml")
        assert refused.exit_code == 4
        assert what in refused.stderr
        assert fix in refused.stderr
    assert not list(here.glob("runs/*/data"))


@COMMANDS
@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        ({"corpus": "passages.tx"}, 3, "data.corpus: file not found"),
        ({"negatives": {"mine": 2, "model": "./no-model"}}, 4, "data.negatives.model: folder"),
    ],
)
def test_corpus_and_miner_are_checked_too(here: Path, command: list[str], data: dict, code: int, words: str) -> None:
    (here / "pairs.csv").write_text("query,passage\nWhere is my parcel?,On its way.\n")
    (here / "passages.txt").write_text("On its way.\n")
    more: dict = {"task": "embed", "evaluate": None, "generation": None}
    write_recipe(here / "mine.yaml", "owner/model", "pairs.csv", data=data, **more)
    found = invoke(*command, "mine.yaml")
    assert (found.exit_code, words in found.stderr) == (code, True), found.stderr


@pytest.mark.parametrize("command", [["run"], ["train"]])
def test_an_error_before_the_gates_is_reported_in_junit_xml(here: Path, command: list[str]) -> None:
    (here / "tickets.csv").write_text("subject,body,answer\nLate,Where is my parcel?,On its way.\n")
    write_recipe(here / "mine.yaml", "owner/model", "tickets.csv")
    assert invoke(*command, "mine.yaml", "--out", "out").exit_code == 3
    (suite,) = JUnitXml.fromstring((here / "out" / "junit.xml").read_bytes())
    assert (suite.tests, suite.failures, suite.errors) == (1, 0, 1)
    (case,) = suite
    (error,) = case.result
    assert (error.type, "tickets.csv" in error.text) == ("DataError", True)
    assert invoke(*command, "mine.yaml", "--out", "out").exit_code == 3  # the folder does not count as another recipe's


def test_checking_a_valid_recipe_prints_how_its_files_are_read(here: Path) -> None:
    rows = [f"Where is my {thing}?,The {thing} is on its way.\n" for thing in ("parcel", "letter", "order", "book")]
    (here / "rows.csv").write_text("".join(["question,answer\n", *rows]))
    write_recipe(here / "mine.yaml", "owner/model", "rows.csv")
    assert (
        "rows.csv: prompt-completion rows (prompt is 'question', completion is 'answer')"
        in invoke(*LIGHT, "mine.yaml").stdout
    )
    said = json.loads(invoke(*LIGHT, "mine.yaml", "--json").stdout)
    assert said["data"][0]["columns"] == {"prompt": "question", "completion": "answer"}


def test_a_folder_of_another_recipe_is_refused_with_both_alternatives(here: Path) -> None:
    (here / "rows.csv").write_text("question,answer\nWhere is my parcel?,On its way.\n")
    write_recipe(here / "mine.yaml", "owner/model", "rows.csv")
    (here / "out").mkdir()
    done = {"prepare": {"state": "done", "inputs": "", "started": 0.0, "outputs": {}, "facts": {}}}
    (here / "out" / "run.json").write_text(json.dumps({"fingerprint": "f" * 64, "steps": done, "findings": {}}))
    found = invoke("run", "mine.yaml", "--out", "out")
    assert found.exit_code == 2
    assert "--out" in found.stderr
    assert "--fresh" in found.stderr


@COMMANDS
def test_bad_rewards_and_a_bad_audit_are_refused_at_once_before_rows_are_read(here: Path, command: list[str]) -> None:
    (here / "rows.csv").write_text("prompt,completion\nWhere?,There.\n")
    (here / "own.py").write_text("def score(a, b, c):\n    return 1.0\n")
    reinforce = {"rewards": {"exact_mach": 1.0, "none.py:score": 1.0, "own.py:score": 1.0}, "audit": "own.py:scores"}
    write_recipe(
        here / "mine.yaml",
        "owner/model",
        "rows.csv",
        task="reinforce",
        evaluate={"metrics": ["reward"]},
        reinforce=reinforce,
    )
    found = invoke(*command, "mine.yaml")
    assert found.exit_code == 2
    shown = " ".join(found.stderr.split())
    assert "unknown reward 'exact_mach'" in shown
    assert "none.py: cannot be read" in shown
    assert "score cannot be called as a reward" in shown
    assert "no function 'scores'" in shown
    assert "reinforce.audit" in shown


def test_an_audit_named_as_a_reward_is_refused(here: Path) -> None:
    (here / "rows.csv").write_text("prompt,completion\nWhere?,There.\n")
    for file in ("one.py", "two.py"):
        (here / file).write_text("def score(row, answer):\n    return 1.0\n")
    reinforce = {"rewards": {"one.py:score": 1.0}, "audit": "two.py:score"}
    write_recipe(
        here / "mine.yaml",
        "owner/model",
        "rows.csv",
        task="reinforce",
        evaluate={"metrics": ["reward"]},
        reinforce=reinforce,
    )
    found = invoke(*LIGHT, "mine.yaml")
    assert found.exit_code == 2
    assert "two rewards are named 'score'" in " ".join(found.stderr.split())


@pytest.mark.parametrize("command", [["recipes", "check"], ["run", "--until", "prepare"]], ids=" ".join)
def test_rows_without_what_a_reward_needs_are_refused_by_its_name(
    here: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llmtune.pipeline", PIPELINE)  # `run` needs it
    rows = [{"prompt": f"What is {i} + {i}?", "number": 2 * i} for i in range(40)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "own.py").write_text(
        "def right(completions, number, **columns):\n    return [1.0]\n\n\n"
        "def wrong(completions, total, **columns):\n    return [1.0]\n"
    )
    rewards = {"exact_match": 1.0, "own.py:right": 1.0}
    reinforce = {"rewards": rewards, "audit": "own.py:wrong"}
    sections = {"task": "reinforce", "evaluate": {"metrics": ["reward"]}}
    write_recipe(here / "mine.yaml", "owner/model", "rows.jsonl", **sections, reinforce=reinforce)
    found = invoke(*command, "mine.yaml")
    shown = " ".join(found.stderr.split())
    assert found.exit_code == 3
    assert re.search(r"rows.jsonl:\d+: the reward exact_match needs a reference answer, and the row has none", shown)
    assert "wrong takes `total`, and the rows have no such column" in shown
    assert "right takes" not in shown
    kept = {"rewards": {"own.py:right": 1.0}}
    write_recipe(here / "mine.yaml", "owner/model", "rows.jsonl", **sections, reinforce=kept)
    assert invoke(*command, "mine.yaml").exit_code == (0 if command == LIGHT else 4)  # a run has no such model


@pytest.mark.parametrize(("template", "words"), [(CHATML, "leaves out tools, calls of tools"), (HERMES, "")])
def test_a_template_that_leaves_out_tools_of_rows_is_refused_by_check_and_init(
    here: Path, template: str, words: str
) -> None:
    model = build_llama(here / "model", template)
    asked = [[{"role": "user", "content": f"And on day {i}?"}, *SHAPES["call"][1:]] for i in range(30)]
    weather = [{"messages": messages, "tools": tools_of("call")} for messages in asked]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in weather))
    written = invoke("init", "rows.jsonl", "--model", model, "--out", "mine.yaml")
    checked = invoke("recipes", "check", "mine.yaml")
    for done in (written, checked):
        assert words in " ".join(done.stderr.split()), done.stderr
    assert (checked.exit_code, "fix the problems" in written.stdout) == ((4, True) if words else (0, False))
