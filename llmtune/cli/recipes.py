"""`llmtune recipes`: list, show, new, check, schema, migrate."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import AsJson, RecipeArgument, Sets
from llmtune.cli.output_streams import handled, print_json, print_text, stderr_console
from llmtune.errors import RecipeError
from llmtune.store.atomic_files import explained
from llmtune.store.process_environment import gc_paused


def migrate_file(
    file: Path, out: Path | None = None, tool: str | None = None, task: str | None = None, as_json: bool = False
) -> None:
    """Write the recipe next to the file or to `out`, and print the result for each key."""
    from llmtune.recipe.migration import migrate_config, write_migrated
    from llmtune.recipe.secrets import redact, redact_all

    target = out or file.with_name(f"{file.stem}.llmtune.yaml")
    if target.exists():
        raise RecipeError.of("the file exists", str(target), "Choose another name with --out.")
    migration, loaded = migrate_config(file, target, tool, task)
    with explained(target):
        target.write_text(write_migrated(migration), encoding="utf-8")
    counts = Counter(one.state for one in migration.outcomes)
    if as_json:
        keys = [{"key": one.key, "state": one.state, "to": one.to, "why": one.why} for one in migration.outcomes]
        summary = {"recipe": str(target), "tool": migration.config.table.tool, "task": loaded.recipe.task}
        print_json(redact_all(summary | {"counts": dict(counts), "keys": keys}))
        return
    console = stderr_console()
    unneeded = [redact(one.key) for one in migration.outcomes if one.state == "not needed"]
    for one in migration.outcomes:
        if one.state == "refused":
            console.print(
                f"refused  {one.shown}: {redact(one.why or '')}", markup=False, highlight=False, soft_wrap=True
            )
    if unneeded:
        console.print(f"not needed  {', '.join(unneeded)}", markup=False, highlight=False, soft_wrap=True)
    unset = [f"set {ours}: the file does not have it" for ours in migration.unset]
    for line in (*unset, *migration.looks):
        console.print(f"look     {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    table = ", ".join(f"{counts[state]} {state}" for state in ("carried", "renamed", "not needed", "refused"))
    typer.echo(f"wrote {target} (from {migration.config.table.tool}, task {loaded.recipe.task}); keys: {table}")
    typer.echo(f"next: llmtune recipes check {target}")


@handled
def migrate_to_recipe(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML, JSON, or a file with the command line of the other tool.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write to this file (default: FILE.llmtune.yaml next to it).")
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option("--tool", help="The file's tool: axolotl, llamafactory or trl (default: by its keys)."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task, if the file does not have it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn another tool's configuration into a recipe. Each key is carried, renamed, not needed, or refused."""
    migrate_file(file, out, tool, task, as_json)


app = typer.Typer(help="Recipes: list, show, new, check, schema, migrate.", no_args_is_help=True)


@app.command("list")
@handled
def list_shipped(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from llmtune.display.console import print_columns
    from llmtune.launch.python_api import make_console
    from llmtune.recipe.builtin import list_recipes

    recipes = list_recipes()
    if as_json:
        print_json([{"name": recipe.name, "task": recipe.task, "about": recipe.description} for recipe in recipes])
        return
    rows = [[recipe.name, recipe.task, recipe.description] for recipe in recipes]
    print_columns(("recipe", "task", "about"), rows, make_console(stderr=False), wraps=True)


@app.command("show")
@handled
def show_recipe(
    recipe: RecipeArgument,
    sets: Sets = None,
    origin: Annotated[bool, typer.Option("--origin", help="Show the origin of each value.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a recipe with every value resolved."""
    from llmtune.recipe.loader import load_recipe

    loaded = load_recipe(recipe, sets or [])
    if as_json:
        values = loaded.recipe.model_dump(mode="json")
        print_json({"recipe": values, "origins": loaded.origins} if origin else values)
        return
    print_text(loaded.to_yaml(with_origins=origin))


@app.command()
@handled
def new(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Write to this file (default: print).")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="What the model learns: chat (the default), classify, speech ...")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The same as FILE.")] = None,
) -> None:
    """Write a starter recipe; comments mark the values to set."""
    from llmtune.recipe.builtin import new_recipe
    from llmtune.recipe.task_facts import DEFAULT_TASK

    if file is not None and out is not None:
        raise RecipeError.of("the file is given twice, as an argument and with --out", "--out", "Omit one of them.")
    text, out = new_recipe(task or DEFAULT_TASK), out or file
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise RecipeError.of("the file exists", str(out), "Choose another name with --out.")
    with explained(out):
        out.write_text(text, encoding="utf-8")
    stderr_console().print(f"wrote {out}; next: llmtune recipes check {out}", markup=False)


@app.command()
@handled
def check(recipe: RecipeArgument, sets: Sets = None, as_json: AsJson = False) -> None:
    """Check a recipe, its files and columns; report every problem at once, with file and line. Trackers are a note."""
    with gc_paused():
        from llmtune.launch.recipe_check import check_recipe, marks_left, missing_trackers, try_recipe_rows
        from llmtune.recipe.loader import load_recipe

    loaded = load_recipe(recipe, sets or [])
    marks = marks_left(loaded)
    for line in marks:
        stderr_console().print(f"still the starter's value: {line}", style="yellow", markup=False)
    detected = check_recipe(loaded)
    notes = try_recipe_rows(loaded, detected)
    notes += [f"{one.what}; a run needs it: {one.fix}" for one in missing_trackers(loaded.recipe)]
    for note in notes:
        stderr_console().print(f"note: {note}", style="yellow", markup=False)
    if as_json:
        read = [{"file": one.input.name, "format": one.row_format.name, "columns": one.columns} for one in detected]
        summary = {"file": str(loaded.file), "fingerprint": loaded.fingerprint, "problems": []}
        print_json(summary | {"data": read, "not_set": marks, "notes": notes})
        return
    for one in detected:
        columns = ", ".join(f"{ours} is {theirs!r}" for ours, theirs in one.columns.items())
        typer.echo(f"{one.input.name}: {one.row_format.name} rows{f' ({columns})' if columns else ''}")
    typer.echo(f"{loaded.file}: valid (task {loaded.recipe.task}, hash {loaded.fingerprint[:8]})")


@app.command()
@handled
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from llmtune.recipe.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


app.command("migrate")(migrate_to_recipe)
