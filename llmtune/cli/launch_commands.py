"""`llmtune launch`: the same recipe on several processes."""

from __future__ import annotations

from typing import Annotated

import typer

from llmtune.cli.options import AsJson, DryRun, Fresh, Lock, Offline, Out, RecipeArgument, Resume, Sets, Threads
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.cli.run_commands import refuse_both
from llmtune.store.process_environment import at_once, names_remote, prepare_environment

app = typer.Typer(help="Run a recipe on several processes.", no_args_is_help=True)


@app.callback()
def _launch() -> None:
    pass


@app.command()
@handled
def local(
    recipe: RecipeArgument,
    processes: Annotated[int, typer.Option("--processes", min=1, help="How many; a GPU each, or CPU with gloo.")] = 1,
    out: Out = None,
    sets: Sets = None,
    resume: Resume = False,
    fresh: Fresh = False,
    lock: Lock = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Run on this machine: prepare, select and evaluate once, train in N processes."""
    from llmtune.recipe import load_recipe

    refuse_both(resume, fresh)
    loaded = load_recipe(recipe, sets or [])
    prepare_environment(network=names_remote(loaded.recipe) and not offline, threads=threads)
    with at_once():
        from llmtune.launch.local_processes import local_trainer
        from llmtune.pipeline import run_pipeline
        from llmtune.session import Options

    options = Options(out, resume, fresh, lock, offline, dry_run, until="run")
    trainer = local_trainer(processes, threads=threads)
    result = run_pipeline(loaded, options, stderr_console(), trainer=trainer)
    if as_json:
        print_json(result)
