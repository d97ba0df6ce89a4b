"""`launch slurm`: submit a job script with sbatch; Slurm queues the job, and restarts it after a preemption."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from llmtune.data.run_naming import default_folder
from llmtune.errors import BY_EXIT_CODE, EnvironmentProblem, LlmtuneError, Problem, RecipeError, Stopped
from llmtune.launch.recipe_check import check_recipe
from llmtune.launch.topology import Topology, why_not
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.records import Json
from llmtune.store.process_environment import prepare_environment
from llmtune.store.run_folder import REPORTS, peek_run
from llmtune.store.run_lock import read_pins
from llmtune.store.run_request import RunRequest

INSTALL = "Submit on a machine of the cluster, such as its login node; --dry-run prints the script anywhere."
SAVE_SECONDS = 120
"""Seconds before its time limit at which a job is told to save; Slurm may signal up to a minute earlier."""
MOST_REQUEUES = 50
"""Limit for jobs that make no progress between two time limits."""
POLL_SECONDS = 2.0
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
SCRIPT = """\
#!/bin/bash
{directives}

# Slurm sends TERM when it preempts or cancels. llmtune gets it too and saves after its step; this script waits.
trap : TERM
# USR1 comes {save_seconds} seconds before the time limit: save, then queue the job again.
trap 'late=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
{address}srun --cpus-per-task={cpus} bash -c {command} &
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
if [ -n "$late" ] && [ $code -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
  scontrol requeue "$SLURM_JOB_ID"; sleep 60
fi
exit $code
"""
ADDRESS = """\
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) PORT=$((29500 + SLURM_JOB_ID % 1000))
"""


@dataclass(frozen=True)
class SlurmJob:
    """A recipe to run on a scheduler."""

    loaded: LoadedRecipe
    folder: Path
    """The run folder."""
    topology: Topology
    options: tuple[str, ...] = ()
    """Further options of `launch local`, such as `--set` and its value."""


def plan_job(recipe: str, sets: Sequence[str], request: RunRequest, topology: Topology) -> SlurmJob:
    """Check a recipe as `launch local` would, and plan its job; raises the LlmtuneErrors that `launch local` would."""
    loaded = load_recipe(recipe, sets)
    RecipeError.collect(why_not(topology.strategy, loaded.recipe))
    lock = None
    if request.lock is not None:
        read_pins(request.lock)
        lock = Path(os.path.relpath(request.lock))  # relative to the folder from which the job is submitted
    check_recipe(loaded, trains=True)
    prepare_environment(network=not request.offline)
    folder = request.out or default_folder(loaded)  # decided here: a restarted job continues in the same folder
    peek_run(folder, loaded.fingerprint)
    stated = [word for one in sets for word in ("--set", one)]
    return SlurmJob(loaded, folder, topology, (*stated, *replace(request, out=None, lock=lock).words()))


def slurm_script(job: SlurmJob, options: Mapping[str, str], more: Sequence[str] = (), *, requeue: bool = True) -> str:
    """Return the job script; `options` are sbatch options by name, `more` are literal sbatch options.

    Raises RecipeError for an array of jobs.
    """
    if any(option.startswith(("--array", "-a")) for option in more):
        what, fix = (
            "the tasks of an array would all write to the same run folder",
            "Submit each recipe separately, or see `llmtune sweep`.",
        )
        raise RecipeError.of(what, "--sbatch", fix)
    log = str(job.folder.absolute()).replace("%", "%%")
    cpus = options.get("cpus-per-task", str(job.topology.processes))
    stated = {
        "job-name": job.loaded.recipe.name,
        "nodes": str(job.topology.machines),
        "ntasks-per-node": "1",
        "cpus-per-task": cpus,
        "output": f"{log}.slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{SAVE_SECONDS}",
        **options,
    }
    lines = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in stated.items()]
    lines += [f"#SBATCH --{'requeue' if requeue else 'no-requeue'}", *(f"#SBATCH {option}" for option in more)]
    where = job.topology
    words = [
        sys.executable,
        "-m",
        "llmtune",
        "launch",
        "local",
        str(job.loaded.file),
        "--out",
        str(job.folder.absolute()),
    ]
    words += ["--processes", str(where.processes), "--strategy", where.strategy]
    words += ["--fsdp-offload-params"] if where.offload_params else []
    command = shlex.join([*words, "--max-restarts", str(where.max_restarts), *job.options])
    if where.machines > 1:
        command += f' --machines {where.machines} --rank "$SLURM_PROCID" --address "$HEAD:$PORT"'
    if broken := [one for one in (*lines, command) if len(one.splitlines()) > 1]:
        what = f"a line break in {broken[0]!r} would end a line of the job script"
        raise RecipeError.of(what, "launch slurm", "Write the value into the recipe file, or rename the file.")
    return SCRIPT.format(
        directives="\n".join(lines),
        save_seconds=SAVE_SECONDS,
        address=ADDRESS if job.topology.machines > 1 else "",
        cpus=cpus,
        command=shlex.quote(f"exec {command}"),
        most=MOST_REQUEUES if requeue else 0,
    )


def submit(job: SlurmJob, script: str, console: Console) -> Json:
    """Submit the script with sbatch; return the job's number and log. Raises EnvironmentProblem if Slurm refuses."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    number = call_scheduler(["sbatch", "--parsable"], script).split(";")[0]
    log = f"{job.folder.absolute()}.slurm-{number}.log"
    console.print(f"Submitted job {number}; its log: {log}\nCancel it: scancel {number}", highlight=False)
    return {"job": number, "log": log, "folder": str(job.folder.absolute())}


