"""`llmtune explain adapter`: how far each layer and module of a run's model moved: where the tuning went."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.explain.explanation import PAGE_STYLE, Explanation, figure_block, in_percent, write_explanation
from llmtune.explain.figures import Panel, Ticks, Values, draw_heatmaps
from llmtune.explain.target import BASE, TUNED, Target
from llmtune.explain.trained_modules import (
    PREFIX,
    WORDS,
    Move,
    adapter_moves,
    compare,
    find_trained,
    read_tensor,
    shorten,
    tensor_files,
)
from llmtune.model.config import head_is_new
from llmtune.records import ModelRef
from llmtune.report.blocks import Cell, Column, KeyValues, Page, Section, Table, Text
from llmtune.report.number_format import count, score
from llmtune.store.atomic_files import explained

LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
"""A module in a list of layers: the list, the layer's number, the module below it."""
Axis = Literal["layer", "column"]
STRONGEST = 20
CELL_IN, WIDE_IN, MOST_IN, WRITTEN_IN = 0.21, 0.5, 14.0, 0.17
"""Height and width of a cell; height of the deepest map; height of a cell from which its number is written into it."""
LEAD = (
    "How far each part of the model moved in training: the size of what was added to a weight matrix against the size "
    "of the matrix itself. Strong colours are where the tuning went."
)
MEASURES: Sequence[tuple[str, str, Callable[[Move], float | None]]] = (
    (
        "Moved, % of the weights’ norm",
        "The norm of the change as a share of the norm of the weights: ‖ΔW‖ / ‖W‖.",
        lambda move: None if move.relative is None else 100 * move.relative,
    ),
    (
        "Effective rank of the change",
        "How many directions the change really uses: exp of the entropy of its singular values. At most the adapter’s "
        "rank; far below it, a smaller rank would have done.",
        lambda move: move.effective_rank,
    ),
)
"""Title, meaning and value of a cell."""


@dataclass(frozen=True)
class MoveMap:
    """How far all modules of a run moved."""

    run: str
    """Of the run's folder."""
    model: str
    method: str
    new_head: bool
    """Whether the head was made by this run, so that it moved from a random start."""
    moves: Sequence[Move]
    """Those in layers first, in their order."""

    @property
    def in_layers(self) -> list[Move]:
        """Those in layers; heads and embeddings stand beside them."""
        return [move for move in self.moves if move.layer is not None]

    def by(self, axis: Axis) -> dict[str, list[Move]]:
        """Return the moves in layers by layer, or by kind of module."""
        groups: dict[str, list[Move]] = {}
        for move in self.in_layers:
            groups.setdefault(str(getattr(move, axis)), []).append(move)
        return groups

    def sizes(self, axis: Axis) -> dict[str, float]:
        """Return how far each layer, or kind of module, moved."""
        return {name: together(moves) or 0.0 for name, moves in self.by(axis).items()}

    def values(self, measure: Callable[[Move], float | None]) -> Values:
        """Return a measure by layer and kind of module, [rows, columns]; NaN where there is none."""
        found = {(move.layer, move.column): measure(move) for move in self.in_layers}
        rows = [[found.get((layer, column)) for column in self.by("column")] for layer in self.by("layer")]
        return np.array(rows, dtype=np.float64)

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        return {
            **{key: value for key, value in vars(self).items() if key != "moves"},
            "relative": together(self.moves),
            "by_layer": self.sizes("layer"),
            "by_module": self.sizes("column"),
            "moves": [{**asdict(move), "relative": move.relative} for move in self.moves],
        }


def together(moves: Sequence[Move]) -> float | None:
    """Return how far modules moved as one: the norm of all their changes against that of all their weights."""
    weight = sum(move.weight**2 for move in moves) ** 0.5
    return sum(move.change**2 for move in moves) ** 0.5 / weight if weight else None


