"""`launch slurm`: a job script for sbatch; Slurm queues, kills, and starts again what it preempts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from llmtune.errors import LlmtuneError, RecipeError
from llmtune.launch.job import Job, call, fail_as, unpack_report
from llmtune.records import Json
from llmtune.store.run_folder import REPORTS

INSTALL = "Submit on a machine of the cluster, such as its login node; --dry-run prints the script anywhere."
SAVE_SECONDS = 120
"""How long before its time limit a job is told to save; Slurm may do so up to a minute earlier."""
MOST_REQUEUES = 50
"""Ends what saves no progress between two time limits."""
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

# Slurm sends TERM where it preempts or cancels: llmtune gets it too, saves after its step, and this script waits.
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


def slurm_script(job: Job, options: Mapping[str, str], more: Sequence[str] = (), *, requeue: bool = True) -> str:
    """Return the job script; `options` are sbatch's own by name, `more` whole ones as sbatch reads them.

    Raises RecipeError for an array of jobs.
    """
    if any(option.startswith(("--array", "-a")) for option in more):
        what, fix = (
            "the tasks of an array would all write one run folder",
            "Submit each recipe by itself, or see `llmtune sweep`.",
        )
        raise RecipeError.of(what, "--sbatch", fix)
    log = str(job.folder.absolute()).replace("%", "%%")
    cpus = options.get("cpus-per-task", str(job.topology.processes))
    stated = {
        "job-name": job.name,
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
    if any("\n" in line for line in lines):
        raise RecipeError.of("a line break in a path or an option would end a line of the job script", "launch slurm")
    program, recipe = f"{shlex.quote(sys.executable)} -m llmtune", str(job.loaded.file)
    command = job.command(program, recipe, str(job.folder.absolute()), "$SLURM_PROCID", "$HEAD:$PORT")
    return SCRIPT.format(
        directives="\n".join(lines),
        save_seconds=SAVE_SECONDS,
        address=ADDRESS if job.topology.machines > 1 else "",
        cpus=cpus,
        command=shlex.quote(f"exec {command}"),
        most=MOST_REQUEUES if requeue else 0,
    )


def submit(job: Job, script: str, console: Console) -> Json:
    """Give the script to sbatch; return the job's number and its log. Raises EnvironmentProblem where Slurm refuses."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    number = call(["sbatch", "--parsable"], INSTALL, script).split(";")[0]
    log = f"{job.folder.absolute()}.slurm-{number}.log"
    console.print(f"Job {number} is submitted; its log: {log}\nCancel it: scancel {number}", highlight=False)
    return {"job": number, "log": log, "folder": str(job.folder.absolute())}


def follow(job: Job, sent: Json, console: Console) -> None:
    """Show the job's log and states until it has ended; bring the report here where the run folder is not shared.

    Raises LlmtuneError, with the exit code of the job, where it failed.
    """
    state, seen = "", 0
    while True:
        found = _show(sent["job"])
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


def _show(number: str) -> dict[str, str]:
    shown = call(["scontrol", "show", "job", "-o", number], INSTALL)
    return dict(re.findall(r"(\S+?)=(\S*)", shown))


def _print_new(log: Path, seen: int, console: Console) -> int:
    if log.exists():
        with log.open("rb") as file:
            file.seek(seen)
            new = file.read()
        console.print(new.decode(errors="replace"), end="", markup=False, highlight=False, soft_wrap=True)
        seen += len(new)
    return seen


def _bring_report(job: Job, found: Mapping[str, str], console: Console) -> None:
    """Fetch the report from the disk of the machine that ran the job, through Slurm itself."""
    place = [f"--nodelist={found['BatchHost']}", f"--partition={found['Partition']}", "--nodes=1", "--ntasks=1"]
    pack = ["tar", "-cz", "-C", str(job.folder.absolute()), *REPORTS]
    words = ["srun", "--quiet", "--immediate=60", "--chdir=/", *place, *pack]
    packed = subprocess.run(words, capture_output=True, check=False)  # noqa: S603
    unpack_report(packed.stdout, job.folder, console)


def _failure(sent: Json, state: str, exit_code: str) -> LlmtuneError:
    code = int(exit_code.split(":")[0])
    what = f"job {sent['job']} ended: {state.lower()}, exit code {code}"
    return fail_as(code, what, f"Its log says why: {sent['log']}. The same command again goes on from what is saved.")