def follow_job(job: SlurmJob, sent: Json, console: Console) -> None:
    """Show the job's log and states until it ends; fetch the report if the run folder is not shared.

    Raises LlmtuneError with the exit code of the job if it failed.
    """
    state, seen = "", 0
    while True:
        found = _job_record(sent["job"])
        seen = _print_new(Path(sent["log"]), seen, console)
        if found["JobState"] != state:
            state = found["JobState"]
            reason = f" ({found['Reason']})" if found["Reason"] != "None" else ""
            console.print(f"Job {sent['job']}: {state.lower()}{reason}", highlight=False, markup=False)
        if state in ENDED:
            break
        time.sleep(POLL_SECONDS)
    _print_new(Path(sent["log"]), seen, console)
    if not (job.folder / REPORTS[0]).exists() and found.get("BatchHost"):
        _bring_report(job, found, console)
    if state != "COMPLETED":
        raise _failure(sent, state, found["ExitCode"])


def call_scheduler(words: Sequence[str], stdin: str | None = None) -> str:
    """Run a command of Slurm and return its output.

    Raises EnvironmentProblem if it is not installed or fails.
    """
    if shutil.which(words[0]) is None:
        raise EnvironmentProblem.of(f"command {words[0]} not found", words[0], INSTALL)
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise EnvironmentProblem.of(said, words[0], "Fix what Slurm refused; --dry-run prints the job script.")
    return done.stdout.strip()


def _job_record(number: str) -> dict[str, str]:
    shown = call_scheduler(["scontrol", "show", "job", "-o", number])
    return dict(re.findall(r"(\S+?)=(\S*)", shown))


def _print_new(log: Path, seen: int, console: Console) -> int:
    if log.exists():
        with log.open("rb") as file:
            file.seek(seen)
            new = file.read()
        console.print(new.decode(errors="replace"), end="", markup=False, highlight=False, soft_wrap=True)
        seen += len(new)
    return seen


def _bring_report(job: SlurmJob, found: Mapping[str, str], console: Console) -> None:
    """Fetch the report from the disk of the machine that ran the job, through Slurm itself."""
    place = [f"--nodelist={found['BatchHost']}", f"--partition={found['Partition']}", "--nodes=1", "--ntasks=1"]
    pack = ["tar", "-cz", "-C", str(job.folder.absolute()), *REPORTS]
    words = ["srun", "--quiet", "--immediate=60", "--chdir=/", *place, *pack]
    packed = subprocess.run(words, capture_output=True, check=False)  # noqa: S603
    try:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout), mode="r:gz") as archive:
            members = [member for member in archive if member.name in REPORTS and member.isfile()]
            job.folder.mkdir(parents=True, exist_ok=True)
            archive.extractall(job.folder, members, filter="data")
    except (tarfile.TarError, EOFError, OSError):
        return
    if members:
        console.print(f"Fetched the report: {job.folder / REPORTS[0]}", markup=False, highlight=False)


def _failure(sent: Json, state: str, exit_code: str) -> LlmtuneError:
    """Return the error that makes this command end with the exit code of the job."""
    code = int(exit_code.split(":")[0])
    what = f"job {sent['job']} ended: {state.lower()}, exit code {code}"
    problem = Problem(what, fix=f"See its log: {sent['log']}. Run the same command again to resume.")
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return Stopped(problem, signal_number=code - 128)
    return BY_EXIT_CODE.get(code, EnvironmentProblem)(problem)
