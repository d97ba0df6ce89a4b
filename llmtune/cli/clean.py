"""`llmtune clean`: remove what no command needs from run folders, llmtune's cache and the releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import AsJson
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import EnvironmentProblem, RecipeError


@handled
def clean_command(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run folder, the name of a recipe with a run, or latest.")
    ] = None,
    clean_all: Annotated[bool, typer.Option("--all", help="Clean all runs in runs/.")] = False,
    models: Annotated[
        bool,
        typer.Option("--models", help="With --all: remove packaged models from the cache, which all folders share."),
    ] = False,
    keep_releases: Annotated[
        int | None,
        typer.Option("--keep-releases", min=0, metavar="N", help="With --all: keep the current and N older releases."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints, exports of earlier trainings and leftovers; print their sizes. Skips running runs."""
    from llmtune.display.number_format import size
    from llmtune.model.builtin_models import list_unrestorable
    from llmtune.store import cleaning

    if (run is None) != clean_all:
        raise RecipeError.of("give one run, or --all", "llmtune clean", "Name a run folder, or use --all.")
    for option, given in (("--keep-releases", keep_releases is not None), ("--models", models)):
        if given and run is not None:
            raise RecipeError.of("it applies to all runs only", option, f"Use: llmtune clean --all {option}")
    if run is None:
        keep_models = list_unrestorable() if models else None
        result = cleaning.clean_all(keep_releases=keep_releases, keep_models=keep_models, dry_run=dry_run)
    else:
        result = cleaning.clean_run(run, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "bytes": result.bytes,
                "removed": [vars(one) for one in result.removable],
                "skipped": [{"path": path, "reason": reason} for path, reason in result.skipped.items()],
            }
        )
    else:
        for one in result.removable:
            typer.echo(f"{size(one.bytes):>8}  {one.path}  {one.reason}")
        for path, reason in result.skipped.items():
            stderr_console().print(f"skipped {path}: {reason}", highlight=False, markup=False, soft_wrap=True)
        typer.echo(f"{size(result.bytes):>8}  {'would be removed' if dry_run else 'removed'}")
    if result.failed:
        raise typer.Exit(EnvironmentProblem.exit_code)


COMMANDS: dict[str, Callable[..., None]] = {"clean": clean_command}
