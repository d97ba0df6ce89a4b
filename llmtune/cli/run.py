"""`run`, its five steps and `launch local`: the same options, a different place to stop, or several processes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import (
    AsJson,
    DryRun,
    Fresh,
    Lock,
    ModelName,
    Offline,
    Out,
    Quiet,
    RecipeArgument,
    Resume,
    Sets,
    Threads,
)
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import RecipeError
from llmtune.launch.python_api import evaluate_folder, run_recipe
from llmtune.records import Json

LAUNCH = "launch"
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="How many; a GPU each, or CPU with gloo.")]
SUMMARIES = {
    "run": "Run all five steps: prepare, select, adapt, train, evaluate (and deploy).",
    "prepare": "Step 1: read, check, deduplicate and split the rows; encode, mask and pack them.",
    "select": "Step 2: choose a model, plan its memory.",
    "adapt": "Step 3: put the adapter in and prove that it is wired.",
    "train": "Step 4: train, with checkpoints.",
    "evaluate": "Step 5: score base and tuned model on the same held-out rows. Takes a run folder as well.",
    LAUNCH: "Run on this machine: prepare, select and evaluate once, train in N processes.",
}


def _command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        processes: Processes = 1,
        out: Out = None,
        sets: Sets = None,
        model: ModelName = None,
        resume: Resume = False,
        fresh: Fresh = False,
        lock: Lock = None,
        threads: Threads = None,
        dry_run: DryRun = False,
        offline: Offline = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
    ) -> None:
        refuse_both(resume, fresh)
        console = stderr_console(quiet=quiet)
        sets = [*(sets or []), *([f"model.name={json.dumps(model)}"] if model else [])]
        if name == "evaluate" and Path(recipe).is_dir():
            if out or resume or fresh or lock or dry_run:
                raise RecipeError.of("of these options a run folder takes only --set, --threads, --offline and --json")
            result = evaluate_folder(Path(recipe), sets, threads=threads, offline=offline, console=console)
        else:
            result = run_recipe(
                recipe,
                sets,
                out=out,
                until="run" if name == LAUNCH else name,
                processes=processes if name == LAUNCH else None,
                resume=resume,
                fresh=fresh,
                lock=lock,
                threads=threads,
                dry_run=dry_run,
                offline=offline,
                console=console,
            )
        if as_json:
            print_json(result)
        elif dry_run:
            print_dry_run(result)

    command.__doc__ = SUMMARIES[name]
    shown = handled(command)
    signature = inspect.signature(command, eval_str=True)
    kept = [one for one in signature.parameters.values() if one.name != "processes" or name == LAUNCH]
    shown.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return shown


def print_dry_run(result: Json) -> None:
    """Print on stdout which steps would run."""
    for step in ("prepare", "encode", "train", "evaluate"):
        typer.echo(f"{step}: {'would run' if step in result['would_run'] else 'unchanged, would be skipped'}")
    typer.echo(f"good; the run folder is {result['folder']}")


def refuse_both(resume: bool, fresh: bool) -> None:
    """Raise RecipeError for --resume beside --fresh."""
    if resume and fresh:
        raise RecipeError.of("--resume and --fresh exclude each other", fix="Omit one of them.")


COMMANDS = {name: _command(name) for name in SUMMARIES if name != LAUNCH}
launch_app = typer.Typer(help="Run a recipe on several processes.", no_args_is_help=True)
launch_app.command("local")(_command(LAUNCH))


@launch_app.callback()
def _launch() -> None:
    pass
