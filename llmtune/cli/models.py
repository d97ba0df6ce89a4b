"""`llmtune models`: list and show the models of the catalogue, and say which fit into so much memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import RecipeError

if TYPE_CHECKING:
    from llmtune.compare.model_fits import Fit

app = typer.Typer(help="Models: list, show, fits.", no_args_is_help=True)
Task = Annotated[str | None, typer.Option("--task", help="Only models that can do this task.")]
Licence = Annotated[list[str] | None, typer.Option("--licence", help="Only this licence; may be given several times.")]
Language = Annotated[str | None, typer.Option("--language", help="Only models that name this language: en, de ...")]
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
GAP, WIDTH = "-", 132


@app.command("list")
@handled
def list_(task: Task = None, licence: Licence = None, language: Language = None, as_json: AsJson = False) -> None:
    """List the models of the catalogue; a recipe may name any other one too."""
    from rich.console import Console
    from rich.table import Table

    from llmtune.model.catalogue import select_models

    found, left_out = select_models(task, licence or (), language)
    if as_json:
        print_json({"models": [asdict(one) for one in found], "left_out": left_out})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "kind", "context", "licence", "languages"):
        table.add_column(column, justify="right" if column == "context" else "left", no_wrap=column == "model")
    for one in found:
        table.add_row(one.name, one.kind, f"{one.context:,}", one.licence, " ".join(one.languages))
    Console().print(table)
    stderr_console().print(f"{len(found)} models, {len(left_out)} left out; --json has the reasons", highlight=False)


@app.command()
@handled
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the catalogue.")], as_json: AsJson = False
) -> None:
    """Show what the catalogue has of one model."""
    from llmtune.model.catalogue import find_model

    found = find_model(model)
    if as_json:
        print_json({**asdict(found), "tasks": found.tasks})
        return
    for name, value in {**asdict(found), "tasks": found.tasks}.items():
        words = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        typer.echo(f"{name}: {words}")


@app.command()
@handled
def fits(
    memory: Annotated[str | None, typer.Option("--memory", help="So much memory, such as 24GB.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="A card (h100, a100-40, 4090 ...) or cpu.")] = None,
    length: Annotated[int, typer.Option("--length", min=8, help="Tokens of a row.")] = 1024,
    task: Annotated[str, typer.Option("--task", help="The task to be tuned for.")] = "chat",
    licence: Licence = None,
    language: Language = None,
    as_json: AsJson = False,
) -> None:
    """Say which models fit, by which method, and with how long rows; by the plan of `llmtune run --dry-run`."""
    from llmtune.model.catalogue import select_models

    found, left_out = select_models(task, licence or (), language)
    if (memory is None) == (device is None):
        raise RecipeError.of("one of --memory and --device is needed", "llmtune models fits", "Write: --memory 24GB")
    size = None if memory is None else _read_size(memory)
    from llmtune.store.process_environment import prepare_environment

    prepare_environment(network=False)
    from llmtune.compare.model_fits import DRIVER_BYTES, find_device, list_fits
    from llmtune.report.number_format import size as format_bytes

    room, speed = (size, None) if size is not None else find_device(str(device))
    on_card = device != "cpu"
    usable = room - DRIVER_BYTES if on_card else room
    with stderr_console().status("planning"):
        planned = list(list_fits(found, task, usable, length, speed, "cuda" if on_card else "cpu"))
    if as_json:
        about = {"memory_bytes": room, "length": length, "left_out": left_out}
        print_json(about | {"fits": [asdict(one) for one in planned]})
        return
    _show(planned, f"Longest row in {format_bytes(room)}, and rows of {length:,} at once", length)
    if left_out:
        reasons = f"{len(left_out)} more are left out by task, licence or language; --json has the reasons"
        stderr_console().print(reasons, highlight=False, soft_wrap=True)


def _show(planned: Sequence[Fit], title: str, length: int) -> None:
    """Print a row a model, the largest first: what each method leaves room for, and what the best of them takes."""
    from rich.console import Console
    from rich.table import Table

    from llmtune.compare.model_fits import METHODS
    from llmtune.report.number_format import duration, size

    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    timed = any(one.seconds for one in planned)
    for column in ("model", "parameters", *METHODS, "needs at least", *(["a million tokens"] if timed else [])):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    models: dict[str, dict[str, Fit]] = {}
    for one in planned:
        models.setdefault(one.model, {})[one.method] = one
    for model, methods in sorted(models.items(), key=lambda item: -item[1]["lora"].parameters):
        if best := next((methods[name] for name in METHODS if methods[name].rows), None):
            cells = [_cell(methods[name]) for name in METHODS]
            least = f"{size(best.lower_bound)} ({best.method})"
            last = [duration(best.seconds)] if timed else []
            table.add_row(model, f"{best.parameters / 1e9:.2f} G", *cells, least, *last)
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)  # no number is cut
    note = f"{table.row_count} of {len(models)} models fit. * with train.gradient_checkpointing, which auto turns on."
    stderr_console().print(note, highlight=False, soft_wrap=True)


def _cell(one: Fit) -> str:
    return f"{one.longest:,} x{one.rows}{'*' if one.checkpointing else ''}" if one.rows else GAP


def _read_size(text: str) -> float:
    """Read bytes such as 24GB or 80GiB. Raises RecipeError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not found or found[2] not in UNITS or float(found[1]) * UNITS[found[2]] < 1e8:
        raise RecipeError.of(f"{text!r} is no amount of memory", "--memory", "Write e.g. --memory 24GB.")
    return float(found[1]) * UNITS[found[2]]
