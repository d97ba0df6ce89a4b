"""`launch local` starts a run's processes on this machine, `launch slurm` in a cluster job."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

import typer

from llmtune.cli.options import AsJson, RecipeArgument, RunOptions, takes_options
from llmtune.cli.output_streams import handled, print_json, print_text, stderr_console
from llmtune.cli.run import show_plan
from llmtune.cli.run_result import result_of
from llmtune.launch.python_api import locate_run, run_recipe

app = typer.Typer(help="Run a recipe on several processes.", no_args_is_help=True)
Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Processes on each machine, each with a GPU, or on CPUs with gloo.")
]
Strategy = Annotated[
    str,
    typer.Option("--strategy", help="Share of the model in each process: ddp all of it, fsdp a part.", metavar="NAME"),
]
OffloadParams = Annotated[
    bool,
    typer.Option("--fsdp-offload-params", help="With fsdp: keep shards in main memory while they do not compute."),
]
MaxRestarts = Annotated[
    int,
    typer.Option("--max-restarts", min=0, help="How often all processes restart from a checkpoint after one died."),
]


@app.command()
@handled
@takes_options("device")
def local(
    recipe: RecipeArgument,
    *,
    processes: Processes = 1,
    strategy: Strategy = "ddp",
    machines: Annotated[
        int,
        typer.Option(
            "--machines", min=1, help="Number of machines; give the same command on each, with its own --rank."
        ),
    ] = 1,
    rank: Annotated[int, typer.Option("--rank", min=0, help="The number of this machine, from 0.")] = 0,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Rendezvous address: HOST:PORT of machine 0.", metavar="HOST:PORT"),
    ] = None,
    max_restarts: MaxRestarts = 0,
    offload_params: OffloadParams = False,
    options: RunOptions,
) -> None:
    """Run all steps on this machine or several, with N processes that train and evaluate together."""
    from llmtune.launch.topology import Topology

    ending = result_of("launch local", recipe, options.out)
    request, console = options.request("run"), stderr_console(quiet=options.quiet)
    topology = Topology(processes, strategy, machines, rank, address, max_restarts, offload_params)
    if options.dry_run:
        result = run_recipe(recipe, options.values, replace(request, layout=topology.layout), console, ending.begin)
        show_plan(result, ending, as_json=options.as_json, dry_run=True)
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before importing torch, whose sockets warn of each attempt
    from llmtune.launch.local_processes import launch_run
    from llmtune.recipe.loader import load_recipe

    if options.as_json:
        loaded = load_recipe(recipe, options.values)
        request = locate_run(loaded, request, console)
        ending.begin(loaded, request.folder)
    words = [word for word, given in (("--quiet", options.quiet), ("--json", options.as_json)) if given]
    launch_run(recipe, options.values, request, topology, console, words)


@app.command()
@handled
@takes_options("resume", "fresh", "dry_run", "device")
def slurm(
    recipe: RecipeArgument,
    *,
    processes: Processes = 1,
    strategy: Strategy = "ddp",
    machines: Annotated[int, typer.Option("--machines", min=1, help="Machines, with --processes on each.")] = 1,
    max_restarts: MaxRestarts = 0,
    offload_params: OffloadParams = False,
    options: RunOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script, and stop.")] = False,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="An option of sbatch: --sbatch=--partition=gpu."),
    ] = None,
    requeue: Annotated[
        bool, typer.Option("--requeue/--no-requeue", help="Requeue a job that was preempted or ran out of time.")
    ] = True,
) -> None:
    """Run on a Slurm cluster with a job script for sbatch. A job that was preempted or ran out of time is requeued."""
    from llmtune.launch import slurm as cluster
    from llmtune.launch.topology import Topology

    console = stderr_console(quiet=options.quiet)
    address = "HOST:1" if machines > 1 else None  # the job sets the real one
    topology = Topology(processes, strategy, machines, 0, address, max_restarts, offload_params)
    job = cluster.plan_job(recipe, options.values, options.request("run"), topology)
    script = cluster.slurm_script(job, sbatch or [], requeue=requeue)
    if dry_run:
        print_json({"sent": script, "folder": str(job.folder)}) if options.as_json else print_text(script)
        return
    sent = cluster.submit(job, script, console)
    if options.as_json:
        print_json(sent)


def _retired(name: str) -> None:
    @app.command(name, hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True})
    @handled
    def refuse(words: Annotated[list[str] | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
        from llmtune.recipe.retired import refuse_retired

        raise refuse_retired(f"launch {name}")


_retired("sky")
_retired("kubernetes")
