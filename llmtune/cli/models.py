"""`llmtune models`: list and show the models of the catalogue, and those that fit into given memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson, Offline, Sets
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import RecipeError, refuse_repeated

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.compare.model_fits import Fit
    from llmtune.display.blocks import Cell

app = typer.Typer(help="Models: list, show, fits, shrink.", no_args_is_help=True)
TaskOption = Annotated[str | None, typer.Option("--task", help="Only models for this task.")]
LicenceOption = Annotated[list[str] | None, typer.Option("--licence", help="Only this licence; may be repeated.")]
LanguageOption = Annotated[
    str | None, typer.Option("--language", help="Only models that name this language: en, de ...")
]
FamilyOption = Annotated[list[str] | None, typer.Option("--family", help="Only this family; may be repeated.")]
MaxParametersOption = Annotated[
    float | None, typer.Option("--max-parameters", min=1, help="Maximum parameters, such as 2e9.")
]
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
GAP = "-"


@app.command("list")
@handled
def list_catalogue(
    task: TaskOption = None,
    licence: LicenceOption = None,
    language: LanguageOption = None,
    family: FamilyOption = None,
    max_parameters: MaxParametersOption = None,
    as_json: AsJson = False,
) -> None:
    """List the models of the catalogue. A recipe may name any other model."""
    from llmtune.display.console import print_columns
    from llmtune.model.catalogue import ModelQuery, select_models
    from llmtune.recipe.task_facts import DEFAULT_TASK

    task = task or DEFAULT_TASK
    models, left_out = select_models(ModelQuery(task, licence or (), language, family or (), max_parameters))
    if as_json:
        print_json({"models": [asdict(one) for one in models], "left_out": left_out})
        return
    rows = [
        [one.name, f"{one.parameters / 1e9:.2f} G", f"{one.context:,}", one.licence, one.kind, " ".join(one.languages)]
        for one in models
    ]
    columns = ("model", "size", "context", "licence", "kind", "languages")
    omitted = print_columns(columns, rows, _out(), numbers=("size", "context"))
    also = f"; a wider terminal also shows {' and '.join(omitted)}" if omitted else ""
    stderr_console().print(
        f"{len(models)} models, {len(left_out)} filtered out; --json has the reasons{also}", highlight=False
    )


@app.command("show")
@handled
def show_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the catalogue.")], as_json: AsJson = False
) -> None:
    """Show the catalogue's entry for one model."""
    from llmtune.model.catalogue import find_catalogue_model

    entry = find_catalogue_model(model)
    if as_json:
        print_json({**asdict(entry), "tasks": entry.tasks})
        return
    for name, value in {**asdict(entry), "tasks": entry.tasks}.items():
        words = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        typer.echo(f"{name}: {words}")


