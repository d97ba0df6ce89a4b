"""Week after week in the default run folder: new rows make another folder, and a bad week replaces nothing."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from support.process import run_in_child
from support.runs import invoke, write_recipe, write_sums
from typer.testing import Result

import llmtune
from llmtune.errors import RecipeError
from llmtune.store.atomic_files import hash_path
from llmtune.store.run_folder import read_run
from llmtune.store.run_listing import find_run
from llmtune.store.run_lock import read_lock

QUESTION = "What comes after 5 and before 7?"
FAILING = 'evaluate.gates=["accuracy >= 2"]'
MOMENTS = (
    *("recipe.yaml", "data/rows", "data/examples", "llmtune.lock"),
    *("checkpoints", "adapter", "evaluation", "report.json"),
)
"""Files and folders of a run, in the order in which they get their final names."""


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A working folder with the run of the first week, which passed its gate."""
    place = tmp_path_factory.mktemp("weeks")
    write_sums(place / "rows.jsonl")
    write_recipe(place / "tiny.yaml", tiny_llama, "rows.jsonl", evaluate={"gates": ["accuracy >= 0"]})
    before = Path.cwd()
    os.chdir(place)
    try:
        done = invoke("run", "tiny.yaml")
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.stderr
    return place


@pytest.fixture
def folder(week: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the working folder of the first week, where the rows have grown since."""
    place = shutil.copytree(week, tmp_path / "work", symlinks=True)
    write_sums(place / "rows.jsonl", 46)
    monkeypatch.chdir(place)
    return place


def answer(run: str) -> str:
    done = invoke("generate", run, QUESTION)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def first_line(done: Result) -> str:
    return next(line for line in done.stderr.splitlines() if line.startswith("llmtune "))


def folders() -> set[str]:
    return {path.name for path in Path("runs").iterdir()}


def test_new_rows_make_another_folder_and_the_same_rows_continue_in_theirs(folder: Path) -> None:
    (first,) = folders()
    done = invoke("run", "tiny.yaml")
    assert done.exit_code == 0, done.stderr
    (second,) = folders() - {first}
    why = f"rows changed since {first} (rows.jsonl grew by 6 lines): new folder"
    assert first_line(done).endswith(f"tiny -> runs/{second}: {why}")
    assert find_run(Path("tiny")) == Path("runs") / second
    assert find_run(Path(first.replace("tiny-", "tiny@"))) == Path("runs") / first
    again = invoke("run", "tiny.yaml")
    assert first_line(again).endswith(f"tiny -> runs/{second}")
    assert folders() == {first, second}
    write_sums(folder / "rows.jsonl")
    assert first_line(invoke("run", "tiny.yaml")).endswith(f"tiny -> runs/{first}")
    assert find_run(Path("tiny")) == Path("runs") / second, "the run that was trained last"


def test_a_week_that_fails_its_gate_leaves_the_name_with_the_week_before(folder: Path) -> None:
    (first,), before = folders(), answer("tiny")
    assert invoke("run", "tiny.yaml", "--set", FAILING).exit_code == 6
    (second,) = folders() - {first}
    assert answer("tiny") == before
    assert answer("latest") == answer(second.replace("tiny-", "tiny@"))
    failed, passed = json.loads(invoke("runs", "--json").stdout)
    assert (failed["folder"], failed["gates"], failed["names"]) == (f"runs/{second}", "failed", [])
    assert (passed["folder"], passed["gates"], passed["names"]) == (f"runs/{first}", "passed", ["tiny"])
    assert re.search(rf"runs/{first} +chat +\S+ +passed +tiny ", invoke("runs").stdout)
    assert invoke("evaluate", second.replace("tiny-", "tiny@"), "--set", "evaluate.gates=[]").exit_code == 0
    assert find_run(Path("tiny")) == Path("runs") / second


def test_a_name_without_a_passed_run_is_refused_with_its_runs(folder: Path) -> None:
    (first,) = folders()
    read_run(Path("runs") / first).note(gates="failed")
    address = first.replace("tiny-", "tiny@")
    for name in ("tiny", "tiny@00000000"):
        done = invoke("generate", name, QUESTION)
        assert done.exit_code == 2
        assert f"Name one of its runs: {address} (gates failed)." in done.stderr.replace("\n", " ")
    with pytest.raises(RecipeError, match="no run of tiny passed its gates"):
        llmtune.load_run("tiny")
    assert llmtune.load_run(address).folder == Path("runs") / first


def test_resume_says_that_the_rows_changed(folder: Path) -> None:
    done = invoke("run", "tiny.yaml", "--resume")
    assert done.exit_code == 2
    assert "nothing to resume: rows changed since" in done.stderr
    assert len(folders()) == 1


def test_missing_rows_are_named_with_their_recipe_line_as_before(folder: Path) -> None:
    (folder / "rows.jsonl").unlink()
    for options in (["--out", "elsewhere"], []):
        done = invoke("run", "tiny.yaml", *options)
        assert done.exit_code == 3
        assert done.stderr == f"error data.train: file not found: {folder}/rows.jsonl\n  -> Looked in {folder}.\n"
    assert any("DataError" in path.read_text() for path in Path("runs").glob("*/junit.xml"))


def test_a_released_run_is_not_trained_over(folder: Path) -> None:
    (first,) = folders()
    run = read_run(Path("runs") / first)
    run.note(released=["release:tiny@00112233"])
    kept = ("data", "adapter", "evaluation", "llmtune.lock", "metrics.jsonl", "report.json")
    before = [hash_path(run.path / name) for name in kept]
    for words in (["tiny.yaml"], ["tiny.yaml", "--fresh"], ["tiny.yaml", "--set", "train.learning_rate=1e-4"]):
        done = invoke("run", *words, "--out", run.path)
        assert done.exit_code == 2, done.stderr
        assert "released as release:tiny@00112233" in done.stderr
        assert "Choose another folder with --out" in done.stderr
    assert [hash_path(run.path / name) for name in kept] == before
    assert invoke("evaluate", run.path, "--set", FAILING).exit_code == 6


def test_a_champion_and_a_start_are_named_like_runs_and_are_never_the_run_itself(folder: Path) -> None:
    (first,) = folders()
    start = f"adapter.start_from={first.replace('tiny-', 'tiny@')}"
    sets = ("evaluate.champion=tiny", start, "adapter.r=null", "adapter.lora_alpha=null")
    settings = [word for one in sets for word in ("--set", one)]
    for _ in range(2):
        done = invoke("run", "tiny.yaml", *settings, "--json")
        assert done.exit_code == 0, done.stderr
        (second,) = folders() - {first}
        assert find_run(Path("tiny")) == Path("runs") / second
        evaluation = json.loads(Path("runs", second, "report.json").read_text())["evaluation"]
        assert evaluation["champion"]["folder"].endswith(first)
        started = read_lock(Path("runs", second, "llmtune.lock"))["start_from"]
        assert started is not None
        assert started["folder"].endswith(f"{first}/adapter")
    assert "skipped" in done.stderr
    for key in ("evaluate.champion", "adapter.start_from"):
        done = invoke("run", "tiny.yaml", *settings, "--set", f"{key}=tiny@00000000")
        assert (done.exit_code, "tiny has no run 00000000" in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_name_with_the_model_before(folder: Path) -> None:
    (first,), before = folders(), answer("tiny")
    for moment in MOMENTS:
        done = run_in_child(run_and_die, folder / "killed", str(folder), moment)
        assert done.returncode == -signal.SIGKILL, f"{moment}: {done.stderr}"
        assert find_run(Path("tiny")) == Path("runs") / first, moment
        assert answer("tiny") == before
    assert invoke("run", "tiny.yaml").exit_code == 0
    (second,) = folders() - {first}
    assert find_run(Path("tiny")) == Path("runs") / second


def run_and_die(folder: str, moment: str) -> None:
    """Run the recipe in a folder; kill this process before a file or folder gets its final name."""
    from llmtune.cli.app import app

    def kill(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and f"/{moment}" in f"{arguments[1]}":
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    sys.addaudithook(kill)
    app(["run", "tiny.yaml"])


def test_run_until_a_step_does_what_the_command_of_the_step_does(folder: Path) -> None:
    commands = {"aliased": ("adapt", "tiny.yaml"), "until": ("run", "tiny.yaml", "--until", "adapt")}
    inputs = {}
    for out, words in commands.items():
        done = invoke(*words, "--out", out)
        assert done.exit_code == 0, done.stderr
        inputs[out] = {name: step["inputs"] for name, step in read_run(Path(out)).manifest["steps"].items()}
    assert inputs["aliased"] == inputs["until"]
    assert {*inputs["until"]} == {"prepare", "encode", "select", "adapt"}
    assert "Invalid value for '--until'" in invoke("run", "tiny.yaml", "--until", "never").stderr
