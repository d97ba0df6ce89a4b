"""`run` and its five steps, and code shared with `launch`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import (
    AsJson,
    Device,
    DryRun,
    Fresh,
    LockFile,
    ModelName,
    Offline,
    Quiet,
    RecipeArgument,
    Resume,
    RunFolderOption,
    Sets,
    Threads,
)
from llmtune.cli.output_streams import handled_by_all, print_json, stderr_console
from llmtune.cli.run_result import RunResult, result_of
from llmtune.errors import RecipeError
from llmtune.launch.python_api import evaluate_folder, run_recipe, write_test_file
from llmtune.records import Json
from llmtune.store.processes import once
from llmtune.store.run_request import RunRequest


def _print_schema(wanted: bool) -> None:
    if wanted:
        from llmtune.report.run_document import document_schema

        print_json(document_schema())
        raise typer.Exit


@handled_by_all
def run_command(
    recipe: RecipeArgument,
    out: RunFolderOption = None,
    sets: Sets = None,
    model: ModelName = None,
    resume: Resume = False,
    fresh: Fresh = False,
    lock: LockFile = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    device: Device = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of --json, and stop."
        ),
    ] = False,
) -> None:
    """Run all five steps: prepare, select, adapt, train, evaluate (and deploy)."""
    if device is not None and not dry_run:
        raise RecipeError.of("--device only plans for another card", fix="Add --dry-run.")
    request = RunRequest(
        out=out,
        until="run",
        resume=resume,
        fresh=fresh,
        lock=lock,
        threads=threads,
        offline=offline,
        dry_run=dry_run,
        device=device,
    )
    _run(recipe, with_model(sets, model), request, quiet=quiet, as_json=as_json)


@handled_by_all
def prepare_command(
    recipe: RecipeArgument,
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
    out: RunFolderOption = None,
    sets: Sets = None,
    model: ModelName = None,
    resume: Resume = False,
    fresh: Fresh = False,
    lock: LockFile = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Step 1: read, check, deduplicate and split the rows; encode, mask and pack them."""
    request = RunRequest(
        out=out,
        until="prepare",
        resume=resume,
        fresh=fresh,
        lock=lock,
        threads=threads,
        offline=offline,
        dry_run=dry_run,
    )
    ending = result_of("prepare", recipe, out)
    refuse_both(request.resume, request.fresh)
    if write_test is not None:
        _check_test_file(write_test, dry_run)
    stated = with_model(sets, model)
    if ray:
        from llmtune.data.worker_pool import spread_on_ray  # not for --help
    with spread_on_ray(ray, offline=offline) if ray else nullcontext():
        result = run_recipe(recipe, stated, request, stderr_console(quiet=quiet), ending.begin)
    if (file := write_test) is not None:
        once(lambda: write_test_file(recipe, stated, out, file, stderr_console(quiet=quiet)))
    show_plan(result, ending, as_json=as_json, dry_run=dry_run)


