"""`llmtune explain adapter`: how far the tuning moved each layer and module of a run's model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console

from llmtune.display.blocks import Cell, Column, KeyValues, Section, Table, Text
from llmtune.display.console import spinner
from llmtune.display.number_format import count, score
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.explain.explainer import BASE, TUNED, Explainer, Target, figure_block, in_percent
from llmtune.explain.fake_model import build_fake_model
from llmtune.explain.figures import Panel, Ticks, Values, draw_heatmaps
from llmtune.explain.trained_modules import (
    PREFIX,
    WORDS,
    Move,
    adapter_moves,
    compare_weights,
    find_trained,
    read_tensor,
    short_module_name,
    tensor_files,
)
from llmtune.model.config import head_is_new
from llmtune.model.towers import find_towers
from llmtune.records import ModelRef

LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
"""A module in a list of layers: the list, the layer's number, the module below it."""
Axis = Literal["layer", "column"]
STRONGEST = 20
CELL_IN, WIDE_IN, MOST_IN, WRITTEN_IN = 0.21, 0.5, 14.0, 0.17
"""Cell height and width; maximum height of a map; minimum height of a cell that shows its number."""
MEASURES: Sequence[tuple[str, str, Callable[[Move], float | None]]] = (
    (
        "Moved, % of the weights’ norm",
        "The norm of the change as a share of the norm of the weights: ‖ΔW‖ / ‖W‖.",
        lambda move: None if move.relative is None else 100 * move.relative,
    ),
    (
        "Effective rank of the change",
        "The number of directions the change uses: exp of the entropy of its singular values. At most the adapter’s "
        "rank. If it is far below, a smaller rank is enough.",
        lambda move: move.effective_rank,
    ),
)
"""Title, meaning and value of a cell."""


@dataclass
class AdapterExplainer(Explainer):
    """Measures how far each module of a run's model moved."""

    target: Target
    """A run."""
    console: Console

    stem = "adapter"
    lead = (
        "How far each part of the model moved in training: the norm of a matrix's change relative to the norm of "
        "the matrix. Strong colours mark the largest changes."
    )

    def read(self) -> None:
        """Check that the run's adapter exists and can be measured."""
        self.title = f"Where the tuning went: {self.target.short_name}"
        trained = find_trained(self.target)  # headers alone
        assert trained is not None, "the command line asks for a run"
        self.trained = trained
        _refuse_other_methods(self.target)

    def run(self) -> None:
        """Measure how far each module moved; list modules in layers first, in order."""
        with spinner(self.console, "measuring"):
            moves = (full_moves if self.trained.method == "full" else lora_moves)(self.target)
            self.moves = arrange(list(moves))
        target = self.target
        assert target.recipe is not None
        assert target.task is not None
        model_ref = ModelRef(target.name, Path(target.config.name_or_path), None, "")
        self.new_head = head_is_new(model_ref, target.recipe, target.task)
        self.model = str(target.recipe.model.name)
        towers = build_fake_model(target).towers if target.takes_images else ()
        moved = [f"{move.module}." for move in self.moves]
        self.frozen = [name for name in towers if not any(one.startswith(f"{name}.") for one in moved)]

    @property
    def in_layers(self) -> list[Move]:
        """The moves of modules in layers, without heads and embeddings."""
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
        """Return a measure by layer and kind of module, [rows, columns]; NaN if missing."""
        cells = {(move.layer, move.column): measure(move) for move in self.in_layers}
        rows = [[cells.get((layer, column)) for column in self.by("column")] for layer in self.by("layer")]
        return np.array(rows, dtype=np.float64)

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        return {
            "run": self.target.short_name,
            "model": self.model,
            "method": self.trained.method,
            "new_head": self.new_head,
            "frozen": self.frozen,
            "relative": together(self.moves),
            "by_layer": self.sizes("layer"),
            "by_module": self.sizes("column"),
            "moves": [{**asdict(move), "relative": move.relative} for move in self.moves],
        }

    def draw(self, folder: Path) -> list[Path]:
        """Draw movement next to effective rank; draw nothing if the model has no layers."""
        if not self.in_layers:
            return []
        rows, columns = Ticks("layer", list(self.by("layer"))), Ticks("", list(self.by("column")))
        cell = (WIDE_IN, min(CELL_IN, MOST_IN / len(rows.labels)))
        written = ".3g" if cell[1] >= WRITTEN_IN else ""
        panels = [Panel(title, self.values(measure), gamma=1.0, written=written) for title, _, measure in MEASURES]
        panels = [panel for panel in panels if not np.isnan(panel.values).all()]
        title = "Where the tuning went"
        return draw_heatmaps(folder / "adapter", panels, rows, columns, title=title, cell=cell)[0]

    def sections(self, figures: Mapping[str, Path]) -> Iterator[Section]:
        """Yield the movement by module and by layer, and the modules that moved most."""
        facts = [("base model", self.model), ("method", self.trained.method)]
        facts += [("frozen", ", ".join(self.frozen))] if self.frozen else []
        yield Section("", [*map(Text, self._summary()), KeyValues(facts)])
        if figures:
            meanings = [Text(f"{title}. {meaning}", "soft") for title, meaning, _ in MEASURES]
            drawn = figure_block(
                figures["adapter"], "How far each module of each layer moved, and in how many directions"
            )
            yield Section("By layer and module", [drawn, *meanings], brief=False)
            columns = [Column("module"), Column("moved", "number"), Column("effective rank", "number")]
            groups = self.by("column").items()
            rows = [[name, in_percent(together(moves)), _mean_rank(moves)] for name, moves in groups]
            yield Section("By module", [Table(columns, rows)])
        strongest = sorted(self.moves, key=lambda move: -(move.relative or 0.0))[:STRONGEST]
        yield Section("Largest changes", [_list_moves(strongest)])
        if beside := [move for move in self.moves if move.layer is None]:
            yield Section("Outside the layers", [_list_moves(beside)], brief=False)

    def _summary(self) -> Iterator[str]:
        """Summarise in sentences which modules moved."""
        whole = together(self.moves)
        if not whole:
            yield "Nothing moved: the adapter adds nothing to the weights."
            return
        full = self.trained.method == "full"
        what = "The weights" if full else f"The {len(self.moves)} trained modules"
        yield f"{what} moved by {in_percent(whole)} of their norm, taken together."
        for kind, sizes in (("layer", self.sizes("layer")), ("module", self.sizes("column"))):
            if len(sizes) > 1:
                order = sorted(sizes, key=lambda key: -sizes[key])
                first, last = (f"{key} ({in_percent(sizes[key])})" for key in (order[0], order[-1]))
                yield f"By {kind}: most in {first}, least in {last}."
        if any(move.rank for move in self.moves):
            meaning = "higher means that the change uses more directions; far below, a smaller rank is enough"
            yield f"Mean effective rank: {_mean_rank(self.moves)}, the most possible ({meaning})."
        if self.new_head:
            yield "This run created the head: it moved from random weights, not from trained ones."


