"""`llmtune explain adapter`: how far each layer and module of a run's model moved: where the tuning went."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from safetensors import safe_open

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.explain.adapter_page import write_adapter_page
from llmtune.explain.adapter_picture import draw_moves
from llmtune.explain.adapter_weights import find_carriers
from llmtune.explain.labels import shorten
from llmtune.explain.target import BASE, TUNED, Subject
from llmtune.explain.weight_delta import Move, adapter_moves, compare
from llmtune.model.heads import head_is_new
from llmtune.records import ModelRef
from llmtune.store.atomic_files import explained, write_json
from llmtune.store.run_folder import MANIFEST

LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
"""A module in a list of layers: the list, the layer's number, the module below it."""
HALVES = ("encoder", "decoder")


@dataclass(frozen=True)
class Map:
    """Moves by layer and kind of module."""

    name: str
    """Of the run's folder."""
    model: str
    method: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Move]
    beside: tuple[Move, ...]
    """Outside of the layers: heads, embeddings."""
    new_head: bool
    """Whether the head was made by this run, so that it moved from a random start."""

    @property
    def moves(self) -> list[Move]:
        """All of them."""
        return [*self.cells.values(), *self.beside]

    def of_row(self, row: str) -> list[Move]:
        """The moves in one layer."""
        return [move for (name, _), move in self.cells.items() if name == row]

    def of_column(self, column: str) -> list[Move]:
        """The moves of one kind of module."""
        return [move for (_, name), move in self.cells.items() if name == column]

    def as_facts(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "run": self.name,
            "model": self.model,
            "method": self.method,
            "relative": together(self.moves),
            "by_layer": {row: together(self.of_row(row)) for row in self.rows},
            "by_module": {column: together(self.of_column(column)) for column in self.columns},
            "new_head": self.new_head,
            "moves": [{"layer": row, "column": column, **tell(move)} for (row, column), move in self.cells.items()]
            + [{"layer": None, "column": None, **tell(move)} for move in self.beside],
        }


def tell(move: Move) -> dict[str, Any]:
    """Return a move as JSON values."""
    return {**asdict(move), "relative": move.relative}


def together(moves: Iterable[Move]) -> float | None:
    """Return how far modules moved as one: the norm of all their changes against that of all their weights."""
    found = list(moves)
    weight = sum(move.weight**2 for move in found) ** 0.5
    return sum(move.change**2 for move in found) ** 0.5 / weight if weight else None


def explain_adapter(subject: Subject, folder: Path, console: Console) -> tuple[Map, dict[str, Any], list[Path]]:
    """Write page, pictures and numbers into `folder`.

    Returns:
        What was found out, the same as JSON values, and the files.

    Raises:
        RecipeError: `subject` is no run.
        EnvironmentProblem: what was trained is gone or damaged, or the files cannot be written.
    """
    require_run(Path(subject.name))
    assert subject.recipe is not None
    find_carriers(subject)  # headers first: a damaged adapter is found before the weights are read
    with _progress(console) as bars:
        moves = list(_full_moves(subject, bars) if subject.recipe.adapter.method == "full" else _moves(subject, bars))
    found = arrange(subject, moves)
    told = found.as_facts()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [write_adapter_page(folder / "adapter.html", found), *draw_moves(folder / "adapter", found)]
        write_json(folder / "adapter.json", told)
    return found, told, [*written, folder / "adapter.json"]


def require_run(path: Path) -> None:
    """Raise RecipeError unless `path` is a run's folder: only a run knows what was trained."""
    if (path / MANIFEST).is_file():
        return
    what = "a model by itself has no adapter to look at: only a run knows what was trained"
    if path.is_dir() and not (path / "config.json").is_file():
        what = "not a run folder: it has no run.json"
    fix = "Name the folder that `llmtune run` printed (runs/<name>-<hash>); `llmtune explain model` shows any model."
    raise RecipeError.of(what, str(path), fix)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars


def _moves(subject: Subject, bars: Progress) -> Iterator[Move]:
    assert subject.recipe is not None
    biases: dict[str, torch.Tensor] = {}
    if subject.recipe.adapter.bias != "none":
        with subject.open_side(BASE) as model:
            biases = {name: value.detach().clone() for name, value in model.named_parameters() if _is_bias(name)}
    with subject.open_side(TUNED) as model:
        carriers = find_carriers(subject)
        bar = bars.add_task("", total=len(carriers.modules) if carriers else None)
        for move in adapter_moves(model):
            yield move
            bars.advance(bar)
        for name, value in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if plain in biases and not torch.equal(biases[plain], value):
                yield compare(plain, "bias", {"bias": biases[plain]}, {"bias": value})


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _full_moves(subject: Subject, bars: Progress) -> Iterator[Move]:
    """Hold the tuned weights, a module at a time from their files, against the base in memory.

    Raises EnvironmentProblem where they are gone or damaged.
    """
    folder = Path(subject.name) / "weights"
    places = _find_tensors(folder)
    with subject.open_side(BASE) as model:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            owner, _, last = name.rpartition(".")
            modules.setdefault(owner, {})[last] = parameter
        bar = bars.add_task("", total=len(modules))
        for owner, before in modules.items():
            names = {last: f"{owner}.{last}" if owner else last for last in before}
            after = {last: _read(places[name], name) for last, name in names.items() if name in places}
            if not after:
                raise EnvironmentProblem.of(
                    f"the tuned weights of {owner} are missing", str(folder), "The folder is not whole: run again."
                )
            yield compare(owner, "weights", {last: before[last] for last in after}, after)
            bars.advance(bar)


def _find_tensors(folder: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    if not places:
        raise EnvironmentProblem.of("the run's tuned weights are gone", str(folder), "Run the recipe again.")
    return places


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(str(path), "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def arrange(subject: Subject, moves: Sequence[Move]) -> Map:
    """Put moves into rows (layers) and columns (kinds of modules); what is in no layer stands apart."""
    assert subject.recipe is not None
    assert subject.task is not None
    placed = {move.module: match.groups() for move in moves if (match := LAYER.fullmatch(move.module))}
    below = list(dict.fromkeys(rest for _, _, rest in placed.values()))
    short = {rest: shorten(rest, below) for rest in below}
    lists = list(dict.fromkeys(prefix for prefix, _, _ in placed.values()))
    order = sorted({(lists.index(prefix), int(number)) for prefix, number, _ in placed.values()})
    rows = {(prefix, number): _name_row(lists[prefix], number, lists) for prefix, number in order}
    cells = {
        (rows[lists.index(placed[move.module][0]), int(placed[move.module][1])], short[placed[move.module][2]]): move
        for move in moves
        if move.module in placed
    }
    place = ModelRef(subject.name, Path(subject.config.name_or_path), None, "")
    return Map(
        name=Path(subject.name).name,
        model=str(subject.recipe.model.name),
        method=subject.recipe.adapter.method,
        rows=tuple(rows.values()),
        columns=tuple(short.values()),
        cells=cells,
        beside=tuple(move for move in moves if move.module not in placed),
        new_head=head_is_new(place, subject.recipe, subject.task),
    )


def _name_row(prefix: str, number: int, lists: Sequence[str]) -> str:
    if len(lists) == 1:
        return str(number)
    halves = {name: next((half for half in HALVES if half in name.split(".")), name) for name in lists}
    known = len(set(halves.values())) == len(lists)
    return f"{halves[prefix] if known else prefix} {number}"