@handled_by_all
def select_command(
    recipe: RecipeArgument,
    out: RunFolderOption = None,
    sets: Sets = None,
    model: ModelName = None,
    resume: Resume = False,
    fresh: Fresh = False,
    lock: LockFile = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    device: Device = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Step 2: choose a model, plan its memory."""
    dry_run = dry_run or device is not None
    request = RunRequest(
        out=out,
        until="select",
        resume=resume,
        fresh=fresh,
        lock=lock,
        threads=threads,
        offline=offline,
        dry_run=dry_run,
        device=device,
    )
    _run(recipe, with_model(sets, model), request, quiet=quiet, as_json=as_json)


@handled_by_all
def adapt_command(
    recipe: RecipeArgument,
    out: RunFolderOption = None,
    sets: Sets = None,
    model: ModelName = None,
    resume: Resume = False,
    fresh: Fresh = False,
    lock: LockFile = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Step 3: insert the adapter and prove that it works."""
    request = RunRequest(
        out=out, until="adapt", resume=resume, fresh=fresh, lock=lock, threads=threads, offline=offline, dry_run=dry_run
    )
    _run(recipe, with_model(sets, model), request, quiet=quiet, as_json=as_json)


@handled_by_all
def train_command(
    recipe: RecipeArgument,
    out: RunFolderOption = None,
    sets: Sets = None,
    model: ModelName = None,
    resume: Resume = False,
    fresh: Fresh = False,
    lock: LockFile = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Step 4: train, with checkpoints."""
    request = RunRequest(
        out=out, until="train", resume=resume, fresh=fresh, lock=lock, threads=threads, offline=offline, dry_run=dry_run
    )
    _run(recipe, with_model(sets, model), request, quiet=quiet, as_json=as_json)


@handled_by_all
def evaluate_command(
    recipe: RecipeArgument,
    out: RunFolderOption = None,
    sets: Sets = None,
    model: ModelName = None,
    resume: Resume = False,
    fresh: Fresh = False,
    lock: LockFile = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Step 5: score base and tuned model on the same held-out rows. Also accepts a run: its folder or address."""
    request = RunRequest(
        out=out,
        until="evaluate",
        resume=resume,
        fresh=fresh,
        lock=lock,
        threads=threads,
        offline=offline,
        dry_run=dry_run,
    )
    ending = result_of("evaluate", recipe, out)
    folder = find_named(recipe)
    if folder is None:
        _run(recipe, with_model(sets, model), request, quiet=quiet, as_json=as_json)
        return
    refuse_both(request.resume, request.fresh)
    if request != RunRequest(until="evaluate", threads=threads, offline=offline):
        raise RecipeError.of("a run folder accepts only --set, --threads, --offline and --json")
    evaluate_folder(folder, with_model(sets, model), request, stderr_console(quiet=quiet), ending.begin)


def find_named(text: str) -> Path | None:
    """Return the run that a folder or an address names; None for a recipe, whose name alone is not an address here."""
    from llmtune.recipe.section import RELEASE_PREFIX  # keep --help fast: it imports pydantic
    from llmtune.store.run_listing import LATEST, find_run

    if "@" in text or text == LATEST or text.startswith(RELEASE_PREFIX):
        return None if Path(text).is_file() else find_run(Path(text))
    return Path(text) if Path(text).is_dir() else None


def _run(recipe: str, sets: list[str], request: RunRequest, *, quiet: bool, as_json: bool) -> None:
    ending = result_of(request.until, recipe, request.out)
    refuse_both(request.resume, request.fresh)
    result = run_recipe(recipe, sets, request, stderr_console(quiet=quiet), ending.begin)
    show_plan(result, ending, as_json=as_json, dry_run=request.dry_run)


def show_plan(result: Json, ending: RunResult, *, as_json: bool, dry_run: bool) -> None:
    """Add the result of a dry run to the document, or print it on stdout."""
    if not result or not dry_run:
        return
    if as_json:
        ending.plan = {key: result[key] for key in ("would_run", "plans", "power")}
    else:
        for step in ("prepare", "encode", "train", "evaluate"):
            typer.echo(f"{step}: {'would run' if step in result['would_run'] else 'unchanged, would be skipped'}")
        folder = Path(result["folder"])
        typer.echo(f"valid; the run folder {'is' if folder.exists() else 'will be'} {folder}")


def with_model(sets: list[str] | None, model: str | None) -> list[str]:
    """Return the values to set, including --model."""
    return [*(sets or []), *([f"model.name={json.dumps(model)}"] if model else [])]


def refuse_both(resume: bool, fresh: bool) -> None:
    """Raise RecipeError if both options are set: they exclude each other."""
    if resume and fresh:
        raise RecipeError.of("--resume and --fresh exclude each other", fix="Omit one of them.")


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
    "select": select_command,
    "adapt": adapt_command,
    "train": train_command,
    "evaluate": evaluate_command,
}
