import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console
from support import families
from support.process import Watched
from support.runs import invoke, write_recipe
from support.training import launch_work, make_recipe, read_metrics, run_training, write_examples

from llmtune.errors import DataError, EnvironmentProblem, GateFailed, RecipeError, Stopped
from llmtune.launch import local_processes
from llmtune.launch.local_processes import WorkerBug, _configure, _host_rendezvous, launch
from llmtune.launch.topology import Topology

TESTS = Path(__file__).parents[1]
CLOCKS_APART = 0.5


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    train = {"batch_size": 6, "gradient_checkpointing": True}
    recipe = make_recipe(tmp_path, tiny_llama, train=train)
    result = launch_work("train_tiny", [tmp_path, tmp_path / "two"], Topology(2), console, 2)
    one = run_training(tmp_path / "one", recipe, examples)
    assert result["steps"] == one.steps == 22
    pairs = list(zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True))
    assert len(pairs) == 22  # the last step of an epoch has one row, so one process takes part without any
    for alone, together in pairs[:10]:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    for alone, together in pairs:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        if "validation_loss" in alone:
            assert together["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-4)
    assert {path.name for path in (tmp_path / "two" / "checkpoints").iterdir()} == {"step-11", "step-22"}


@pytest.mark.slow
def test_a_sharded_embedding_model_trains_with_the_precision_of_an_unsharded_one(here):
    rows = [{"query": f"the {word} cat {i}", "passage": f"a {word} fox"} for i, word in enumerate(["red", "blue"] * 20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"task": "embed", "model": {"dtype": "auto"}, "generation": None, "evaluate": None}
    train = {"max_steps": 3, "num_train_epochs": None}
    model = families.build_bert(here / "model")
    write_recipe(here / "embed.yaml", model, "rows.jsonl", data={"deduplicate": "none"}, train=train, **sections)
    for strategy in ("ddp", "fsdp"):
        done = invoke("launch", "local", "embed.yaml", "--processes", 2, "--strategy", strategy, "--out", strategy)
        assert done.exit_code == 0, done.stderr
    losses = [[line["loss"] for line in read_metrics(here / strategy)] for strategy in ("ddp", "fsdp")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # where bfloat16 is fast, weights in it differ by 1e-3


def test_the_command_trains_and_evaluates_in_two_processes_like_in_one_and_leaves_a_complete_run(
    here, tiny_llama, chat_rows
):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train={"eval_metrics": ["accuracy", "chrf"]})
    two = invoke("launch", "local", "tiny.yaml", "--processes", 2, "--out", "two")
    assert two.exit_code == 0, two.stderr
    one = invoke("run", "tiny.yaml", "--out", "one")
    assert one.exit_code == 0, one.stderr
    pairs = list(zip(read_metrics(here / "one"), read_metrics(here / "two"), strict=True))
    assert len(pairs) >= 6
    for alone, together in pairs[:10]:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together.get("validation_metrics") == pytest.approx(alone.get("validation_metrics"), abs=1e-4)
    assert any(line["validation_metrics"] for line in read_metrics(here / "two") if "validation_loss" in line)
    with np.load(here / "one" / "row_losses.npz") as alone, np.load(here / "two" / "row_losses.npz") as together:
        assert (alone["seen"] == together["seen"]).all()
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-3)
    reports = {name: json.loads((here / name / "report.json").read_text()) for name in ("one", "two")}
    assert reports["two"]["adapter"] == reports["one"]["adapter"]
    assert reports["two"]["train"].keys() == reports["one"]["train"].keys()
    for model in ("base", "tuned"):
        scores = [reports[name]["evaluation"][model] for name in ("one", "two")]
        assert scores[1] == pytest.approx(scores[0], rel=1e-4, abs=1e-4)
    steps = {name: json.loads((here / name / "run.json").read_text())["steps"] for name in ("one", "two")}
    for step in ("adapt", "train"):
        assert steps["two"][step]["inputs"] == steps["one"][step]["inputs"]
    adapted, trained = steps["two"]["adapt"], steps["two"]["train"]
    ended = trained["started"] + trained["seconds"] + CLOCKS_APART  # seconds and start times come from different clocks
    assert adapted["started"] + adapted["seconds"] <= ended  # a kill loses no time


@pytest.mark.slow
def test_threads_are_divided_and_the_environment_is_restored(console):
    before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = launch_work("succeed", ["a", "b c"], Topology(2), console, 5)
    assert result == {"heard": ["a", "b c"], "world": 2, "threads": "2"}
    assert (dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_mistake_in_one_process_is_raised_here_with_its_rank(console):
    with pytest.raises(DataError) as caught:
        launch_work(
            "end_rank_one", ["mistake"], Topology(2, max_restarts=1), console
        )  # the mistake would occur again, so it is not retried
    assert caught.value.exit_code == 3
    assert caught.value.problems[0].what == "row 7 has no answer"
    assert caught.value.problems[0].where == "process 1, rows.jsonl:7"
    assert caught.value.problems[0].fix == "Give it one."


def test_rank_0_ends_only_after_the_others_have_read_its_result(console):
    """Rank 0 hosts the store: if it ends first, the others lose their connection after a complete run."""
    assert launch_work("read_late", ["result"], Topology(2), console) == "done"


@pytest.mark.slow
def test_rank_0_ends_only_after_the_others_have_read_its_error(console):
    with pytest.raises(DataError) as caught:
        launch_work("read_late", ["error"], Topology(2), console)
    assert caught.value.problems[0].where == "rows.jsonl:7"


def test_a_failed_gate_keeps_the_report_even_if_rank_0_ends_last(console):
    with pytest.raises(GateFailed, match="a gate failed in rank 0") as caught:
        launch_work("fail_a_gate", [], Topology(2), console)
    assert caught.value.report == {"verdict": "worse"}


def test_a_bug_in_one_process_comes_with_its_traceback(console):
    with pytest.raises(WorkerBug, match=r"process 1 failed:\n(.|\n)*ZeroDivisionError: a bug"):
        launch_work("end_rank_one", ["bug"], Topology(2), console)


@pytest.mark.slow
def test_a_process_killed_by_the_system_is_named(console):
    with pytest.raises(EnvironmentProblem, match="process 1 was killed by SIGKILL") as caught:
        launch_work("end_rank_one", ["SIGKILL"], Topology(2), console)
    assert "ran out of memory" in caught.value.problems[0].fix


@pytest.mark.slow
def test_a_process_stopped_outside_training_is_not_reported_as_a_bug(console):
    with pytest.raises(Stopped, match="stopped by SIGTERM; finished steps and checkpoints are kept"):
        launch_work("end_rank_one", ["SIGTERM"], Topology(2), console)


@pytest.mark.parametrize(
    ("number", "code", "to"),
    [
        (signal.SIGTERM, 143, "parent"),
        pytest.param(signal.SIGINT, 130, "parent", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "worker", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_in_all_workers_and_training_resumes(number, code, to, tmp_path, tiny_llama):
    examples = write_examples(tmp_path / "examples", train=60)
    train = {"num_train_epochs": 200, "save_steps": 10_000, "logging_steps": 1}
    recipe = make_recipe(tmp_path, tiny_llama, train=train)
    parent = start_parent(tmp_path, "train_tiny", stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "run" / "metrics.jsonl")
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) == 2
    (parent if to == "parent" else workers[-1]).send_signal(number)
    out, err = parent.communicate(timeout=120)
    assert parent.returncode == code, err
    assert "a checkpoint is saved" in out
    assert "Traceback" not in err
    assert "torch/distributed" not in err
    assert not [worker for worker in workers if worker.is_running()]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert len(read_metrics(tmp_path / "run")) in (step - 1, step)  # a stop saves before it logs
    stop = Console(file=Watched(f"step {step + 3}/", lambda: os.kill(os.getpid(), number)), width=200)
    with pytest.raises(
        Stopped, match=f"after step {step + 3} of 1600"
    ):  # one process resumes from the checkpoint of two
        run_training(tmp_path / "run", recipe, examples, console=stop)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 4))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_after_a_death_all_processes_restart_from_the_last_checkpoint(strategy, tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=60)
    train = {"num_train_epochs": 10, "save_steps": 5, "logging_steps": 1, "learning_rate": 1e-3}
    recipe = make_recipe(tmp_path, tiny_llama, train=train)
    killed = []

    def kill() -> None:
        _wait_for(tmp_path / "run" / "metrics.jsonl")
        killed.append(psutil.Process().children(recursive=True)[-1])
        killed[0].kill()

    threading.Thread(target=kill).start()
    topology = Topology(2, strategy, max_restarts=1)
    launch_work("train_tiny", [tmp_path, tmp_path / "run", strategy], topology, console, 2)
    assert "ended with exit code -9" in console.file.getvalue()
    run_training(tmp_path / "alone", recipe, examples)
    pairs = list(zip(read_metrics(tmp_path / "alone"), read_metrics(tmp_path / "run"), strict=True))
    for alone, together in pairs:
        assert (together["step"], together["loss"]) == (alone["step"], pytest.approx(alone["loss"], rel=1e-4))


def test_the_last_output_of_a_dead_process_is_shown(console):
    with pytest.raises(EnvironmentProblem, match="process 1 was killed by SIGABRT; its last output:") as caught:
        launch_work("end_rank_one", ["abort"], Topology(2), console)
    assert "the disk is on fire" in str(caught.value)
    assert "Fatal Python error: Aborted" in str(caught.value)


@pytest.mark.parametrize("entry", ["write_and_wait", pytest.param("train_tiny", marks=pytest.mark.slow)])
def test_workers_die_when_their_parent_is_killed(entry, tmp_path, tiny_llama):
    write_examples(tmp_path / "examples", train=60)
    make_recipe(tmp_path, tiny_llama, train={"num_train_epochs": 2000})
    parent = start_parent(tmp_path, entry, stderr=subprocess.DEVNULL)
    _wait_for(tmp_path / "run" / "metrics.jsonl")
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_too_few_gpus_are_an_error_before_rows_are_prepared(here, tiny_llama, chat_rows, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    found = invoke("launch", "local", "tiny.yaml", "--processes", 2, "--out", "run")
    assert found.exit_code == 4, found.stderr
    assert "2 processes, but 1 GPU" in found.stderr
    assert not (here / "run" / "data").exists()


def test_a_port_in_use_and_an_address_of_another_machine_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(local_processes, "TRY_SECONDS", 0.5)
    with socket.create_server(("", 0)) as taken:
        for address, words in ((f"127.0.0.1:{taken.getsockname()[1]}", "in use"), ("192.0.2.1:29533", "")):
            topology = Topology(1, machines=2, address=address)
            with pytest.raises(EnvironmentProblem, match=f"--address {address}: cannot listen: .*{words}"):
                launch(["-c", ""], topology, Console(quiet=True))


def listening(process=None):
    """Return the addresses at which a process listens."""
    connections = psutil.Process(process).net_connections("inet")
    return {(one.laddr.ip, one.laddr.port) for one in connections if one.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("address", ["127.0.0.2:29534", "localhost:29535", "[::1]:29536"])
def test_machines_meet_at_the_named_address_only(address):
    if "::" in address and not socket.has_dualstack_ipv6():
        pytest.skip("takes IPv6")
    output, before = io.StringIO(), listening()
    topology = Topology(1, machines=3, address=address)
    store = _host_rendezvous(topology, Console(file=output, width=200))
    ((ip, port),) = listening() - before
    assert ip_address(ip).is_loopback
    assert port == topology.port
    assert f"waiting for 2 more at {f'[{ip}]' if ':' in ip else ip}:{port}, at this address only" in output.getvalue()
    assert "only trusted machines may reach this port" in output.getvalue()
    del store
    assert _configure(topology, "", "").rdzv_configs["is_host"] is False


def test_a_name_that_is_a_loopback_address_here_listens_everywhere_and_is_reported(monkeypatch):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 29537))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **options: answer)
    output = io.StringIO()
    store = _host_rendezvous(Topology(1, machines=2, address="node-7:29537"), Console(file=output, width=200))
    assert "on all interfaces, because node-7 is 127.0.1.1 here: better give its IP address" in output.getvalue()
    del store


@pytest.mark.slow
def test_the_store_of_the_processes_listens_at_their_address_only(console):
    heard = launch_work("name_listeners", [], Topology(2), console)
    assert {ip for ip, _ in heard["listening"]} <= {"127.0.0.1"}
    assert heard["listening"]


@pytest.mark.slow
def test_data_posted_by_a_stranger_is_never_executed(console, tmp_path):
    with pytest.raises(WorkerBug, match="process 1 failed"):
        launch_work("post_code", [tmp_path], Topology(2), console)
    assert not (tmp_path / "pwned").exists()


def test_on_one_machine_the_rendezvous_opens_no_port(tmp_path):
    config = _configure(Topology(2), str(tmp_path), "127.0.0.1")
    assert (config.rdzv_configs["store_type"], Path(config.rdzv_endpoint).parent) == ("file", tmp_path)


@pytest.mark.slow
def test_a_process_with_another_recipe_is_refused(here, tiny_llama, chat_rows, console):
    recipe = write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    with pytest.raises(RecipeError, match=r"process 1, recipe with its --set: .* here, .* in process 0"):
        launch_work("agree_on_a_recipe", [recipe], Topology(2), console)


@pytest.mark.slow
def test_a_single_process_can_be_launched_too(console):
    assert launch_work("succeed", [], Topology(1), console, 3) == {"heard": [], "world": 1, "threads": "3"}


PARENT = """
import sys
from rich.console import Console
from llmtune.errors import LlmtuneError
from llmtune.launch.local_processes import launch
from llmtune.launch.topology import Topology
try:
    launch(["-m", "support.workers", "/dev/null", *sys.argv[1:]], Topology(2), Console(stderr=True))
except LlmtuneError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start_parent(folder: Path, entry: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PARENT, entry, str(folder), str(folder / "run")], **options)


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists() or path.stat().st_size < 1000:
        assert time.monotonic() < end, "training never began"
        time.sleep(0.05)
