"""Exports at the end of a run: the report is written before them, and names what failed or is unfinished."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.runs import invoke, write_colours, write_recipe

from llmtune.deploy.products import EXPORT_FORMATS, check_files
from llmtune.errors import EnvironmentProblem
from llmtune.store.atomic_files import read_json
from llmtune.store.run_folder import EXPORT_FOLDERS

FOREIGN = "notes.txt"


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """A recipe with two exports and a gate that passes."""
    rows = write_colours(tmp_path / "rows.jsonl")
    evaluate = {"gates": ["loss < 100"]}
    return write_recipe(tmp_path / "r.yaml", tiny_llama, rows, deploy=["merged", "gguf"], evaluate=evaluate)


def cases(run):
    """Each test case of a run's junit.xml with its outcome."""
    suite = ElementTree.parse(run / "junit.xml").getroot().find("testsuite")
    return suite, {
        case.get("name"): [child.tag for child in case if child.tag != "properties"] for case in suite.iter("testcase")
    }


def block(folder):
    """Put a file of the user's own where an export goes: making it fails."""
    folder.mkdir(parents=True)
    (folder / FOREIGN).write_text("mine")


def test_an_export_that_fails_leaves_the_scores_the_gates_and_its_reason_in_every_report(recipe, tmp_path):
    run = tmp_path / "run"
    block(run / "merged")
    done = invoke("run", recipe, "--out", run)
    assert done.exit_code == 2
    report = read_json(run / "report.json")
    assert report["evaluation"]["tuned"]["loss"] > 0
    assert [gate["passed"] for gate in report["gates"]] == [True]
    reason = "the folder contains something else"
    assert reason in report["deploy"]["failed"]["merged"]["message"]
    suite, outcomes = cases(run)
    assert (outcomes["loss < 100"], outcomes["merged"], outcomes["gguf"]) == ([], ["error"], ["skipped"])
    assert [suite.get(name) for name in ("tests", "errors", "failures", "skipped")] == ["3", "1", "0", "1"]
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert all("unfinished" in one and reason in one for one in (page, text))


@pytest.mark.parametrize(("gate", "outcome"), [("loss < 0", "failed"), ("loss < 100", None)])
def test_an_export_that_fails_hides_no_failed_gate(recipe, tmp_path, gate, outcome):
    run = tmp_path / "run"
    block(run / "merged")
    done = invoke("run", recipe, "--out", run, "--set", f"evaluate.gates=['{gate}']")
    assert done.exit_code == 2
    assert f"gate {'failed' if outcome else 'passed'}  {gate}" in done.stderr
    assert read_json(run / "run.json")["findings"]["gates"] == outcome


def test_exports_made_before_one_that_fails_keep_their_certificates_and_the_next_run_makes_the_rest(recipe, tmp_path):
    run = tmp_path / "run"
    block(run / "gguf/f16")
    assert invoke("run", recipe, "--out", run).exit_code == 2
    deploy = read_json(run / "report.json")["deploy"]
    assert deploy["exports"]["merged"]["passed"]
    assert list(deploy["failed"]) == ["gguf"]
    (run / "gguf/f16" / FOREIGN).unlink()
    assert invoke("run", recipe, "--out", run).exit_code == 0
    deploy = read_json(run / "report.json")["deploy"]
    assert list(deploy["exports"]) == ["merged", "gguf"]
    assert not deploy["failed"]
    assert all(outcome == [] for name, outcome in cases(run)[1].items())


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_run_stopped_while_it_exports_has_its_report_with_the_exports_unfinished(recipe, tmp_path, number, code):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "llmtune", "run", str(recipe), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not (run / "junit.xml").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(number)
        _, log = process.communicate(timeout=60)
    assert process.returncode == code, log
    report = json.loads((run / "report.json").read_text())
    assert report["evaluation"]["tuned"]["loss"] > 0
    assert report["gates"][0]["passed"]
    assert report["deploy"]["exports"] == {}
    _, outcomes = cases(run)
    assert (outcomes["merged"], outcomes["gguf"]) == (["skipped"], ["skipped"])


def test_each_export_goes_into_a_folder_that_belongs_to_a_run():
    assert {form.folder.partition("/")[0] for form in EXPORT_FORMATS.values()} == {*EXPORT_FOLDERS}


@pytest.mark.parametrize("name", ["fifo", "folder", "neighbour", "sparse", "missing"])
def test_an_export_that_cannot_be_read_to_its_end_is_refused_before_anything_is_loaded(
    name: str, tmp_path: Path
) -> None:
    model = tmp_path / "export" / "model.onnx"
    model.parent.mkdir()
    if name == "sparse":
        with model.open("wb") as file:
            file.truncate(2**40)
    elif name in ("fifo", "folder"):
        os.mkfifo(model)
    elif name == "neighbour":
        model.touch()
        os.mkfifo(model.with_name("tokenizer.json"))
    words = {"sparse": "1.1 TB, and no more than .* are read"}
    refused = pytest.raises(EnvironmentProblem, match=words.get(name, "a pipe, not a regular file"))
    with nullcontext() if name == "missing" else refused:
        check_files(model.parent if name == "folder" else model)
