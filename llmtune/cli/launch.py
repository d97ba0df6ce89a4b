"""`llmtune launch`: the same recipe on several processes."""

from __future__ import annotations

from typing import Annotated

import typer

from llmtune.cli.options import AsJson, DryRun, Fresh, Lock, Offline, Out, RecipeArgument, Resume, Sets, Threads
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.cli.run import print_dry_run, refuse_both
from llmtune.launch.python_api import run_recipe

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
    refuse_both(resume, fresh)
    result = run_recipe(
        recipe,
        sets or [],
        out=out,
        until="run",
        processes=processes,
        resume=resume,
        fresh=fresh,
        lock=lock,
        threads=threads,
        dry_run=dry_run,
        offline=offline,
        console=stderr_console(),
    )
    if as_json:
        print_json(result)
    elif dry_run:
        print_dry_run(result)