def together(moves: Sequence[Move]) -> float | None:
    """Return how far modules moved together: the norm of all changes divided by the norm of all weights."""
    weight = sum(move.weight**2 for move in moves) ** 0.5
    return sum(move.change**2 for move in moves) ** 0.5 / weight if weight else None


def _refuse_other_methods(target: Target) -> None:
    """Raise RecipeError if the adapter is not a LoRA: a product of two matrices per module."""
    assert target.recipe is not None
    adapter = target.recipe.adapter
    kind = "experts (target_parameters)" if adapter.options.get("target_parameters") else adapter.method
    if kind not in ("lora", "qlora", "full"):
        what = f"only LoRA and full training show how far modules moved; this run has an adapter of {kind}"
        raise RecipeError.of(what, target.name, "`llmtune explain model` and `generation` read this run.")


def lora_moves(target: Target) -> Iterator[Move]:
    """Measure what an adapter adds, and the trained biases, which PEFT changes in place."""
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
                yield compare_weights(plain, "bias", {"bias": biases[plain]}, {"bias": value})


def full_moves(target: Target) -> Iterator[Move]:
    """Compare the tuned weights, read from file one module at a time, with the base in memory.

    Raises EnvironmentProblem if they are missing or damaged.
    """
    folder = Path(target.name) / "weights"
    files = tensor_files(folder)
    if not files:
        raise EnvironmentProblem.of("the run's tuned weights are missing", str(folder), "Run the recipe again.")
    with target.open_model(BASE) as model:
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            owner, _, last = name.rpartition(".")
            modules.setdefault(owner, {})[last] = parameter
        towers = tuple(f"{name}." for name in find_towers(model))
        for owner, before in modules.items():
            names = {last: f"{owner}.{last}".removeprefix(".") for last in before}
            after = {last: read_tensor(files[name], name) for last, name in names.items() if name in files}
            if not after:
                what = f"the tuned weights of {owner} are missing"
                raise EnvironmentProblem.of(what, str(folder), "The folder is incomplete: run the recipe again.")
            move = compare_weights(owner, "weights", before, after)
            if move.change or not f"{owner}.".startswith(towers):  # a frozen tower is named once
                yield move


def arrange(moves: Sequence[Move]) -> list[Move]:
    """Assign each move its layer and kind of module; moves outside layers come last, without either."""
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
        placed.append(replace(move, layer=layer, column=short_module_name(rest, below)))
    return [*placed, *(move for move in moves if move.module not in parts)]


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
