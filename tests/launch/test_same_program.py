"""Every process runs `llmtune run`, started by torchrun or accelerate; output, errors and stops appear once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import invoke, write_recipe
from support.training import read_metrics

TESTS = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--num_processes", "2"]
LONG = {"num_train_epochs": 40, "save_steps": 10_000, "logging_steps": 1}


def started(command: list[str], *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **environment}
    return subprocess.run([*command, *map(str, words)], env=known, capture_output=True, text=True, timeout=300)


@pytest.fixture
def recipe(here: Path, tiny_llama: Path, chat_rows: Path) -> Path:
    return write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)


def assert_like_one_process(here: Path, run: Path, strategy: str) -> None:
    one = invoke("run", "tiny.yaml", "--out", "one")
    assert one.exit_code == 0, one.stderr
    pairs = list(zip(read_metrics(here / "one"), read_metrics(run), strict=True))
    assert len(pairs) >= 6
    for alone, together in pairs:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    facts = json.loads((run / "run.json").read_text())["steps"]["train"]["facts"]
    assert (facts["processes"], facts["strategy"]) == (2, strategy)
    scores = [json.loads((here / name / "report.json").read_text())["evaluation"] for name in ("one", run.name)]
    for model in ("base", "tuned"):
        assert scores[1][model] == pytest.approx(scores[0][model], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_torchrun_reaches_the_report_and_output_appears_once(recipe, here):
    done = started(TORCHRUN, "-m", "llmtune", "run", "tiny.yaml", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    document, report = json.loads(done.stdout), json.loads((here / "run" / "report.json").read_text())
    assert (document["folder"], document["verdict"]) == (str(here / "run"), report["verdict"])
    for line in ("prepare", "encode", "select", "adapt", "train", "evaluate", "report: run/report.html"):
        assert done.stderr.splitlines().count(line) == 1, done.stderr
    assert len(re.findall(r"^step 1/", done.stderr, re.MULTILINE)) == 1
    assert_like_one_process(here, here / "run", "ddp")
    again = started(TORCHRUN, "-m", "llmtune", "run", "tiny.yaml", "--out", "run")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("train unchanged, skipped") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "environment", "strategy"),
    [
        ([*ACCELERATE, "--multi_gpu"], {}, "ddp"),
        ([*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"], {}, "fsdp"),
        (TORCHRUN, {"LLMTUNE_STRATEGY": "fsdp"}, "fsdp"),
    ],
)
def test_the_strategy_comes_from_the_launcher_of_the_processes(command, environment, strategy, recipe, here):
    done = started(command, "-m", "llmtune", "run", "tiny.yaml", "--out", "run", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines().count("evaluate") == 1
    assert_like_one_process(here, here / "run", strategy)


def test_under_torchrun_rank_0_prints_a_failed_gate_even_if_it_ends_last(tmp_path):
    done = started(TORCHRUN, "-m", "support.workers", tmp_path / "result.json", "fail_a_gate")
    assert re.findall("a gate failed in rank [01]", done.stderr) == ["a gate failed in rank 0"]


@pytest.mark.slow
def test_processes_with_shards_evaluate_a_finished_run_and_answer_a_file(recipe, here):
    one = invoke("run", "tiny.yaml", "--out", "one")
    assert one.exit_code == 0, one.stderr
    shutil.copytree(here / "one", here / "two")
    questions = [json.dumps({"prompt": f"Which colour has the cat number {i}?"}) for i in range(7)]
    (here / "questions.jsonl").write_text("\n".join(questions))
    for name, command in (("one", [sys.executable]), ("two", TORCHRUN)):
        words = ["--set", "generation.max_new_tokens=5"]
        for command_words in (
            ["evaluate", name, *words],
            ["generate", name, "--input", "questions.jsonl", "--output", f"{name}.jsonl"],
        ):
            done = started([*command, "-m", "llmtune"], *command_words, LLMTUNE_STRATEGY="fsdp")
            assert done.returncode == 0, done.stderr
    scores = [json.loads((here / name / "report.json").read_text())["evaluation"] for name in ("one", "two")]
    for model in ("base", "tuned"):
        assert scores[1][model] == pytest.approx(scores[0][model], rel=1e-5, abs=1e-6)
    assert (here / "two.jsonl").read_bytes() == (here / "one.jsonl").read_bytes()
    refused = started(TORCHRUN, "-m", "llmtune", "generate", "two", "Which colour?")
    assert refused.stderr.count("several processes answer the rows of a file") == 1


@pytest.mark.slow
def test_accelerate_starting_one_process_on_a_cpu_is_an_error(recipe, here):
    done = started([*ACCELERATE, "--cpu"], "-m", "llmtune", "run", "tiny.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "accelerate started one process" in done.stderr
    assert (here / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("words", "environment", "code", "said"),
    [
        (["run", "tiny.yaml", "--set", "data.train=none.jsonl"], {}, 3, "none.jsonl"),
        pytest.param(["run", "none.yaml"], {}, 2, "none.yaml", marks=pytest.mark.slow),
        pytest.param(
            *(["run", "tiny.yaml"], {"LLMTUNE_STRATEGY": "zero3"}, 2, "`--strategy zero3` was removed"),
            marks=pytest.mark.slow,
        ),
        pytest.param(["runs"], {}, 2, "this command runs in one process", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_all_processes_is_printed_once(words, environment, code, said, recipe):
    done = started(TORCHRUN, "-m", "llmtune", *words, **environment)
    assert done.stderr.count("error ") - done.stderr.count("error_") <= 1, done.stderr
    assert done.stderr.count(said) == 1, done.stderr
    assert f"exitcode  : {code} " in done.stderr


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("mistake", 3, "row 7 has no answer"),
        pytest.param("bug", 1, "ZeroDivisionError: a bug", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_ends_all_and_is_printed_once(how, code, said, tmp_path):
    done = started(TORCHRUN, "-m", "support.workers", tmp_path / "result", "end_rank_one", how)
    assert done.stderr.count(said) == 1, done.stderr
    assert f"exitcode  : {code} " in done.stderr
    assert "terminated" not in done.stderr


def test_after_a_death_between_passes_the_other_process_ends_at_once_with_a_message(tmp_path):
    done = started(TORCHRUN, "-m", "support.workers", tmp_path / "result", "die_between_passes")
    lines = done.stderr.splitlines()
    assert sum("process 0 lost the connection" in line or line == "terminated" for line in lines) == 1, done.stderr
    assert "forcefully exiting" not in done.stderr  # torch's agent kills after 30 seconds


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_the_same_command_resumes(number, here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train=LONG)
    command = [*TORCHRUN, "-m", "llmtune", "run", "tiny.yaml", "--out", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(lambda: (here / "run" / "metrics.jsonl").exists() and len(read_metrics(here / "run")) > 5)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert said.count("a checkpoint is saved") == 1, said
    step = max(int(saved.name.removeprefix("step-")) for saved in (here / "run" / "checkpoints").iterdir())
    done = started(command, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"from step {step} of") == 1
    assert [line["step"] for line in read_metrics(here / "run")] == list(range(1, len(read_metrics(here / "run")) + 1))


@pytest.mark.slow
def test_all_processes_try_candidates_and_train_further_seeds(here, tiny_llama, chat_rows):
    other = shutil.copytree(tiny_llama, here / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    model = {"name": None, "candidates": [str(tiny_llama), str(other)], "trials": 2}
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, model=model, train={"seeds": [8], "num_train_epochs": 1})
    done = started(TORCHRUN, "-m", "llmtune", "run", "tiny.yaml", "--out", "two")
    assert done.returncode == 0, done.stderr
    one = invoke("run", "tiny.yaml", "--out", "one")
    assert one.exit_code == 0, one.stderr
    for place in (".", "seeds/8"):
        runs = [json.loads((here / name / place / "report.json").read_text()) for name in ("one", "two")]
        assert runs[0]["model"]["name"] == runs[1]["model"]["name"]
        for model in ("base", "tuned"):
            assert runs[1]["evaluation"][model] == pytest.approx(runs[0]["evaluation"][model], rel=1e-4, abs=1e-4)


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 180
    while not reached():
        assert time.monotonic() < end, "training never began"
        time.sleep(0.1)
