"""A feature whose packages are not installed names them and their extra, before a model is loaded."""

import json
import sys
from pathlib import Path

import pytest
from support.runs import invoke, write_recipe, write_sums

JUDGE = {"judge": {"model": "judge", "endpoint": "http://localhost:9/v1"}}
CASES = {
    "speech": ("soundfile", {"task": "speech", "evaluate": None, "generation": None}, ["prepare", "mine.yaml"]),
    "judge": ("openai", {"evaluate": JUDGE}, ["prepare", "mine.yaml"]),
    "serve": ("fastapi", {}, ["deploy", "serve", "run"]),
    "benchmarks": ("lm_eval", {"evaluate": {"benchmarks": ["hellaswag"]}}, ["prepare", "mine.yaml"]),
    "ray": ("ray", {}, ["prepare", "mine.yaml", "--ray", "local"]),
}


@pytest.mark.parametrize("extra", CASES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    extra: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, sections, words = CASES[extra]
    monkeypatch.setitem(sys.modules, package, None)  # as the import system has it: not there
    (here / "speech.csv").write_text("audio,text\na.wav,one\nb.wav,two\n")
    rows = here / "speech.csv" if extra == "speech" else write_sums(here / "sums.jsonl")
    write_recipe(here / "mine.yaml", "owner/model", rows, **sections)
    done = invoke(*words)
    assert (done.exit_code, f"{package} is not installed" in done.stderr) == (4, True), done.stderr
    assert f"pip install 'llmtune-cli[{extra}]'" in done.stderr


def test_doctor_notes_a_missing_extra_and_evaluate_refuses_to_start(
    here: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(here / "mine.yaml", tiny_llama, write_sums(here / "sums.jsonl"), train={"num_train_epochs": 1})
    assert invoke("run", "mine.yaml", "--out", "run").exit_code == 0
    monkeypatch.setitem(sys.modules, "openai", None)
    checks = {one["name"]: one for one in json.loads(invoke("doctor", "--json").stdout)["checks"]}
    assert (checks["extra judge"]["state"], checks["extra speech"]["state"]) == ("note", "good")
    assert checks["extra judge"]["fix"] == "pip install 'llmtune-cli[judge]'"
    judge = ("evaluate.judge.model=judge", "evaluate.judge.endpoint=http://localhost:9/v1")
    done = invoke("evaluate", "run", *(word for one in judge for word in ("--set", one)))
    assert (done.exit_code, "pip install 'llmtune-cli[judge]'" in done.stderr) == (4, True), done.stderr
