"""`run` and its five steps, and code shared with `launch`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import AnswerEngine, RecipeArgument, RunOptions, takes_options
from llmtune.cli.output_streams import handled_by_all, print_json, stderr_console
from llmtune.cli.run_result import RunResult, result_of
from llmtune.errors import RecipeError
from llmtune.launch.python_api import evaluate_folder, run_recipe, write_test_file
from llmtune.records import Json, Until
from llmtune.store.processes import once
from llmtune.store.run_request import RunRequest


def _print_schema(wanted: bool) -> None:
    if wanted:
        from llmtune.report.run_document import document_schema

        print_json(document_schema())
        raise typer.Exit


@handled_by_all
@takes_options()
def run_command(
    recipe: RecipeArgument,
    *,
    until: Annotated[
        Until, typer.Option("--until", metavar="STEP", help="Stop after prepare, select, adapt, train or evaluate.")
    ] = "run",
    options: RunOptions,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of --json, and stop."
        ),
    ] = False,
) -> None:
    """Run all five steps: prepare, select, adapt, train, evaluate (and deploy)."""
    if options.device is not None and not options.dry_run and until != "select":
        raise RecipeError.of("--device only plans for another card", fix="Add --dry-run.")
    run_until(until, recipe, options, result_of("run", recipe, options.out))


def run_until(until: Until, recipe: str, options: RunOptions, ending: RunResult, engine: str = "own") -> None:
    """Run a recipe up to a step. `evaluate` also accepts a finished run, and `select` plans for another card."""
    if until == "evaluate" and (folder := find_named(recipe)) is not None:
        request = options.request(until)
        if request != RunRequest(until=until, threads=options.threads, offline=options.offline):
            raise RecipeError.of("a run folder accepts only --set, --engine, --threads, --offline and --json")
        request = replace(request, engine=engine)
        evaluate_folder(folder, options.values, request, stderr_console(quiet=options.quiet), ending.begin)
        return
    if engine != "own":
        fix = f"Run the recipe, then score its run: llmtune evaluate RUN --engine {engine}"
        raise RecipeError.of(f"only a finished run can be scored with --engine {engine}", "--engine", fix)
    options = replace(options, dry_run=options.dry_run or options.device is not None)
    request = options.request(until)
    result = run_recipe(recipe, options.values, request, stderr_console(quiet=options.quiet), ending.begin)
    show_plan(result, ending, as_json=options.as_json, dry_run=options.dry_run)


def step_command(until: Until, text: str) -> Callable[..., None]:
    """Return the command of one step, which does the same as `run --until`; `text` is its help."""

    @takes_options(*(() if until == "select" else ("device",)))
    def command(recipe: RecipeArgument, options: RunOptions) -> None:
        run_until(until, recipe, options, result_of(until, recipe, options.out))

    command.__doc__ = text
    return handled_by_all(command)


@handled_by_all
@takes_options("device")
def prepare_command(
    recipe: RecipeArgument,
    *,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", help="Work on a Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local.", metavar="ADDRESS"
        ),
    ] = None,
    write_test: Annotated[
        Path | None,
        typer.Option("--write-test", metavar="FILE", help="Also write the test rows to FILE, for data.test: FILE."),
    ] = None,
    options: RunOptions,
) -> None:
    """Step 1: read, check, deduplicate and split the rows; encode, mask and pack them."""
    ending = result_of("prepare", recipe, options.out)
    if write_test is not None:
        _check_test_file(write_test, options.dry_run)
    if ray:
        from llmtune.data.worker_pool import spread_on_ray  # not for --help
    with spread_on_ray(ray, offline=options.offline) if ray else nullcontext():
        run_until("prepare", recipe, options, ending)
    if (file := write_test) is not None:
        console = stderr_console(quiet=options.quiet)
        once(lambda: write_test_file(recipe, options.values, options.out, file, console))


@handled_by_all
@takes_options("device")
def evaluate_command(recipe: RecipeArgument, *, engine: AnswerEngine = "own", options: RunOptions) -> None:
    """Step 5: score base and tuned model on the same held-out rows. Also accepts a run: its folder or address."""
    run_until("evaluate", recipe, options, result_of("evaluate", recipe, options.out), engine)


def find_named(text: str) -> Path | None:
    """Return the run that a folder or an address names; None for a recipe, whose name alone is not an address here."""
    from llmtune.recipe.section import RELEASE_PREFIX  # keep --help fast: it imports pydantic
    from llmtune.store.run_listing import LATEST, find_run

    if "@" in text or text == LATEST or text.startswith(RELEASE_PREFIX):
        return None if Path(text).is_file() else find_run(Path(text))
    return Path(text) if Path(text).is_dir() else None


def show_plan(result: Json, ending: RunResult, *, as_json: bool, dry_run: bool) -> None:
    """Add the result of a dry run to the document, or print it on stdout."""
    if not result or not dry_run:
        return
    if as_json:
        ending.plan = {key: result[key] for key in ("would_run", "plans", "power")}
    else:
        for step in result["steps"]:
            typer.echo(f"{step}: {'would run' if step in result['would_run'] else 'unchanged, would be skipped'}")
        folder = Path(result["folder"])
        typer.echo(f"valid; the run folder {'is' if folder.exists() else 'will be'} {folder}")


def _check_test_file(file: Path, dry_run: bool) -> None:
    if dry_run:
        raise RecipeError.of("--write-test and --dry-run exclude each other", fix="Omit one of them.")
    where = f"--write-test {file}"
    if file.suffix.lower() not in (".jsonl", ".ndjson"):
        raise RecipeError.of("the test rows are written as JSON Lines", where, "Give it a name that ends in .jsonl.")
    if file.exists():
        fix = "Name another file; to replace this one, delete it first."
        raise RecipeError.of("the file exists, and runs may have been measured on it", where, fix)


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run_command,
    "prepare": prepare_command,
    "select": step_command("select", "Step 2: choose a model, plan its memory."),
    "adapt": step_command("adapt", "Step 3: insert the adapter and prove that it works."),
    "train": step_command("train", "Step 4: train, with checkpoints."),
    "evaluate": evaluate_command,
}