@app.command()
@handled
def fits(
    memory: Annotated[str | None, typer.Option("--memory", help="Available memory, such as 24GB.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="A card (h100, a100-40, 4090 ...) or cpu.")] = None,
    devices: Annotated[
        str | None, typer.Option("--devices", help="Several cards that share a model (fsdp): 2x24GB, 8xh100.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Show this recipe's memory by method and card.")
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option("--price", metavar="CARD=N", help="With --recipe: price per hour of a card.")
    ] = None,
    sets: Sets = None,
    length: Annotated[int, typer.Option("--length", min=8, max=2**30, help="Tokens per row.")] = 1024,
    task: Annotated[str | None, typer.Option("--task", help="The task to tune for (default: chat).")] = None,
    licence: LicenceOption = None,
    language: LanguageOption = None,
    family: FamilyOption = None,
    max_parameters: MaxParametersOption = None,
    as_json: AsJson = False,
) -> None:
    """Show which models fit, by method and row length, as planned by `llmtune run --dry-run`."""
    from llmtune.model.catalogue import ModelQuery, select_models
    from llmtune.recipe.task_facts import DEFAULT_TASK

    task = task or DEFAULT_TASK
    models, left_out = select_models(ModelQuery(task, licence or (), language, family or (), max_parameters))
    if sum(one is not None for one in (memory, device, devices, recipe)) != 1:
        fix = "Write: --memory 24GB"
        raise RecipeError.of("one of --memory, --device, --devices and --recipe is needed", "llmtune models fits", fix)
    if recipe is None and (price or sets):
        raise RecipeError.of("--price and --set have no effect without --recipe", fix="Remove them, or name a recipe.")
    from llmtune.store.process_environment import prepare_environment

    prepare_environment(network=False)
    count, device, size = _read_devices(memory, device, devices)
    if recipe is not None:
        _fit_recipe(recipe, sets or (), price or (), as_json)
        return
    console = stderr_console()
    console.print(f"Planning {len(models)} models.")
    from llmtune.compare.model_fits import DeviceMemory, list_fits
    from llmtune.display.console import track_items
    from llmtune.display.number_format import size as format_bytes
    from llmtune.model.device import DRIVER_BYTES, device_memory

    usable = device_memory(device) or 0 if device is not None else (size or 0) - DRIVER_BYTES
    place = DeviceMemory(usable, "cpu" if device == "cpu" else "cuda", device)
    planned = list(list_fits(track_items(console, models, "planning"), task, place, length, count))
    if as_json:
        conditions = {"memory_bytes": usable, "devices": count, "length": length, "left_out": left_out}
        print_json(conditions | {"fits": [asdict(one) for one in planned]})
        return
    where = f"on {device}" if device else f"in {format_bytes(size)}"
    where = f"on each of {count} cards ({device or format_bytes(size)}, fsdp)" if count > 1 else where
    _print_fits(planned, f"Longest row {where}, and rows of {length:,} at once", length)
    if left_out:
        reasons = f"{len(left_out)} more filtered out; --json has the reasons"
        console.print(reasons, highlight=False, soft_wrap=True)


@app.command()
@handled
def shrink(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder, a hub name or builtin:NAME.")],
    layers: Annotated[int, typer.Option("--layers", help="Layers to keep, taken evenly.")],
    out: Annotated[Path | None, typer.Option("--out", help="New folder (default: NAME-N-layers).")] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Save a model with fewer layers of BASE, as a student to train with `distil`."""
    from llmtune.store.process_environment import prepare_environment

    prepare_environment(network=not offline)
    from llmtune.model.shrink import shrink_model

    folder = out or Path(f"{Path(base.removeprefix('builtin:')).name}-{layers}-layers")
    done = shrink_model(base, layers, folder, stderr_console(), offline)
    if as_json:
        print_json(done)
        return
    before, after = done["parameters"]
    kept = ", ".join(str(i + 1) for i in done["kept"])
    typer.echo(f"{folder}: {layers} of {done['layers']} layers ({kept}), {after:,} of {before:,} parameters")


def _fit_recipe(recipe: str, sets: Sequence[str], price: Sequence[str], as_json: bool) -> None:
    """Print a recipe's table: one row per card, one column per method."""
    console = stderr_console()
    console.print(f"Planning {recipe} on each card.", markup=False)
    from llmtune.compare.model_fits import METHODS, cheapest, list_recipe_fits
    from llmtune.display.console import spinner
    from llmtune.display.number_format import size

    prices = _read_prices(price)
    with spinner(console, "planning"):
        planned, assumptions = list_recipe_fits(recipe, sets, prices, console)
    best = cheapest(planned)
    if as_json:
        print_json({**assumptions, "cheapest": best and asdict(best), "fits": [asdict(one) for one in planned]})
        return
    from llmtune.display.blocks import Column, Table
    from llmtune.display.console import print_blocks

    model, length = assumptions["model"], assumptions["length"]
    title = f"{model}, rows of at most {length:,} tokens: memory, time{', cost' if prices else ''}"
    methods = [name for name in METHODS if any(one.method == name for one in planned)]
    cards = dict.fromkeys(one.card for one in planned)
    rows = [[card or "", *(_recipe_cell(one) for one in planned if one.card == card)] for card in cards]
    print_blocks([Table([Column("card"), *(Column(name, "number") for name in methods)], rows, title)], _out())
    unit = "the training" if assumptions["trained_tokens"] else "a million tokens (rows are not prepared yet)"
    notes = [
        f"* with train.gradient_checkpointing. Memory is for one row at a time. "
        f"Time{' and cost are' if prices else ' is'} of {unit}, an estimate: "
        f"the maker's 16-bit operations at {assumptions['efficiency']:.0%}, without loading and evaluation.",
        f"Cheapest by {'memory' if best.cost is None else 'these prices'}: {best.card} with {best.method}, "
        f"{size(best.needed)}."
        if best
        else "It fits on none of these cards.",
    ]
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def _recipe_cell(one: Fit) -> str:
    from llmtune.display.number_format import duration, size

    if not one.rows:
        return GAP
    seconds = one.seconds if one.hours is None else 3600 * one.hours
    time = "" if seconds is None else f", {duration(seconds)}"
    cost = "" if one.cost is None else f", {one.cost:,.2f}" if one.cost >= 1 else f", {one.cost:.2g}"
    return f"{size(one.needed)}{'*' if one.checkpointing else ''}{time}{cost}"


def _read_prices(texts: Sequence[str]) -> dict[str, float]:
    """Read `h100=2.5` ... Raises RecipeError."""
    from llmtune.model.device import check_card

    prices: dict[str, float] = {}
    refuse_repeated([text.partition("=")[0].strip() for text in texts], "--price")
    for text in texts:
        card, _, value = text.partition("=")
        check_card(card.strip())
        try:
            prices[card.strip()] = float(value)
        except ValueError:
            raise RecipeError.of(f"{text!r} is not a price", "--price", "Write e.g. --price h100=2.5.") from None
    return prices


def _print_fits(planned: Sequence[Fit], title: str, length: int) -> None:
    """Print one row per model, the largest first: the longest row by method, and the needs of the best method."""
    from llmtune.compare.model_fits import METHODS
    from llmtune.display.blocks import Column, Table
    from llmtune.display.console import print_blocks
    from llmtune.display.number_format import duration, size

    timed = any(one.seconds for one in planned)
    names = ("parameters", *METHODS, "needs at least", *(["a million tokens"] if timed else []))
    rows: list[list[str | Cell]] = []
    models: dict[str, dict[str, Fit]] = {}
    for one in planned:
        models.setdefault(one.model, {})[one.method] = one
    for model, methods in sorted(models.items(), key=lambda item: -item[1]["lora"].parameters):
        if best := next((methods[name] for name in METHODS if methods[name].rows), None):
            cells = [_model_cell(methods[name]) for name in METHODS]
            least = f"{size(best.lower_bound)} ({best.method})"
            last = [duration(best.seconds)] if timed else []
            rows.append([model, f"{best.parameters / 1e9:.2f} G", *cells, least, *last])
    print_blocks([Table([Column("model"), *(Column(name, "number") for name in names)], rows, title)], _out())
    note = f"{len(rows)} of {len(models)} models fit. * with train.gradient_checkpointing, which auto turns on."
    stderr_console().print(note, highlight=False, soft_wrap=True)


def _out() -> Console:
    """Return a console for standard output: as wide as the terminal, or wide enough for all tables."""
    from llmtune.launch.python_api import make_console

    return make_console(stderr=False)


def _model_cell(one: Fit) -> str:
    return f"{one.longest:,} x{one.rows}{'*' if one.checkpointing else ''}" if one.rows else GAP


def _read_devices(memory: str | None, device: str | None, devices: str | None) -> tuple[int, str | None, float | None]:
    """Return the number of cards, and the name or the bytes of each. Raises RecipeError."""
    from llmtune.model.device import CARDS, check_card

    if device is not None:
        check_card(device)
    if devices is None:
        return 1, device, None if memory is None else _read_size(memory, "--memory")
    match = re.fullmatch(r"(?:([0-9]{1,5})\s*[x×]\s*)?(.+)", devices.strip().lower())
    if not match or not int(match[1] or 1) or match[2] == "cpu":
        fix = "Write a number of cards and the memory or name of each: --devices 2x24GB, 8xh100."
        raise RecipeError.of(f"{devices!r} names no cards", "--devices", fix)
    count, each = int(match[1] or 1), match[2]
    if each in CARDS or not each[0].isdecimal():
        check_card(each, "--devices", [*CARDS])
        return count, each, None
    return count, None, _read_size(each, "--devices")


def _read_size(text: str, option: str) -> float:
    """Read bytes such as 24GB or 80GiB. Raises RecipeError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not match or match[2] not in UNITS or not 1e8 <= float(match[1]) * UNITS[match[2]] <= 1e18:
        example = "24GB" if option == "--memory" else "2x24GB"
        raise RecipeError.of(f"{text!r} is not an amount of memory", option, f"Write e.g. {option} {example}.")
    return float(match[1]) * UNITS[match[2]]
