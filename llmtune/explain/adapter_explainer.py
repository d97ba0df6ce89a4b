"""`llmtune explain adapter`: how far each layer and module of a run's model moved: where the tuning went."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.explain.explanation import Explanation
from llmtune.explain.figures import Panel, Ticks, Values, draw_heatmaps
from llmtune.explain.target import BASE, TUNED, Target
from llmtune.explain.trained_modules import find_trained, shorten
from llmtune.explain.weight_delta import Move, adapter_moves, compare
from llmtune.model.heads import head_is_new
from llmtune.records import ModelRef
from llmtune.report.blocks import Block, Cell, Column, Heatmap, KeyValues, Page, Section, Table, Text
from llmtune.report.number_format import count, score
from llmtune.report.render_html import write_page
from llmtune.store.atomic_files import explained, write_json
from llmtune.store.run_folder import MANIFEST

LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
"""A module in a list of layers: the list, the layer's number, the module below it."""
HALVES = ("encoder", "decoder")
STRONGEST = 20
BARS = " ▁▂▃▄▅▆▇█"
CELL_IN, WIDE_IN, MOST_IN, WRITTEN_IN = 0.21, 0.5, 14.0, 0.17
"""Height and width of a cell; height of the deepest map; height of a cell from which its number is written into it."""
LEAD = (
    "How far each part of the model moved in training: the size of what was added to a weight matrix against the size "
    "of the matrix itself. Strong colours are where the tuning went."
)
KINDS = {
    "LoRA": "LoRA",
    "DoRA": "DoRA",
    "whole": "trained whole",
    "tokens": "new rows",
    "bias": "bias",
    "weights": "all weights",
}
MEASURES: Sequence[tuple[str, str, Callable[[Move], float | None], str]] = (
    (
        "Moved, % of the weights’ norm: ‖ΔW‖ / ‖W‖",
        "The norm of the change as a share of the norm of the weights.",
        lambda move: None if move.relative is None else 100 * move.relative,
        ".3g",
    ),
    (
        "Effective rank of the change: exp H(σ)",
        "How many directions the change really uses: exp of the entropy of its singular values. At most the adapter’s "
        "rank; far below it, a smaller rank would have done.",
        lambda move: move.effective_rank,
        ".3g",
    ),
    ("Size of the change: ‖ΔW‖", "The Frobenius norm of the change by itself.", lambda move: move.change, ".3g"),
)
"""Title, meaning, value of a cell and its format."""


@dataclass(frozen=True)
class MoveMap:
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

    def values(self, measure: Callable[[Move], float | None]) -> Values:
        """Return a measure by layer and column, [rows, columns]; NaN where there is none."""
        values = np.full((len(self.rows), len(self.columns)), np.nan)
        for (row, column), move in self.cells.items():
            value = measure(move)
            values[self.rows.index(row), self.columns.index(column)] = np.nan if value is None else value
        return values

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        moves = [(row, column, move) for (row, column), move in self.cells.items()]
        everywhere = [*moves, *((None, None, move) for move in self.beside)]
        return {
            "run": self.name,
            "model": self.model,
            "method": self.method,
            "relative": together(self.moves),
            "by_layer": {row: together(self.of_row(row)) for row in self.rows},
            "by_module": {column: together(self.of_column(column)) for column in self.columns},
            "new_head": self.new_head,
            "moves": [
                {"layer": row, "column": column, **asdict(move), "relative": move.relative}
                for row, column, move in everywhere
            ],
        }


def together(moves: Iterable[Move]) -> float | None:
    """Return how far modules moved as one: the norm of all their changes against that of all their weights."""
    found = list(moves)
    weight = sum(move.weight**2 for move in found) ** 0.5
    return sum(move.change**2 for move in found) ** 0.5 / weight if weight else None


def explain_adapter(target: Target, folder: Path, console: Console) -> Explanation:
    """Write page, figures and numbers into `folder`.

    Raises:
        RecipeError: `target` is no run.
        EnvironmentProblem: what was trained is gone or damaged, or the files cannot be written.
    """
    moved = measure(target, console)
    page = make_page(moved)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = [write_page(folder / "adapter.html", page), *draw_moves(folder / "adapter", moved)]
        write_json(folder / "adapter.json", moved.to_json())
    return Explanation(moved.to_json(), page, [*written, folder / "adapter.json"])


