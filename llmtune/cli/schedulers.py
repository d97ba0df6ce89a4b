"""`launch slurm`, `sky` and `kubernetes`: `launch local` where a scheduler says; what they share stands here once."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtune.cli.options import AsJson, Lock, ModelName, Offline, Out, Quiet, RecipeArgument, Sets, Threads
from llmtune.cli.output_streams import handled, print_json, print_text, stderr_console
from llmtune.cli.run import MaxRestarts, Processes, Strategy, launch_app
from llmtune.errors import Problem, RecipeError, Stopped
from llmtune.records import Json

if TYPE_CHECKING:
    from llmtune.launch.job import Job

app = launch_app
Option = tuple[Any, Any]
"""An annotation for typer and a default."""


def _text(name: str, help: str) -> Option:
    return Annotated[str | None, typer.Option(f"--{name}", help=help)], None


SHARED: dict[str, Option] = {
    "recipe": (RecipeArgument, inspect.Parameter.empty),
    "processes": (Processes, 1),
    "strategy": (Strategy, "ddp"),
    "machines": (Annotated[int, typer.Option("--machines", min=1, help="How many, with --processes on each.")], 1),
    "max_restarts": (MaxRestarts, 0),
    "out": (Out, None),
    "sets": (Sets, None),
    "model": (ModelName, None),
    "lock": (Lock, None),
    "threads": (Threads, None),
    "offline": (Offline, False),
    "dry_run": (Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and stop.")], False),
    "follow": (Annotated[bool, typer.Option("--follow", help="Show the log to the end, end as the job does.")], False),
    "quiet": (Quiet, False),
    "as_json": (AsJson, False),
}
SLURM = {
    "partition": "Partition.",
    "account": "Account that pays.",
    "qos": "Quality of service.",
    "time": "Time limit, such as 2:00:00; two minutes before it the job saves and is queued again.",
    "gres": "Generic resources of each machine, such as gpu:8.",
    "gpus-per-node": "GPUs of each machine.",
    "cpus-per-task": "CPUs of each machine (default: one for each process).",
    "mem": "Memory of each machine, such as 64G.",
    "constraint": "Features that machines must have.",
}
"""Options of sbatch that have names of their own here; the others go by --sbatch."""
SKY = {
    "infra": "Where: a cloud, cloud/region, k8s/context ... (default: the cheapest that has it).",
    "gpus": "GPUs of each machine, such as H100:8.",
    "cpus": "CPUs of each machine, such as 8+.",
    "memory": "Gigabytes of memory of each machine, such as 64+.",
}
KUBERNETES = {
    "namespace": "Namespace (default: that of your context).",
    "gpus": "GPUs of each machine.",
    "cpu": "CPUs of each machine.",
    "memory": "Memory of each machine, such as 64Gi.",
}
STORAGE = "Where the run folder lies, so that a job that was lost goes on: {}. Without it, it starts over."


def _flag(name: str, help: str, default: bool) -> Option:
    return Annotated[bool, typer.Option(name, help=help)], default


def _several(name: str, metavar: str, help: str) -> Option:
    return Annotated[list[str] | None, typer.Option(f"--{name}", metavar=metavar, help=help)], None


def _command(name: str, summary: str, own: Mapping[str, Option], start: Callable[..., Json]) -> None:
    """Add a command to `llmtune launch`: `start` gets the job, the console and `given`, all options by name."""

    def command(**given: Any) -> None:
        from llmtune.launch.job import check_secrets

        console = stderr_console(quiet=given["quiet"])
        given["secrets"] = given.get("secrets") or []
        check_secrets(given["secrets"], here=False)
        sent = start(_job(given), console, given)
        if given["as_json"]:
            print_json(sent)
        elif given["dry_run"]:
            print_text(sent["sent"])

    command.__doc__, command.__name__ = summary, name
    shown = handled(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    options = {**SHARED, **own}
    shown.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(key, kind, default=default, annotation=hint) for key, (hint, default) in options.items()]
    )
    shown.__annotations__ = {key: hint for key, (hint, _) in options.items()}
    app.command(name)(shown)


def _job(given: Mapping[str, Any]) -> Job:
    from llmtune.launch.job import Job
    from llmtune.launch.topology import Topology, why_not
    from llmtune.recipe.loader import load_recipe
    from llmtune.store.run_folder import default_path
    from llmtune.store.run_lock import read_pins

    sets = [*(given["sets"] or []), *([f"model.name={json.dumps(given['model'])}"] if given["model"] else [])]
    loaded = load_recipe(given["recipe"], sets)
    options = [word for one in sets for word in ("--set", one)]
    if given["lock"]:
        read_pins(given["lock"])
        options += ["--lock", os.path.relpath(given["lock"])]
    options += ["--threads", str(given["threads"])] if given["threads"] else []
    options += ["--offline"] if given["offline"] else []
    folder: Path = given["out"] or default_path(loaded.recipe.name, loaded.fingerprint)
    processes, machines = given["processes"], given["machines"]
    address = "HOST:1" if machines > 1 else None  # what it will be is known there
    topology = Topology(processes, given["strategy"], machines, 0, address, given["max_restarts"])
    RecipeError.collect(why_not(topology.strategy, loaded.recipe))
    return Job(loaded, folder, topology, tuple(options))


def _follow(what: str, cancel: str, follow: Callable[[], None]) -> None:
    try:
        follow()
    except KeyboardInterrupt as stop:
        number = 15 if type(stop) is not KeyboardInterrupt else 2
        problem = Problem(f"stopped following; {what} goes on", fix=f"To cancel it: {cancel}")
        raise Stopped(problem, signal_number=number) from None


def _slurm(job: Job, console: Any, given: Mapping[str, Any]) -> Json:
    from llmtune.launch.recipe_check import check_recipe
    from llmtune.launch.slurm import follow, slurm_script, submit
    from llmtune.store.run_folder import peek_run

    peek_run(job.folder, job.loaded.fingerprint)
    check_recipe(job.loaded)
    options = {name: given[name.replace("-", "_")] for name in SLURM if given[name.replace("-", "_")]}
    script = slurm_script(job, options, given["sbatch"] or [], requeue=given["requeue"])
    if given["dry_run"]:
        return {"sent": script, "folder": str(job.folder)}
    sent = submit(job, script, console)
    if given["follow"]:
        _follow(f"job {sent['job']}", f"scancel {sent['job']}", lambda: follow(job, sent, console))
    return sent


def _sky(job: Job, console: Any, given: Mapping[str, Any]) -> Json:
    from llmtune.launch.job import to_yaml
    from llmtune.launch.recipe_check import check_recipe
    from llmtune.launch.sky import cancel, follow, sky_task, submit

    check_recipe(job.loaded)
    resources = {"accelerators" if name == "gpus" else name: given[name] for name in SKY}
    secrets = given["secrets"]
    task = sky_task(
        job,
        resources | {"use_spot": given["use_spot"]},
        storage=given["storage"],
        secrets=secrets,
        setup=given["setup"],
    )
    if given["dry_run"]:
        return {"sent": to_yaml(task), "folder": str(job.folder)}
    sent = submit(task, secrets, console)
    if given["follow"]:
        _follow(f"job {sent['job']}", cancel(task), lambda: follow(job, task, console))
    return sent


def _kubernetes(job: Job, console: Any, given: Mapping[str, Any]) -> Json:
    from llmtune.launch.job import to_yaml
    from llmtune.launch.kubernetes import cancel, follow, submit, train_job

    resources = {"nvidia.com/gpu": given["gpus"], "cpu": given["cpu"], "memory": given["memory"]}
    options = {name: given[name] for name in ("image", "runtime", "storage", "secret_object")}
    manifest = train_job(job, resources, secrets=given["secrets"], **options)
    if given["dry_run"]:
        return {"sent": to_yaml(manifest), "folder": str(job.folder)}
    sent = submit(manifest, given["namespace"], console)
    if given["follow"]:
        stop = cancel(sent["job"], sent["namespace"])
        _follow(f"job {sent['job']}", stop, lambda: follow(job, sent, console))
    return sent


_command(
    "slurm",
    "Run on a Slurm cluster: a job script for sbatch. What is preempted, or out of time, is queued again and goes on.",
    {name.replace("-", "_"): _text(name, text) for name, text in SLURM.items()}
    | {
        "sbatch": _several("sbatch", "OPTION", "Any other option of sbatch: --sbatch=--exclude=n3."),
        "requeue": _flag("--requeue/--no-requeue", "Queue again what was preempted or out of time.", True),
    },
    _slurm,
)
_command(
    "sky",
    "Run as a managed job of SkyPilot, which finds machines and starts again on others what it loses.",
    {name: _text(name, text) for name, text in SKY.items()}
    | {
        "use_spot": _flag("--use-spot/--no-use-spot", "Machines that are cheaper and may be taken away.", False),
        "storage": _text("storage", STORAGE.format("a bucket, such as s3://NAME")),
        "secrets": _several("secret", "NAME", "A variable of this environment that the job gets; several times."),
        "setup": _text("setup", "What to run first on each machine (default: pip install llmtune-cli)."),
    },
    _sky,
)
_command(
    "kubernetes",
    "Run as a TrainJob of Kubeflow Trainer.",
    {name: _text(name, text) for name, text in KUBERNETES.items()}
    | {
        "image": (
            Annotated[str, typer.Option("--image", help="Container image with llmtune in it.")],
            inspect.Parameter.empty,
        ),
        "runtime": (
            Annotated[str, typer.Option("--runtime", help="ClusterTrainingRuntime of the torch kind.")],
            "torch-distributed",
        ),
        "storage": _text("storage", STORAGE.format("a PersistentVolumeClaim; it is the job's working folder")),
        "secrets": _several("secret", "KEY", "A key of the Secret that becomes a variable; several times."),
        "secret_object": (Annotated[str, typer.Option("--secret-name", help="Name of the Secret.")], "llmtune"),
    },
    _kubernetes,
)
