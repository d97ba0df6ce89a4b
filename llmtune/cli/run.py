"""`run` and its five steps: the same options, a different place to stop."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import (
    AsJson,
    Device,
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
from llmtune.cli.output_streams import handled_by_all, print_json, stderr_console
from llmtune.errors import RecipeError
from llmtune.launch.python_api import evaluate_folder, run_recipe, write_test_file
from llmtune.records import Json
from llmtune.store.processes import once

OWN = {"device": ("run", "select"), "ray": ("prepare",), "write_test": ("prepare",)}
"""Options that not every command has, and which have them."""
Ray = Annotated[
    str | None,
    typer.Option("--ray", help="Work on a Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local.", metavar="ADDRESS"),
]
WriteTest = Annotated[
    Path | None,
    typer.Option("--write-test", metavar="FILE", help="Also write the test rows to FILE, for data.test: FILE."),
]
SUMMARIES = {
    "run": "Run all five steps: prepare, select, adapt, train, evaluate (and deploy).",
    "prepare": "Step 1: read, check, deduplicate and split the rows; encode, mask and pack them.",
    "select": "Step 2: choose a model, plan its memory.",
    "adapt": "Step 3: put the adapter in and prove that it is wired.",
    "train": "Step 4: train, with checkpoints.",
    "evaluate": "Step 5: score base and tuned model on the same held-out rows. Takes a run folder as well.",
}


def _command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        ray: Ray = None,
        write_test: WriteTest = None,
        out: Out = None,
        sets: Sets = None,
        model: ModelName = None,
        resume: Resume = False,
        fresh: Fresh = False,
        lock: Lock = None,
        threads: Threads = None,
        dry_run: DryRun = False,
        device: Device = None,
        offline: Offline = False,
        quiet: Quiet = False,
        as_json: AsJson = False,
    ) -> None:
        console, dry_run = stderr_console(quiet=quiet), plans_only(name, device, dry_run)
        refuse_both(resume, fresh, write_test, dry_run)
        sets = with_model(sets, model)
        if name == "evaluate" and Path(recipe).is_dir():
            if out or resume or fresh or lock or dry_run:
                raise RecipeError.of("of these options a run folder takes only --set, --threads, --offline and --json")
            result = evaluate_folder(Path(recipe), sets, threads=threads, offline=offline, console=console)
        else:
            with _spread(ray, offline) if ray else nullcontext():
                result = run_recipe(
                    recipe,
                    sets,
                    out=out,
                    until=name,
                    resume=resume,
                    fresh=fresh,
                    lock=lock,
                    threads=threads,
                    dry_run=dry_run,
                    device=device,
                    offline=offline,
                    console=console,
                )
        if (file := write_test) is not None:
            once(lambda: write_test_file(recipe, sets, out=out, file=file, console=console))
        print_result(result, as_json=as_json, dry_run=dry_run)

    command.__doc__ = SUMMARIES[name]
    shown = handled_by_all(command)
    signature = inspect.signature(command, eval_str=True)
    others = {option for option, commands in OWN.items() if name not in commands}
    kept = [one for one in signature.parameters.values() if one.name not in others]
    shown.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return shown


def _spread(address: str, offline: bool) -> AbstractContextManager[None]:
    from llmtune.data.worker_pool import spread_on_ray  # not for --help

    return spread_on_ray(address, offline=offline)


def print_result(result: Json, *, as_json: bool, dry_run: bool) -> None:
    """Print on stdout what was asked for of a result, if there is one."""
    if result and as_json:
        print_json(result)
    elif result and dry_run:
        print_dry_run(result)


def print_dry_run(result: Json) -> None:
    """Print on stdout which steps would run."""
    for step in ("prepare", "encode", "train", "evaluate"):
        typer.echo(f"{step}: {'would run' if step in result['would_run'] else 'unchanged, would be skipped'}")
    typer.echo(f"good; the run folder is {result['folder']}")


def plans_only(name: str, device: str | None, dry_run: bool) -> bool:
    """Whether nothing is done; raises RecipeError where something would be, and a card is named to plan for."""
    if device is not None and name != "select" and not dry_run:
        raise RecipeError.of("--device plans for a card that need not be here", fix="Add --dry-run.")
    return dry_run or device is not None


def with_model(sets: list[str] | None, model: str | None) -> list[str]:
    """Return the values to set, with that of --model."""
    return [*(sets or []), *([f"model.name={json.dumps(model)}"] if model else [])]


def refuse_both(resume: bool, fresh: bool, write_test: Path | None = None, dry_run: bool = False) -> None:
    """Raise RecipeError for options that exclude each other, and for a test file that exists."""
    for first, second, both in (
        ("--resume", "--fresh", resume and fresh),
        ("--write-test", "--dry-run", write_test is not None and dry_run),
    ):
        if both:
            raise RecipeError.of(f"{first} and {second} exclude each other", fix="Omit one of them.")
    if write_test is not None and write_test.suffix.lower() not in (".jsonl", ".ndjson"):
        fix = "Give it a name that ends in .jsonl."
        raise RecipeError.of("the test rows are written as JSON Lines", f"--write-test {write_test}", fix)
    if write_test is not None and write_test.exists():
        fix = "Name another file; to replace this one, delete it first."
        raise RecipeError.of(
            "the file exists, and runs may have been measured on it", f"--write-test {write_test}", fix
        )


COMMANDS = {name: _command(name) for name in SUMMARIES}
