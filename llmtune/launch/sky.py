"""`launch sky`: a managed job of SkyPilot, which finds machines in a cloud and starts again on others what it loses."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from llmtune import __version__
from llmtune.errors import Problem, RecipeError
from llmtune.launch.job import Job, check_secrets, fail_as, read_log, require_command, to_yaml, with_report
from llmtune.model.catalogue import candidate_names
from llmtune.recipe.builtin import recipes_folder
from llmtune.records import SPLITS, Json

INSTALL = 'pip install "llmtune-cli[sky]", or SkyPilot in an environment of its own; then: sky check'
RUNS = "/llmtune-runs"
"""Where the storage is mounted."""


def sky_task(
    job: Job, resources: Mapping[str, object], *, storage: str | None, secrets: Sequence[str], setup: str | None
) -> Json:
    """Return the task as SkyPilot reads it: this folder goes along, and the run folder lies on the storage.

    Raises RecipeError where the recipe or something that it names is outside this folder, or for several machines.
    """
    if job.topology.machines > 1:
        what = f"{job.topology.machines} machines need a folder that all of them see, which a bucket is not"
        raise RecipeError.of(what, "--machines", "Take one machine with more GPUs: --gpus H100:8 --processes 8.")
    recipe = _inside(job)
    folder = f"{RUNS if storage else 'runs'}/{job.folder.name}"
    command = job.command("llmtune", recipe, folder)
    task: Json = {
        "name": job.slug,
        "workdir": ".",
        "resources": {name: value for name, value in resources.items() if value is not None},
        "setup": setup or f"pip install llmtune-cli=={__version__}",
        "run": with_report(command, folder),
    }
    if secrets:
        task["secrets"] = dict.fromkeys(secrets)
    if storage:  # cached: a plain mount knows no renaming, and checkpoints are renamed when they are whole
        task["file_mounts"] = {RUNS: {"source": storage, "mode": "MOUNT_CACHED"}}
    return task


def _inside(job: Job) -> str:
    """Return the recipe's name as it is there: relative to this folder, or that of a shipped recipe."""
    here, file = Path.cwd(), job.loaded.file
    if job.shipped:
        return job.shipped
    recipe = job.loaded.recipe
    paths: list[str | None] = [source.path for split in SPLITS for source in recipe.data.sources(split)]
    paths += [recipe.model.name, *candidate_names(recipe), recipe.model.chat_template, recipe.adapter.start_from]
    paths += [os.path.abspath(job.options[job.options.index("--lock") + 1])] if "--lock" in job.options else []
    RecipeError.collect(
        Problem("is outside this folder, which is what SkyPilot takes along", path, "Start from a folder above it.")
        for path in (str(file), *paths)
        if path and os.path.isabs(path) and not any(map(Path(path).is_relative_to, (here, recipes_folder())))
    )
    return str(file.relative_to(here))


def submit(task: Json, secrets: Sequence[str], console: Console) -> Json:
    """Give the task to `sky jobs launch`. Raises EnvironmentProblem where SkyPilot is missing or refuses."""
    check_secrets(secrets, here=True)
    require_command("sky", INSTALL)
    named = [word for name in secrets for word in ("--secret", name)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(to_yaml(task))
        file.flush()
        words = ["sky", "jobs", "launch", "--yes", "--detach-run", *named, file.name]
        code = subprocess.run(words, stdout=2, check=False).returncode  # noqa: S603
    if code:
        raise fail_as(4, f"sky jobs launch ended with exit code {code}", "Its last lines say why.")
    console.print(f"Job {task['name']} is submitted. Cancel it: {cancel(task)}", highlight=False)
    return {"job": task["name"]}


def cancel(task: Json) -> str:
    """Return the command that cancels the job."""
    return f"sky jobs cancel --name {task['name']}"


def follow(job: Job, task: Json, console: Console) -> None:
    """Show the job's log until it has ended, over machines that are lost; unpack the report into the run folder here.

    Raises LlmtuneError, with the exit code of the job, where it failed.
    """
    words = ["sky", "jobs", "logs", "--name", task["name"], "--follow", "--tail", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, errors="replace") as logs:  # noqa: S603
        assert logs.stdout is not None
        code = read_log(logs.stdout, job.folder, console)
    if code or logs.returncode:
        what = f"job {task['name']} ended with exit code {code or logs.returncode}"
        raise fail_as(code or 4, what, f"Its log says why: {' '.join(words[:5])}")
