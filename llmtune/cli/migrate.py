"""`llmtune recipes migrate`, which is `llmtune init --from FILE` too: a recipe out of another tool's configuration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import AsJson
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import RecipeError
from llmtune.store.atomic_files import explained

TOOLS = "axolotl, llamafactory, trl, torchtune, unsloth, swift or autotrain"
Tool = Annotated[str | None, typer.Option("--tool", help=f"Whose file it is: {TOOLS} (default: by its keys).")]


def migrate_file(
    file: Path, out: Path | None = None, tool: str | None = None, task: str | None = None, as_json: bool = False
) -> None:
    """Write the recipe beside the file, or to `out`, and print what became of each key."""
    from llmtune.recipe.migrated_yaml import write_migrated
    from llmtune.recipe.migration import migrate

    target = out or file.with_name(f"{file.stem}.llmtune.yaml")
    if target.exists():
        raise RecipeError.of("the file exists", str(target), "Choose another name with --out.")
    migration, loaded = migrate(file, target, tool, task)
    with explained(target):
        target.write_text(write_migrated(migration), encoding="utf-8")
    counts = Counter(one.state for one in migration.outcomes)
    if as_json:
        keys = [{"key": one.key, "state": one.state, "to": one.to, "why": one.why} for one in migration.outcomes]
        about = {"recipe": str(target), "tool": migration.config.table.tool, "task": loaded.recipe.task}
        print_json(about | {"counts": counts, "keys": keys})
        return
    console = stderr_console()
    for one in migration.outcomes:
        if one.state == "refused":
            console.print(f"refused  {one.shown}: {one.why}", markup=False, highlight=False, soft_wrap=True)
    unset = [f"write {ours}: the file does not say it" for ours in migration.unset]
    for line in (*unset, *migration.config.table.decide):
        console.print(f"look     {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    table = ", ".join(f"{counts[state]} {state}" for state in ("carried", "renamed", "refused"))
    typer.echo(f"wrote {target} (from {migration.config.table.tool}, task {loaded.recipe.task}); keys: {table}")
    typer.echo(f"next: llmtune recipes check {target}")


@handled
def migrate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML, JSON, or a file with the command line of the other tool.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write to this file (default: FILE.llmtune.yaml beside it).")
    ] = None,
    tool: Tool = None,
    task: Annotated[str | None, typer.Option("--task", help="The task, where the file does not say it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn another tool's configuration into a recipe: each key carried, renamed, or refused with the reason."""
    migrate_file(file, out, tool, task, as_json)