def measure(target: Target, console: Console) -> MoveMap:
    """Measure how far each module moved."""
    require_run(Path(target.name))
    assert target.recipe is not None
    trained = find_trained(target)  # headers first: a damaged adapter is found before the weights are read
    full = target.recipe.adapter.method == "full"
    total = len(trained.modules) if trained and not full else None
    moves = track(
        _full_moves(target) if full else _moves(target),
        "measuring",
        total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    return arrange(target, list(moves))


def require_run(path: Path) -> None:
    """Raise RecipeError unless `path` is a run's folder: only a run knows what was trained."""
    if (path / MANIFEST).is_file():
        return
    what = "a model by itself has no adapter to look at: only a run knows what was trained"
    if path.is_dir() and not (path / "config.json").is_file():
        what = "not a run folder: it has no run.json"
    fix = "Name the folder that `llmtune run` printed (runs/<name>-<hash>); `llmtune explain model` shows any model."
    raise RecipeError.of(what, str(path), fix)


def _moves(target: Target) -> Iterator[Move]:
    assert target.recipe is not None
    biases: dict[str, torch.Tensor] = {}
    if target.recipe.adapter.bias != "none":
        with target.open_model(BASE) as model:
            parameters = list(model.named_parameters())
            biases = {name: value.detach().clone() for name, value in parameters if name.split(".")[-1] == "bias"}
    with target.open_model(TUNED) as model:
        yield from adapter_moves(model)
        for name, value in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if plain in biases and not torch.equal(biases[plain], value):
                yield compare(plain, "bias", {"bias": biases[plain]}, {"bias": value})


def _full_moves(target: Target) -> Iterator[Move]:
    """Hold the tuned weights, a module at a time from their files, against the base in memory.

    Raises EnvironmentProblem where they are gone or damaged.
    """
    folder = Path(target.name) / "weights"
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise EnvironmentProblem.of("the run's tuned weights are gone", str(folder), "Run the recipe again.")
    with target.open_model(BASE) as model:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            owner, _, last = name.rpartition(".")
            modules.setdefault(owner, {})[last] = parameter
        for owner, before in modules.items():
            names = {last: f"{owner}.{last}" if owner else last for last in before}
            after = {last: _read(files[name], name) for last, name in names.items() if name in files}
            if not after:
                what = f"the tuned weights of {owner} are missing"
                raise EnvironmentProblem.of(what, str(folder), "The folder is not whole: run again.")
            yield compare(owner, "weights", {last: before[last] for last in after}, after)


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(str(path), "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def arrange(target: Target, moves: Sequence[Move]) -> MoveMap:
    """Put moves into rows (layers) and columns (kinds of modules); what is in no layer stands apart."""
    assert target.recipe is not None
    assert target.task is not None
    parts = {move.module: match.groups() for move in moves if (match := LAYER.fullmatch(move.module))}
    below = list(dict.fromkeys(rest for _, _, rest in parts.values()))
    short = {rest: shorten(rest, below) for rest in below}
    lists = list(dict.fromkeys(prefix for prefix, _, _ in parts.values()))
    order = sorted({(lists.index(prefix), int(number)) for prefix, number, _ in parts.values()})
    rows = {(prefix, number): _name_row(lists[prefix], number, lists) for prefix, number in order}
    cells: dict[tuple[str, str], Move] = {}
    for move in moves:
        if move.module in parts:
            prefix, number, rest = parts[move.module]
            cells[rows[lists.index(prefix), int(number)], short[rest]] = move
    model_ref = ModelRef(target.name, Path(target.config.name_or_path), None, "")
    return MoveMap(
        name=target.short_name,
        model=str(target.recipe.model.name),
        method=target.recipe.adapter.method,
        rows=tuple(rows.values()),
        columns=tuple(short.values()),
        cells=cells,
        beside=tuple(move for move in moves if move.module not in parts),
        new_head=head_is_new(model_ref, target.recipe, target.task),
    )


def _name_row(prefix: str, number: int, lists: Sequence[str]) -> str:
    if len(lists) == 1:
        return str(number)
    halves = {name: next((half for half in HALVES if half in name.split(".")), name) for name in lists}
    known = len(set(halves.values())) == len(lists)
    return f"{halves[prefix] if known else prefix} {number}"


# Page and figures


def make_page(moved: MoveMap) -> Page:
    """Return what moved: by module, by layer, and which modules moved most."""
    base = KeyValues([("base model", moved.model), ("method", moved.method)])
    sections = [Section("", [*map(Text, summarise(moved)), base])]
    if moved.rows:
        sections.append(Section("By layer and module", _heatmaps(moved), brief=False))
        sections.append(Section("By module", [_by_module(moved)]))
    if moved.beside:
        sections.append(Section("Outside of the layers", [_list_moves(moved.beside)], brief=False))
    strongest = sorted(moved.moves, key=lambda move: -(move.relative or 0.0))[:STRONGEST]
    sections.append(Section("What moved most", [_list_moves(strongest)]))
    return Page(f"Where the tuning went: {moved.name}", sections, lead=LEAD, navigation=False)


def _heatmaps(moved: MoveMap) -> list[Block]:
    blocks: list[Block] = []
    for title, meaning, value_of, form in MEASURES:
        values = moved.values(value_of)
        if np.isnan(values).all():
            continue
        most = float(np.nanmax(values)) or 1.0
        shares = [[None if np.isnan(value) else value / most for value in row] for row in values.tolist()]
        texts = [["" if np.isnan(value) else format(value, form) for value in row] for row in values.tolist()]
        label = f"{title}, by layer and module"
        blocks += [Text(meaning, "soft"), Heatmap(moved.rows, moved.columns, shares, label, title, "layer", "", texts)]
    return blocks


def _by_module(moved: MoveMap) -> Table:
    rows = []
    for column in moved.columns:
        moves = moved.of_column(column)
        ranks = [move.effective_rank for move in moves if move.effective_rank is not None]
        most = max((move.rank or 0 for move in moves), default=0)
        rank = f"{sum(ranks) / len(ranks):.1f} of {most}" if ranks else "–"
        rows.append([column, in_percent(together(moves)), rank, sparkline(moved, column)])
    layers = f"layer {moved.rows[0]} to {moved.rows[-1]}"
    return Table(
        [Column("module"), Column("moved", "number"), Column("effective rank", "number"), Column(layers)], rows
    )


def _list_moves(moves: Sequence[Move]) -> Table:
    rows: list[list[Cell | str]] = []
    for move in moves:
        rank = "–" if move.effective_rank is None else f"{move.effective_rank:.1f} of {move.rank}"
        numbers = [in_percent(move.relative), rank, score(move.change), score(move.weight)]
        rows.append([Cell(move.module, code=True), KINDS[move.kind], *numbers])
    numeric = [Column(name, "number") for name in ("moved", "effective rank", "‖ΔW‖", "‖W‖")]
    return Table([Column("module"), Column("trained"), *numeric], rows)


def in_percent(value: float | None) -> str:
    """Write a share in percent, in three digits."""
    return "–" if value is None else f"{100 * value:.3g} %"


def sparkline(moved: MoveMap, column: str) -> str:
    """Draw how far one kind of module moved from layer to layer, against the farthest of all."""
    most = max((move.relative or 0.0 for move in moved.cells.values()), default=0.0) or 1.0
    moves = (moved.cells.get((row, column)) for row in moved.rows)
    return "".join(BARS[round((move.relative or 0.0) / most * (len(BARS) - 1)) if move else 0] for move in moves)


def summarise(moved: MoveMap) -> list[str]:
    """Say in sentences where the tuning went."""
    whole = together(moved.moves)
    if not whole:
        return ["Nothing moved: the adapter adds nothing to the weights."]
    what = "The weights" if moved.method == "full" else f"The {len(moved.moves)} modules that were trained"
    sentences = [f"{what} moved by {in_percent(whole)} of their norm, taken together."]
    by_layer = {f"layer {row}": together(moved.of_row(row)) or 0.0 for row in moved.rows}
    by_module = {column: together(moved.of_column(column)) or 0.0 for column in moved.columns}
    spans = []
    for name, sizes in (("layer", by_layer), ("module", by_module)):
        if len(sizes) > 1:
            order = sorted(sizes, key=lambda key: -sizes[key])
            first, last = (f"{key} ({in_percent(sizes[key])})" for key in (order[0], order[-1]))
            spans.append(f"by {name} most in {first} and least in {last}")
    if spans:
        sentences.append(f"B{'; '.join(spans)[1:]}.")
    if moved.cells:
        (row, column), most = max(moved.cells.items(), key=lambda cell: cell[1].relative or 0.0)
        sentences.append(f"The farthest single move is that of {column} in layer {row} ({in_percent(most.relative)}).")
    ranked = [move for move in moved.moves if move.effective_rank is not None and move.rank]
    if ranked:
        mean = sum(move.effective_rank or 0.0 for move in ranked) / len(ranked)
        widest = max(move.rank or 0 for move in ranked)
        sentences.append(f"A change uses {mean:.1f} directions on the mean, of at most {count(widest)}.")
    if moved.new_head:
        sentences.append("The head was made by this run: it moved from a random start, not from trained weights.")
    return sentences


def draw_moves(stem: Path, moved: MoveMap) -> list[Path]:
    """Draw movement beside effective rank into `stem` with .png and .svg; nothing where there are no layers."""
    if not moved.rows:
        return []
    cell = (WIDE_IN, min(CELL_IN, MOST_IN / len(moved.rows)))
    panels = [
        Panel(title.partition(":")[0], moved.values(value_of), gamma=1.0, written=form if cell[1] >= WRITTEN_IN else "")
        for title, _, value_of, form in MEASURES[:2]
    ]
    panels = [panel for panel in panels if not np.isnan(panel.values).all()]
    rows, columns = Ticks("layer", moved.rows), Ticks("", moved.columns)
    return draw_heatmaps(stem, panels, rows, columns, title="Where the tuning went", cell=cell)[0]