def explain_adapter(target: Target, folder: Path, console: Console) -> Explanation:
    """Write page and figures of a run into `folder`.

    Raises EnvironmentProblem where what was trained is gone or damaged, or the files cannot be written.
    """
    moved = measure(target, console)
    with explained(folder):
        figures = draw_moves(folder / "adapter", moved)
        page = make_page(moved, figures[-1] if figures else None)
        return write_explanation(folder / "adapter", moved.to_json(), page, figures)


def measure(target: Target, console: Console) -> MoveMap:
    """Measure how far each module moved."""
    trained = find_trained(target)  # headers first: a damaged adapter is found before the weights are read
    assert trained is not None
    _refuse_other_methods(target)
    found = _full_moves(target) if trained.method == "full" else _moves(target)
    total, hidden = len(trained.modules) or None, not console.is_terminal
    return arrange(target, list(track(found, "measuring", total, console=console, transient=True, disable=hidden)))


def _refuse_other_methods(target: Target) -> None:
    """Raise RecipeError for an adapter that is no product of two matrices beside each module."""
    assert target.recipe is not None
    adapter = target.recipe.adapter
    kind = "experts (target_parameters)" if adapter.options.get("target_parameters") else adapter.method
    if kind not in ("lora", "qlora", "full"):
        what = f"how far modules moved is told of LoRA and of whole weights, and this run has an adapter of {kind}"
        raise RecipeError.of(what, target.name, "`llmtune explain model` and `generation` read this run.")


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
            plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            if plain in biases and not torch.equal(biases[plain], value):
                yield compare(plain, "bias", {"bias": biases[plain]}, {"bias": value})


def _full_moves(target: Target) -> Iterator[Move]:
    """Hold the tuned weights, a module at a time from their files, against the base in memory.

    Raises EnvironmentProblem where they are gone or damaged.
    """
    folder = Path(target.name) / "weights"
    files = tensor_files(folder)
    if not files:
        raise EnvironmentProblem.of("the run's tuned weights are gone", str(folder), "Run the recipe again.")
    with target.open_model(BASE) as model:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            owner, _, last = name.rpartition(".")
            modules.setdefault(owner, {})[last] = parameter
        for owner, before in modules.items():
            names = {last: f"{owner}.{last}".removeprefix(".") for last in before}
            after = {last: read_tensor(files[name], name) for last, name in names.items() if name in files}
            if not after:
                what = f"the tuned weights of {owner} are missing"
                raise EnvironmentProblem.of(what, str(folder), "The folder is not whole: run again.")
            yield compare(owner, "weights", before, after)


def arrange(target: Target, moves: Sequence[Move]) -> MoveMap:
    """Give each move its layer and its kind of module; what is in no layer stands behind the others, without them."""
    assert target.recipe is not None
    assert target.task is not None
    parts = {move.module: match.groups() for move in moves if (match := LAYER.fullmatch(move.module))}
    below = list(dict.fromkeys(rest for _, _, rest in parts.values()))
    lists = list(dict.fromkeys(prefix for prefix, _, _ in parts.values()))
    halves = {name: next((half for half in ("encoder", "decoder") if half in name.split(".")), name) for name in lists}
    words = halves if len(set(halves.values())) == len(lists) else {name: name for name in lists}
    inside = [move for move in moves if move.module in parts]
    inside.sort(key=lambda move: (lists.index(parts[move.module][0]), int(parts[move.module][1])))
    placed = []
    for move in inside:
        prefix, number, rest = parts[move.module]
        layer = number if len(lists) == 1 else f"{words[prefix]} {number}"
        placed.append(replace(move, layer=layer, column=shorten(rest, below)))
    model_ref = ModelRef(target.name, Path(target.config.name_or_path), None, "")
    return MoveMap(
        run=target.short_name,
        model=str(target.recipe.model.name),
        method=target.recipe.adapter.method,
        new_head=head_is_new(model_ref, target.recipe, target.task),
        moves=[*placed, *(move for move in moves if move.module not in parts)],
    )


# Page and figures


