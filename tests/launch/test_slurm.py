import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import invoke, llmtune, write_recipe, write_sums
from support.training import read_metrics

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PLACES = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
"""Where distributions put daemons."""

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
SLURM_CONF = """
ClusterName=llmtune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
KillWait=60
MinJobAge=600
ReturnToService=2
{nodes}
PartitionName=spot Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Return which parts of Slurm are not installed, as the reason to skip a test."""
    lacking = [name for name in DAEMONS if shutil.which(name, path=PLACES) is None]
    return f"no {', '.join(lacking)}: apt-get install slurmctld slurmd slurm-client munge" if lacking else None


@contextlib.contextmanager
def cluster(folder: Path, *, machines: int = 1, private: Path | None = None) -> Iterator[dict[str, str]]:
    """Start the cluster; yield the environment in which Slurm's commands find it.

    Of two machines, both are this one under its two names. `private` becomes a disk of the machine that runs jobs,
    which nobody else sees.
    """
    host, user = socket.gethostname().split(".")[0], os.environ.get("USER") or subprocess.getoutput("id -un")
    names = [host, "localhost"][:machines]
    for path in (folder, folder / "state", *(folder / f"spool.{name}" for name in names)):
        path.mkdir(mode=0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    control, *ports = _free_ports(1 + machines)
    nodes = [
        NODE.format(name=name, host=host, port=port, cpus=2 // machines)
        for name, port in zip(names, ports, strict=True)
    ]
    conf = SLURM_CONF.format(host=host, user=user, folder=folder, port=control, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    environment = {**os.environ, "PATH": PLACES, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    with contextlib.ExitStack() as stack:
        hidden = (
            []
            if private is None
            else ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {private}; exec "$@"', "-"]
        )
        slurmds = [[*hidden, "slurmd", "-D", "-N", name] for name in names]
        for words in (munged, ["slurmctld", "-D", "-i"], *slurmds):
            stack.enter_context(_daemon(words, environment, folder))
        _wait_until_idle(environment, folder)
        yield environment


@contextlib.contextmanager
def _daemon(words: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with (folder / f"{words[0]}.out").open("ab") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        time.sleep(0.5)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 30
    while True:
        found = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
        )
        if found.returncode == 0 and set(found.stdout.split()) == {"idle"}:
            return
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            raise AssertionError(f"the cluster never came up: {found.stdout}{found.stderr}\n{logs}")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


LONG = {"num_train_epochs": 40, "save_steps": 100_000, "logging_steps": 1}
needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_a_dry_run_prints_a_valid_bash_and_slurm_script(here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    lock = {"model": {"name": str(tiny_llama), "revision": None, "sha256": "0"}, "data": {"sha256": "0"}}
    lock |= {"fingerprint": "0", "template": {}, "packages": {}, "seed": 7, "threads": 1, "hardware": {}}
    (here / "llmtune.lock").write_text(json.dumps(lock))
    options = [f"--sbatch=--{one}" for one in ("partition=gpu", "time=2:00:00", "gpus-per-node=8", "exclude=n3")]
    result = invoke(
        *("launch", "slurm", "tiny.yaml", "--dry-run", "--processes", 8, "--machines", 4, "--strategy", "fsdp"),
        *("--out", "run 1%", "--lock", here / "llmtune.lock", "--set", "train.learning_rate=2e-3", *options),
    )
    assert result.exit_code == 0, result.stderr
    script = result.stdout
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=True).returncode == 0
    directives = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=4", "--cpus-per-task=8", "--partition=gpu", "--time=2:00:00", "--requeue"} <= directives
    assert {"--gpus-per-node=8", "--exclude=n3", "--job-name=tiny"} <= directives
    (started,) = [line for line in script.splitlines() if line.startswith("srun")]
    words = shlex.split(shlex.split(started.removesuffix(" &"))[-1])
    given = dict(itertools.pairwise(words))
    assert (given["--out"], given["--lock"]) == (str(here / "run 1%"), "llmtune.lock")
    assert f"#SBATCH --output='{here}/run 1%%.slurm-%j.log'" in script
    assert given["--set"] == "train.learning_rate=2e-3"
    assert (given["--processes"], given["--machines"], given["--strategy"]) == ("8", "4", "fsdp")
    assert (given["--rank"], given["--address"]) == ("$SLURM_PROCID", "$HEAD:$PORT")
    assert not list(here.glob("run*"))


def test_the_folder_is_decided_when_the_job_is_submitted(here, tiny_llama):
    write_recipe(here / "tiny.yaml", tiny_llama, write_sums(here / "weekly.jsonl"))

    def folder() -> str:
        script = invoke("launch", "slurm", "tiny.yaml", "--dry-run").stdout
        (place,) = set(re.findall(r"--out (\S+)", script))
        return place

    before = folder()
    assert re.fullmatch(rf"{re.escape(str(here))}/runs/tiny-[0-9a-f]{{8}}", before)
    assert folder() == before
    write_sums(here / "weekly.jsonl", 41)
    assert folder() != before


EVIL = "a'; touch pwned; echo $(touch pwned) `touch pwned` ${HOME} \\"
STAND_INS = {"srun": 'shift; exec "$@"', "scontrol": "echo localhost", "python": 'printf "%s\\0" "$@" >words'}
"""srun runs its command, and llmtune leaves the words that it got."""


def test_recipe_text_never_becomes_a_line_of_the_script(here, tiny_llama, chat_rows, monkeypatch):
    for name, body in STAND_INS.items():
        (here / name).write_text(f"#!/bin/sh\n{body}\n")
        (here / name).chmod(0o755)
    monkeypatch.setattr("llmtune.launch.slurm.sys.executable", str(here / "python"))
    system = f"{EVIL}\nEOF\ntouch pwned\n"
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, data={"system_prompt": system})
    with (here / "tiny.yaml").open("a") as file:
        file.write("# touch pwned\n")
    words = ["--set", f"data.system_prompt={EVIL}", "--out", f"run {EVIL.replace('/', '')}"]
    result = invoke("launch", "slurm", "tiny.yaml", "--dry-run", "--machines", 2, *words)
    assert result.exit_code == 0, result.stderr
    assert not any(line.strip() == "touch pwned" for line in result.stdout.splitlines())
    environment = {"PATH": f"{here}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}
    done = subprocess.run(["bash"], input=result.stdout, text=True, cwd=here, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not (here / "pwned").exists()
    got = (here / "words").read_text().split("\0")
    assert got[got.index("--set") + 1] == words[1]
    assert got[got.index("--out") + 1] == str(here / words[3])


@pytest.mark.parametrize("words", [("--set", "data.system_prompt=a\nEOF\ntouch pwned"), ("--sbatch", "--comment=a\rb")])
def test_a_line_break_in_an_option_is_refused(words, here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    result = invoke("launch", "slurm", "tiny.yaml", "--dry-run", *words)
    assert (result.exit_code, "would end a line of the job script" in result.stderr) == (2, True)


def test_a_job_array_that_would_share_one_run_folder_is_refused(here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    for option in ("--array=1-3", "-a1-3"):
        result = invoke("launch", "slurm", "tiny.yaml", "--dry-run", f"--sbatch={option}")
        assert (result.exit_code, "tasks of an array" in result.stderr) == (2, True)


def test_a_mistake_in_the_recipe_is_found_before_submitting(here, tiny_llama):
    write_recipe(here / "tiny.yaml", tiny_llama, here / "missing.jsonl")
    result = invoke("launch", "slurm", "tiny.yaml")
    assert result.exit_code == 3
    assert "missing.jsonl" in result.stderr


def test_without_slurm_the_error_says_what_to_do(here, tiny_llama, chat_rows, monkeypatch):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    monkeypatch.setenv("PATH", str(here))
    result = invoke("launch", "slurm", "tiny.yaml")
    assert result.exit_code == 4
    assert "command sbatch not found" in result.stderr
    assert "login node" in result.stderr


@pytest.mark.slow
@needs_slurm
def test_a_job_preempted_and_requeued_by_slurm_ends_with_the_adapter_of_the_local_run(here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train=LONG)
    with cluster(here / "slurm") as environment:
        job = _launch(here, environment, "--out", "run")
        _wait(lambda: _lines(here / "run") > 20, job)
        subprocess.run(["sbatch", "-p", "urgent", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 1"], env=environment)
        _, err = job.communicate(timeout=240)
        assert job.returncode == 0, err
        shown = subprocess.run(["scontrol", "show", "job", "1"], env=environment, capture_output=True, text=True)
    assert "Restarts=1" in shown.stdout
    assert "stopped by SIGTERM" in (here / "run.slurm-1.log").read_text()
    local = llmtune("launch", "local", "tiny.yaml", "--threads", 1, "--out", "local", cwd=here)
    assert local.returncode == 0, local.stderr
    adapters = [(here / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "local")]
    assert adapters[0] == adapters[1]
    assert [line["loss"] for line in read_metrics(here / "run")] == [x["loss"] for x in read_metrics(here / "local")]


@pytest.mark.slow
@needs_slurm
def test_a_cancelled_or_failed_job_ends_the_command_with_its_exit_code(here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train=LONG)
    with cluster(here / "slurm") as environment:
        job = _launch(here, environment, "--out", "run")
        _wait(lambda: _lines(here / "run") > 5, job)
        subprocess.run(["scancel", "1"], env=environment, check=True)
        _, err = job.communicate(timeout=120)
        assert job.returncode == 143, err
        assert "a checkpoint is saved" in (here / "run.slurm-1.log").read_text()
        sets = ("--set", "evaluate.gates=[exact_match >= 2.0]", "--set", "train.max_steps=2")
        failing = _launch(here, environment, "--out", "other", *sets)
        _, err = failing.communicate(timeout=240)
        assert failing.returncode == 6, err


@pytest.mark.slow
@needs_slurm
def test_two_machines_of_a_cluster_train_like_one(here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    with cluster(here / "slurm", machines=2) as environment:
        job = _launch(here, environment, "--machines", "2", "--out", "two")
        _, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    one = invoke("train", "tiny.yaml", "--out", "one")
    assert one.exit_code == 0, one.stderr
    pairs = list(zip(read_metrics(here / "one"), read_metrics(here / "two"), strict=True))
    assert len(pairs) >= 6
    for alone, together in pairs:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    report = json.loads((here / "two" / "report.json").read_text())
    assert report["train"]["steps"] == len(pairs)


def _launch(folder: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """Start sbatch, which ends with the exit code of the job."""
    words = [sys.executable, "-m", "llmtune", "launch", "slurm", "tiny.yaml", "--threads", "1", "--dry-run", *options]
    script = subprocess.run(words, cwd=folder, env=environment, text=True, capture_output=True, check=True).stdout
    (folder / "job.sh").write_text(script)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(["sbatch", "--wait", "job.sh"], cwd=folder, env=environment, text=True, **streams)


def _lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def _wait(reached: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end, "training never began"
        time.sleep(0.05)
