"""Two machines, simulated by network namespaces with a cable between them, with one process each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.runs import invoke, write_recipe
from support.training import read_metrics

pytestmark = pytest.mark.slow
HOST = "10.77.0.1"
WAIT = 240


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Callable[[bool], None]]:
    """Connect two machines by a cable; yield a function that cuts it (False) and repairs it (True)."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("network namespaces take root and iproute2")
    names = [f"llmtune{os.getpid()}-{rank}" for rank in (0, 1)]
    ends = [f"lt{os.getpid() % 100_000}{rank}" for rank in (0, 1)]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for rank, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield lambda whole: ip("-n", names[1], "link", "set", ends[1], "up" if whole else "down")
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def start(cable, here) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command on a machine."""
    started: list[subprocess.Popen[str]] = []

    def launch(rank: int, *options: object, port: int = 29511) -> subprocess.Popen[str]:
        words = ["launch", "local", "tiny.yaml", "--machines", 2, "--rank", rank, "--address", f"{HOST}:{port}"]
        command = [sys.executable, "-m", "llmtune", *words, "--threads", 1, "--out", "run", *options]
        inside = ["ip", "netns", "exec", f"llmtune{os.getpid()}-{rank}", *map(str, command)]
        file = here / f"machine-{rank}-{len(started)}.log"
        with file.open("w") as log:
            process = subprocess.Popen(inside, cwd=here, stdout=subprocess.DEVNULL, stderr=log, text=True)
        process.log = file  # type: ignore[attr-defined]
        started.append(process)
        return process

    yield launch
    for process in started:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill all processes of a machine, like a power cut."""
    if process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in tree:
            one.kill()
        psutil.wait_procs(tree, timeout=10)
    process.wait()


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + WAIT
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < step:
        assert time.monotonic() < end, "training never came that far"
        time.sleep(0.1)


def wait_for_words(machine: subprocess.Popen[str], words: str) -> None:
    end = time.monotonic() + WAIT
    while words not in machine.log.read_text():  # type: ignore[attr-defined]
        assert time.monotonic() < end, f"it never printed {words!r}"
        time.sleep(0.02)


def end_of(*machines: subprocess.Popen[str]) -> list[int]:
    return [machine.wait(timeout=WAIT) for machine in machines]


@pytest.fixture
def recipe(here, tiny_llama, chat_rows) -> Path:
    train = {"num_train_epochs": 60, "save_steps": 20, "logging_steps": 1, "learning_rate": 1e-3}
    return write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train=train)


def assert_undisturbed(here: Path) -> None:
    """Compare the run with the same recipe in one process of one machine."""
    assert invoke("run", "tiny.yaml", "--out", "alone").exit_code == 0
    pairs = list(zip(read_metrics(here / "alone"), read_metrics(here / "run"), strict=True))
    for alone, together in pairs:
        assert together["step"] == alone["step"]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    scores = [json.loads((here / run / "report.json").read_text())["evaluation"] for run in ("alone", "run")]
    for model in ("base", "tuned"):
        assert scores[1][model] == pytest.approx(scores[0][model], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_machines_run_a_recipe_like_one(strategy, here, recipe, start):
    machines = [start(rank, "--strategy", strategy) for rank in (1, 0)]
    assert end_of(*machines) == [0, 0], [machine.log.read_text() for machine in machines]
    assert_undisturbed(here)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killing_and_restarting_a_machine_does_not_change_the_result(strategy, here, recipe, start):
    options = ("--strategy", strategy, "--max-restarts", 2)
    first, second = start(0, *options), start(1, *options)
    wait_for_step(here / "run", 50)
    kill(second)
    second = start(1, *options)
    assert end_of(first, second) == [0, 0], first.log.read_text() + second.log.read_text()
    assert "Restarting all processes" in first.log.read_text()
    assert_undisturbed(here)


@pytest.mark.parametrize("words", ["tuned: loss", "tuned: answers"])
def test_killing_a_machine_that_evaluates_its_shard_does_not_change_the_result(words, here, recipe, start):
    options = ("--strategy", "fsdp", "--set", "train.num_train_epochs=2", "--set", "generation.max_new_tokens=64")
    machines = start(0, *options), start(1, *options)
    wait_for_words(machines[0], words)
    kill(machines[1])
    assert end_of(machines[0]) == [4]
    assert "lost the connection to another process" in machines[0].log.read_text()
    assert end_of(*[start(rank, *options, port=29512) for rank in (0, 1)]) == [0, 0]
    assert invoke("launch", "local", "tiny.yaml", "--processes", 2, *options, "--out", "undisturbed").exit_code == 0
    for folder in ("adapter", "evaluation"):
        for path in (here / "undisturbed" / folder).iterdir():
            assert (here / "run" / folder / path.name).read_bytes() == path.read_bytes()


def test_when_machine_0_is_killed_the_other_ends_and_both_resume_later(here, recipe, start):
    first, second = start(0, "--max-restarts", 2), start(1, "--max-restarts", 2)
    wait_for_step(here / "run", 50)
    kill(first)
    assert end_of(second) == [4]
    assert "lost the connection to another process" in second.log.read_text()
    assert "frame #" not in second.log.read_text()
    machines = start(0, port=29512), start(1, port=29512)
    assert end_of(*machines) == [0, 0], machines[0].log.read_text()
    assert "Resuming from step " in machines[0].log.read_text()
    assert_undisturbed(here)


def test_training_survives_a_cable_cut_for_twenty_seconds(here, recipe, start, cable):
    machines = start(0), start(1)
    wait_for_step(here / "run", 50)
    cable(False)
    seen = len(read_metrics(here / "run"))
    time.sleep(20)
    assert len(read_metrics(here / "run")) <= seen + 2
    cable(True)
    assert end_of(*machines) == [0, 0], machines[0].log.read_text()
    assert_undisturbed(here)


@pytest.mark.parametrize(("rank", "restarts"), [(1, 2), (0, 0)])
def test_sigterm_on_one_machine_saves_on_all(rank, restarts, here, recipe, start):
    machines = [start(one, "--max-restarts", restarts) for one in (0, 1)]
    wait_for_step(here / "run", 50)
    machines[rank].send_signal(signal.SIGTERM)
    assert end_of(*machines) == [143, 143], machines[0].log.read_text() + machines[1].log.read_text()
    assert "a checkpoint is saved" in machines[0].log.read_text()
    assert any(path.name not in ("step-20", "step-40") for path in (here / "run" / "checkpoints").iterdir())


def test_a_run_with_nothing_left_to_do_ends_on_all_machines(here, recipe, start):
    for _ in range(2):
        machines = [start(rank, "--set", "train.num_train_epochs=2") for rank in (0, 1)]
        assert end_of(*machines) == [0, 0], machines[0].log.read_text() + machines[1].log.read_text()
    assert "unchanged, skipped" in machines[0].log.read_text()


def test_a_machine_waits_for_machine_0(here, recipe, start):
    machine, end = start(1), time.monotonic() + WAIT
    while "waiting for machine 0 at 10.77.0.1:29511" not in machine.log.read_text():
        assert time.monotonic() < end, "it never said so"
        time.sleep(0.1)
    time.sleep(3)
    assert machine.poll() is None