def make_page(moved: MoveMap, figure: Path | None) -> Page:
    """Return what moved: by module, by layer, and which modules moved most."""
    base = KeyValues([("base model", moved.model), ("method", moved.method)])
    sections = [Section("", [*map(Text, summarise(moved)), base])]
    if figure is not None:
        meanings = [Text(f"{title}. {meaning}", "soft") for title, meaning, _ in MEASURES]
        drawn = figure_block(figure, "How far each module of each layer moved, and in how many directions")
        sections.append(Section("By layer and module", [drawn, *meanings], brief=False))
        sections.append(Section("By module", [_by_module(moved)]))
    strongest = sorted(moved.moves, key=lambda move: -(move.relative or 0.0))[:STRONGEST]
    sections.append(Section("What moved most", [_list_moves(strongest)]))
    if beside := [move for move in moved.moves if move.layer is None]:
        sections.append(Section("Outside of the layers", [_list_moves(beside)], brief=False))
    return Page(f"Where the tuning went: {moved.run}", sections, lead=LEAD, navigation=False, style=PAGE_STYLE)


def _by_module(moved: MoveMap) -> Table:
    rows = [[name, in_percent(together(moves)), _mean_rank(moves)] for name, moves in moved.by("column").items()]
    return Table([Column("module"), Column("moved", "number"), Column("effective rank", "number")], rows)


def _mean_rank(moves: Sequence[Move]) -> str:
    ranks = [move.effective_rank for move in moves if move.effective_rank is not None]
    most = max((move.rank or 0 for move in moves), default=0)
    return f"{sum(ranks) / len(ranks):.1f} of {count(most)}" if ranks else "–"


def _list_moves(moves: Sequence[Move]) -> Table:
    rows: list[list[Cell | str]] = []
    for move in moves:
        numbers = [in_percent(move.relative), _mean_rank([move]), score(move.change), score(move.weight)]
        rows.append([Cell(move.module, code=True), WORDS.get(move.kind, move.kind), *numbers])
    numeric = [Column(name, "number") for name in ("moved", "effective rank", "‖ΔW‖", "‖W‖")]
    return Table([Column("module"), Column("trained"), *numeric], rows)


def summarise(moved: MoveMap) -> Iterator[str]:
    """Say in sentences where the tuning went."""
    whole = together(moved.moves)
    if not whole:
        yield "Nothing moved: the adapter adds nothing to the weights."
        return
    what = "The weights" if moved.method == "full" else f"The {len(moved.moves)} modules that were trained"
    yield f"{what} moved by {in_percent(whole)} of their norm, taken together."
    for kind, sizes in (("layer", moved.sizes("layer")), ("module", moved.sizes("column"))):
        if len(sizes) > 1:
            order = sorted(sizes, key=lambda key: -sizes[key])
            first, last = (f"{key} ({in_percent(sizes[key])})" for key in (order[0], order[-1]))
            yield f"By {kind}: most in {first}, least in {last}."
    if any(move.rank for move in moved.moves):
        yield f"A change uses {_mean_rank(moved.moves)} directions at most, on the mean."
    if moved.new_head:
        yield "The head was made by this run: it moved from a random start, not from trained weights."


def draw_moves(stem: Path, moved: MoveMap) -> list[Path]:
    """Draw movement beside effective rank into `stem` with .png and .svg; nothing where there are no layers."""
    if not moved.in_layers:
        return []
    rows, columns = Ticks("layer", list(moved.by("layer"))), Ticks("", list(moved.by("column")))
    cell = (WIDE_IN, min(CELL_IN, MOST_IN / len(rows.labels)))
    written = ".3g" if cell[1] >= WRITTEN_IN else ""
    panels = [Panel(title, moved.values(measure), gamma=1.0, written=written) for title, _, measure in MEASURES]
    panels = [panel for panel in panels if not np.isnan(panel.values).all()]
    return draw_heatmaps(stem, panels, rows, columns, title="Where the tuning went", cell=cell)[0]
