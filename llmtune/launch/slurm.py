"""`launch slurm`: submit a job script with sbatch; Slurm queues the job, and restarts it after a preemption."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from llmtune.data.run_naming import default_folder
from llmtune.errors import EnvironmentProblem, RecipeError, describe_end
from llmtune.launch.recipe_check import check_recipe
from llmtune.launch.topology import Topology, why_not
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.records import Json
from llmtune.store.process_environment import prepare_environment
from llmtune.store.run_folder import peek_run
from llmtune.store.run_lock import read_pins
from llmtune.store.run_request import RunRequest

INSTALL = "Submit on a machine of the cluster, such as its login node; --dry-run prints the script anywhere."
SAVE_SECONDS = 120
"""Seconds before its time limit at which a job is told to save; Slurm may signal up to a minute earlier."""
MOST_REQUEUES = 50
"""Limit for jobs that make no progress between two time limits."""
SCRIPT = """\
#!/bin/bash
{directives}

# Slurm sends TERM when it preempts or cancels. llmtune gets it too and saves after its step; this script waits.
trap : TERM
# USR1 comes {save_seconds} seconds before the time limit: save, then queue the job again.
trap 'late=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
{address}srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c {command} &
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


def slurm_script(job: SlurmJob, options: Sequence[str] = (), *, requeue: bool = True) -> str:
    """Return the job script; `options` are sbatch options, which replace those of llmtune.

    Raises RecipeError for an array of jobs.
    """
    if any(option.startswith(("--array", "-a")) for option in options):
        what, fix = (
            "the tasks of an array would all write to the same run folder",
            "Submit each recipe separately, or with another --out.",
        )
        raise RecipeError.of(what, "--sbatch", fix)
    log = str(job.folder.absolute()).replace("%", "%%")
    stated = {
        "job-name": job.loaded.recipe.name,
        "nodes": str(job.topology.machines),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.topology.processes),
        "output": f"{log}.slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{SAVE_SECONDS}",
    }
    lines = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in stated.items()]
    lines += [f"#SBATCH --{'requeue' if requeue else 'no-requeue'}", *(f"#SBATCH {option}" for option in options)]
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


def call_scheduler(words: Sequence[str], stdin: str | None = None) -> str:
    """Run a command of Slurm and return its output.

    Raises EnvironmentProblem if it is not installed or fails.
    """
    if shutil.which(words[0]) is None:
        raise EnvironmentProblem.of(f"command {words[0]} not found", words[0], INSTALL)
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"{words[0]} {describe_end(done.returncode)}"
        raise EnvironmentProblem.of(message, words[0], "Fix what Slurm refused; --dry-run prints the job script.")
    return done.stdout.strip()
