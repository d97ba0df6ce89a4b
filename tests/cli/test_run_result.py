"""`--json`: one document, of the published schema, however a command that runs a recipe ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from support.runs import invoke, write_colours, write_recipe

from llmtune.report.run_document import document_schema
from llmtune.store.atomic_files import read_json

TEXT = "Which colour has the"
"""The start of every row."""


def check(stdout, exit_code):
    """Return the only document in an output, which must fit the schema and the exit code and have no text of a row."""
    document = json.loads(stdout)
    Draft202012Validator(document_schema()).validate(document)
    assert document["exit_code"] == exit_code
    assert (document["error"] is None) == (exit_code == 0)
    assert document["error"] is None or document["error"]["exit_code"] == exit_code
    assert TEXT not in stdout
    return document


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """A recipe whose gate passes."""
    rows = write_colours(tmp_path / "rows.jsonl")
    return write_recipe(tmp_path / "r.yaml", tiny_llama, rows, evaluate={"gates": ["loss < 100"]})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama):
    """A folder with a recipe and its finished run, and the document that the run printed."""
    here = tmp_path_factory.mktemp("finished")
    rows = write_colours(here / "rows.jsonl")
    evaluate = {"gates": ["loss < 100"], "samples": 5}
    path = write_recipe(here / "r.yaml", tiny_llama, rows, deploy=["merged"], evaluate=evaluate)
    done = invoke("run", path, "--out", here / "run", "--json")
    assert done.exit_code == 0, done.output
    return here, done.stdout


def test_a_finished_run_has_scores_gates_reports_and_exports(finished):
    here, stdout = finished
    document = check(stdout, 0)
    run = str(here / "run")
    assert (document["command"], document["name"], document["task"]) == ("run", "tiny", "chat")
    assert (document["recipe"], document["out"], document["folder"]) == (str(here / "r.yaml"), run, run)
    assert [(gate["name"], gate["passed"]) for gate in document["gates"]] == [("loss < 100", True)]
    report = read_json(here / "run/report.json")
    assert document["verdict"] == report["verdict"]
    loss = document["scores"]["loss"]
    assert (loss["tuned"], loss["better"]) == (report["evaluation"]["tuned"]["loss"], "lower")
    assert loss["difference"]["n"] == report["evaluation"]["rows"] == document["rows"]["test"]
    assert document["scores"]["exact_match"]["better"] == "higher"
    (merged,) = document["exports"]
    assert (merged["state"], merged["passed"], merged["rows"]) == ("done", True, report["evaluation"]["rows"])
    paths = [merged["certificate"], merged["folder"], *document["reports"].values()]
    assert all(Path(path).is_absolute() and Path(path).exists() for path in paths)
    assert document["release"] is None
    assert {step["name"] for step in document["steps"]} >= {"prepare", "train", "evaluate", "deploy"}
    assert document["seconds"] > 0


def test_an_unchanged_run_prints_the_same_results(finished):
    here, stdout = finished
    done = invoke("run", here / "r.yaml", "--out", here / "run", "--json")
    again, before = check(done.stdout, done.exit_code), json.loads(stdout)
    changing = {"seconds", "steps"}
    assert {key: again[key] for key in again.keys() - changing} == {
        key: before[key] for key in before.keys() - changing
    }
    assert all(step["skipped"] for step in again["steps"])


@pytest.mark.parametrize("command", ["prepare", "select", "adapt", "train", "evaluate"])
def test_each_step_prints_the_document(finished, command):
    here, _ = finished
    done = invoke(command, here / "r.yaml", "--out", here / "run", "--json")
    document = check(done.stdout, 0)
    assert (document["command"], document["folder"]) == (command, str(here / "run"))
    assert document["model"]["name"]


def test_a_run_folder_that_is_evaluated_again_prints_the_document(finished, tmp_path):
    run = shutil.copytree(finished[0] / "run", tmp_path / "run")
    words = ("evaluate", run, "--set", "evaluate.gates=['exact_match > 2']", "--json")
    done = invoke(*words)
    document = check(done.stdout, 6)
    assert document["gates"][0]["passed"] is False
    assert document["error"]["kind"] == "GateFailed"


def test_a_dry_run_has_its_plan_and_no_results(finished):
    here, _ = finished
    done = invoke("run", here / "r.yaml", "--out", here / "run", "--dry-run", "--json")
    document = check(done.stdout, 0)
    assert document["plan"]["would_run"] == []
    assert (document["gates"], document["verdict"], document["scores"]) == ([], None, {})
    done = invoke("run", here / "r.yaml", "--out", here / "new", "--until", "adapt", "--dry-run", "--json")
    assert check(done.stdout, 0)["plan"]["would_run"] == ["prepare", "encode"]


@pytest.mark.parametrize(
    ("gates", "code", "passed"),
    [("['loss < 0.001', 'loss < 100']", 6, [False, True]), ("['exact_match.low > base - 0.0001']", 7, [None])],
)
def test_a_gate_that_fails_or_is_undecided_keeps_all_results(recipe, tmp_path, gates, code, passed):
    more = ("--set", f"evaluate.gates={gates}", "--set", "evaluate.when_unsure=report") if code == 7 else ()
    more = more or ("--set", f"evaluate.gates={gates}")
    done = invoke("run", recipe, "--out", tmp_path / "run", *more, "--json")
    document = check(done.stdout, code)
    assert [gate["passed"] for gate in document["gates"]] == passed
    assert document["scores"]["loss"]["tuned"] > 0
    assert all(document["reports"].values())
    again = invoke("run", recipe, "--out", tmp_path / "run", *more, "--json")
    assert check(again.stdout, code)["gates"] == document["gates"]


ERRORS = {
    "recipe": (2, "RecipeError", ["--set", "train.unknown=3"]),
    "usage": (2, "RecipeError", ["--bogus"]),
    "both": (2, "RecipeError", ["--resume", "--fresh"]),
    "data": (3, "DataError", ["--set", "data.train=missing.jsonl"]),
    "model": (4, "EnvironmentProblem", ["--set", "model.name=./no-such-model"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_every_error_prints_the_document_with_the_error_and_no_results(recipe, tmp_path, case):
    code, kind, words = ERRORS[case]
    done = invoke("run", recipe, "--out", tmp_path / "run", *words, "--json")
    document = check(done.stdout, code)
    assert document["error"]["kind"] == kind
    assert all(problem["what"] for problem in document["error"]["problems"])
    assert (document["gates"], document["scores"], document["verdict"]) == ([], {}, None)
    assert document["reports"]["html"] is None
    if case in ("data", "model"):
        assert document["folder"] == str(tmp_path / "run")
        assert Path(document["reports"]["junit"]).exists()


def test_a_diverged_training_prints_the_document(tmp_path, tiny_llama):
    train = {"learning_rate": 10.0, "max_grad_norm": 0.0, "num_train_epochs": 60}
    adapter = {"method": "full", "r": None, "lora_alpha": None}
    rows = write_colours(tmp_path / "rows.jsonl")
    path = write_recipe(tmp_path / "r.yaml", tiny_llama, rows, train=train, adapter=adapter)
    document = check(invoke("run", path, "--out", tmp_path / "run", "--json").stdout, 5)
    assert document["error"]["kind"] == "TrainingError"
    assert Path(document["reports"]["junit"]).exists()


def test_an_error_does_not_show_the_results_of_an_earlier_run(recipe, tmp_path):
    words = ("run", recipe, "--out", tmp_path / "run", "--json")
    assert check(invoke(*words).stdout, 0)["gates"]
    (tmp_path / "rows.jsonl").write_text("not json\n" * 40)
    document = check(invoke(*words).stdout, 3)
    assert (document["gates"], document["scores"], document["exports"]) == ([], {}, [])
    assert document["reports"]["json"] is None


def test_an_export_that_fails_keeps_the_scores(recipe, tmp_path):
    (tmp_path / "run/merged").mkdir(parents=True)
    (tmp_path / "run/merged/mine.txt").write_text("mine")
    done = invoke("run", recipe, "--out", tmp_path / "run", "--set", "deploy=[merged, gguf]", "--json")
    document = check(done.stdout, 2)
    assert document["gates"][0]["passed"]
    assert [(one["name"], one["state"], one["passed"]) for one in document["exports"]] == [
        ("merged", "failed", None),
        ("gguf", "unfinished", None),
    ]


def test_a_bug_prints_the_document_too(recipe, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("llmtune.cli.run.run_recipe", fail)
    document = check(invoke("run", recipe, "--json").stdout, 1)
    assert document["error"]["kind"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("state", "number", "code"),
    [
        ("loading", signal.SIGTERM, 143),
        ("training", signal.SIGINT, 130),
        pytest.param("loading", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("training", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_prints_the_document(recipe, tmp_path, state, number, code):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "llmtune", "run", str(recipe), "--out", str(run), "--json"]
    command += ["--set", "train.num_train_epochs=500"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    awaited = run / ("run.json" if state == "loading" else "metrics.jsonl")
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as process:
        end = time.monotonic() + 120
        while not awaited.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        stdout, log = process.communicate(timeout=60)
    assert process.returncode == code, log
    document = check(stdout, code)
    assert document["error"]["kind"] == "Stopped"
    assert document["folder"] == str(run)


@pytest.mark.slow
def test_several_processes_print_one_document(recipe, tmp_path):
    words = [sys.executable, "-m", "llmtune", "launch", "local", str(recipe), "--processes", "2", "--json"]
    for more, code in (
        ((), 0),
        (("--set", "evaluate.gates=['loss < 0.001']"), 6),
        (("--set", "data.train=x.jsonl"), 3),
    ):
        done = subprocess.run(
            [*words, "--out", str(tmp_path / f"run-{code}"), *more], capture_output=True, text=True, check=False
        )
        document = check(done.stdout, code)
        assert (document["command"], document["folder"]) == ("launch local", str(tmp_path / f"run-{code}"))
        assert bool(document["gates"]) == (code != 3)


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed: apt-get install jq")
def test_jq_alone_reads_the_document(finished):
    _, stdout = finished

    def jq(*words):
        return subprocess.run(["jq", "-r", *words], input=stdout, capture_output=True, text=True, check=True).stdout

    assert jq(".exit_code").strip() == "0"
    assert jq(".gates[] | [.name, .passed] | @tsv").strip() == "loss < 100\ttrue"
    assert float(jq(".scores.loss.difference.value")) == json.loads(stdout)["scores"]["loss"]["difference"]["value"]
    assert jq(".exports[] | select(.passed) | .folder").strip().endswith("run/merged")
    assert Path(jq(".reports.junit").strip()).exists()


RESULTS = ("score loss (lower is better): ", "report junit: ")
"""Lines of the script for a run with scores."""


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed: apt-get install jq")
@pytest.mark.parametrize(
    ("more", "code", "lines"),
    [
        pytest.param((), 0, ["gate passed: loss < 100", *RESULTS], marks=pytest.mark.slow),
        (
            ("--set", "evaluate.gates=['loss < 0.001', 'loss < 100']"),
            6,
            ["gate FAILED: loss < 0.001", "error at loss < 0.001: ", "gate passed: loss < 100", *RESULTS],
        ),
        (("--set", "data.train=missing.jsonl"), 3, ["verdict: none   exit code 3", "error at "]),
        (("--bogus",), 2, ["no run folder", "error at the command line: No such option: --bogus"]),
    ],
)
def test_the_script_of_the_ci_examples_summarises_a_run_with_jq(recipe, tmp_path, more, code, lines):
    script = Path(__file__).resolve().parents[2] / "examples/ci/result.sh"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["sh", str(script), str(recipe), "--out", str(tmp_path / "run"), *more]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    check((tmp_path / "result.json").read_text(), code)
    assert all(line in done.stdout for line in lines), done.stdout


def test_the_schema_describes_each_key():
    schema = json.loads(invoke("run", "--schema").stdout)
    assert schema == document_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["folder"]["description"].startswith("Absolute path")
    assert set(schema["required"]) == set(schema["properties"])
