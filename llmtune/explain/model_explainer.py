"""`llmtune explain model`: a model's parts, their shapes, sizes and cost, and which were trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console

from llmtune.display.blocks import Block, Column, KeyValues, Section, Shares, Table, Text
from llmtune.display.console import spinner
from llmtune.display.number_format import count
from llmtune.display.number_format import share as percentage
from llmtune.errors import EnvironmentProblem, first_line
from llmtune.explain.architecture import Architecture, Blocks, describe_architecture
from llmtune.explain.architecture_figure import brief_size, briefly, draw_architecture
from llmtune.explain.explainer import Explainer, Target, figure_block
from llmtune.explain.fake_model import (
    Cost,
    MeasuredBlock,
    UntraceableError,
    build_fake_model,
    choose_lengths,
    count_cost,
    evaluate_cost,
    measure_block,
)
from llmtune.explain.figures import BLUE, LINE, MUTED, ORANGE, figure_settings, save_figure
from llmtune.explain.trained_modules import find_trained, short_module_name
from llmtune.model.config import UNREADABLE

KINDS = {"encoder": "an encoder", "decoder": "a decoder", "encoder-decoder": "an encoder with a decoder"}
COST_NOTE = (
    "Floating-point operations of one forward pass: 2 M K N for a product of [M, K] with [K, N]. “Attention” is "
    "queries times keys and weights times values, over all pairs of positions, including masked ones."
)
TIME_NOTE = "Attention is computed plainly, with all its weights in memory; fused kernels are faster."
STEP = "\u2003"
"""Indentation in a table."""
GROUPS = {"norm": "Norms", "embedding": "Embedding", "positions": "Positions", "linear": "Head"}
"""Headings for counting parameters; branches count under their titles."""


@dataclass
class ModelExplainer(Explainer):
    """Describes a model from its configuration; no weights are loaded."""

    target: Target
    console: Console
    measure: bool = True
    """Whether to time a block on this machine."""

    stem = "model"
    lead = (
        "Words enter at the bottom. A block reads the residual path (the grey line at its left), computes "
        "a change, and adds it at ⊕. The rest passes unchanged. Equal blocks are "
        "drawn once. Right of a box are its parameters; an arrow joins the inputs and outputs "
        "of a matrix."
    )

    def read(self) -> None:
        """Find a run's trained modules; raises EnvironmentProblem if its adapter is missing or damaged."""
        self.title = f"Architecture: {self.target.short_name}"
        self.trained = find_trained(self.target)

    def run(self) -> None:
        """Build the model without weights, describe it, count its cost, and time a block."""
        try:
            fake = build_fake_model(self.target)
        except UNREADABLE as error:
            raise EnvironmentProblem.of(
                f"the model cannot be built from its configuration: {first_line(error)}",
                str(self.target.config.name_or_path),
                "Download the model again; `llmtune doctor` shows the versions on this machine.",
            ) from error
        self.cost: Cost | str
        with spinner(self.console, "reading the architecture"):
            self.architecture = describe_architecture(self.target, fake)
            try:
                self.cost = count_cost(fake, self.architecture.context)
            except UntraceableError as error:
                self.cost = str(error)
        stacks = self.architecture.stacks
        self.measured: MeasuredBlock | str = "no blocks were found" if self.measure else "--no-measure was given"
        if self.measure and stacks:
            blocks = max(stacks[-1].blocks, key=lambda blocks: len(blocks.numbers))
            name, context = blocks.names()[-1], self.architecture.context
            self.measured = measure_block(fake, name, context, self.console)

    @property
    def base(self) -> str | None:
        """The name of a run's base model."""
        return str(self.target.recipe.model.name) if self.target.recipe else None

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        cost, measured = self.cost, self.measured
        flops: dict[str, object] | None = None
        if isinstance(cost, Cost):
            formulas = {name: formula.tolist() for name, formula in asdict(cost).items()}
            lengths = choose_lengths(self.architecture.context)
            flops = {**formulas, "crossing": cost.crossing(), "at": [cost.at(tokens) for tokens in lengths]}
        return {
            **asdict(self.architecture),
            "base": self.base,
            "parameters_by_part": count_parts(self.architecture),
            "trained": self.trained.to_json() if self.trained else None,
            "flops": flops,
            "flops_unknown": cost if isinstance(cost, str) else None,
            "measured": asdict(measured) if isinstance(measured, MeasuredBlock) else None,
            "not_measured": measured if isinstance(measured, str) else None,
        }

    def sections(self, figures: Mapping[str, Path]) -> Iterator[Section]:
        """Yield facts of the model, its parts, and the cost of a text."""
        sizes = sorted(count_parts(self.architecture).items(), key=lambda item: -item[1])
        total = sum(size for _, size in sizes) or 1
        shares = [(name, f"{size:,}  {100 * size / total:.1f} %", size / total) for name, size in sizes]
        drawing = figure_block(figures["model"], f"Architecture of {self.architecture.model_class}")
        yield Section("Overview", [KeyValues(list(self._facts()))])
        yield Section("", [drawing], brief=False)
        yield Section("Where the parameters are", [Shares(shares)], brief=False)
        yield Section("Parts", list(self._part_tables()))
        yield Section("Cost of a text", list(self._cost_blocks(figures)))
        yield Section("Time of a block on this machine", list(self._time_blocks(figures)))

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Yield facts of the model, as names and values."""
        model = self.architecture
        if self.base:
            yield "model", self.base
        yield "kind", KINDS[model.family]
        yield "class", model.model_class
        yield "parameters", count(model.parameters)
        for name, size in model.towers.items() if model.reads_images else ():
            trained = 0 if self.trained is None else self.trained.count_inside(name)
            says = f"{trained:,} trained, the rest frozen" if trained else "frozen"
            yield "reads pictures", f"{name}: {size:,} parameters, {says}"
        if model.towers and not model.reads_images:
            yield "left out", f"{', '.join(model.towers)}: text does not use them"
        if model.width:
            yield "width", count(model.width)
        if model.vocabulary:
            yield "vocabulary", f"{model.vocabulary:,} tokens"
        yield "context", f"{model.context:,} tokens" if model.context else "no limit in its configuration"
        for stack in model.stacks:
            where = f" of the {stack.name}" if len(model.stacks) > 1 else ""
            yield f"positions{where}", "; ".join(stack.orders) or "none found"
        if self.trained is not None:
            yield "trained", self.trained.describe(model.parameters)

    def _part_tables(self) -> Iterator[Block]:
        """Yield a table per stack, from input to output."""
        architecture = self.architecture
        if architecture.untraced:
            reason = f"The model could not run on shapes alone ({architecture.untraced})."
            yield Text(f"{reason} The order of its parts is unknown; shapes and sizes are exact.", "note")
        columns = [Column("part"), Column("shape"), Column("parameters", "number")]
        columns += [Column("trained")] if self.trained else []
        for stack in architecture.stacks:
            rows = [self._row(part.title, part.about, part.parameters, part.names) for part in stack.before]
            for blocks in stack.blocks:
                rows += self._block_rows(blocks)
            rows += [self._row(part.title, part.about, part.parameters, part.names) for part in stack.behind]
            yield Table(columns, rows, stack.name, scroll=True)

    def _row(self, title: str, description: str, size: int, names: Sequence[str]) -> list[str]:
        return [title, description, brief_size(size), *([self.trained.mark(names)] if self.trained else [])]

    def _block_rows(self, blocks: Blocks) -> Iterator[list[str]]:
        again = ", the same weights each time" if blocks.runs > 1 else ""
        times = f"{len(blocks.numbers) * blocks.runs} × block{again}"
        yield self._row(times, blocks.title, blocks.typical, [])
        for part in blocks.parts:
            if part.kind == "norm":
                description = "on the residual path" if part.place == "path" else ""
                yield self._row(f"{STEP}{part.title}", description, part.parameters, [])
                continue
            joined = "in parallel " if part.place == "beside" else "+ "
            yield self._row(f"{STEP}{joined}{part.title}", part.about, 0, [])
            for weights in part.weights:
                name, modules = STEP * 2 + short_module_name(weights.name, part.names), blocks.names(weights.name)
                yield self._row(name, weights.shape, weights.parameters, modules)

    def _cost_blocks(self, figures: Mapping[str, Path]) -> Iterator[Block]:
        cost = self.cost
        if isinstance(cost, str):
            yield Text(f"The cost could not be counted: {cost}.", "note")
            return
        rows = []
        for at in (cost.at(tokens) for tokens in choose_lengths(self.architecture.context)):
            numbers = (operations(at["flops"]), operations(at["flops_per_token"]), percentage(at["attention_share"], 1))
            rows.append([count(at["tokens"]), *numbers])
        names = ("tokens", "a text", "a token", "of it attention")
        yield from map(Text, describe_growth(cost, self.architecture))
        yield Table([Column(name, "number") for name in names], rows, scroll=True)
        yield figure_block(figures["model-cost"], "Cost of a text by its length")
        yield Text(COST_NOTE, "soft")

    def _time_blocks(self, figures: Mapping[str, Path]) -> Iterator[Block]:
        measured = self.measured
        if isinstance(measured, str):
            yield Text(f"Not measured: {measured}.")
            return
        several = "s" if measured.threads > 1 else ""
        threads = f" with {measured.threads} thread{several}" if measured.device == "cpu" else ""
        yield Text(f"One block ({measured.block}) alone on this machine ({measured.device}{threads}), in float32.")
        if len(measured.points) > 1:
            before, after = measured.points[-2:]
            block = after.block_seconds / before.block_seconds
            attention = after.attention_seconds / before.attention_seconds
            times = f"{block:.1f} times as long, its attention {attention:.1f} times"
            yield Text(f"From {before.tokens:,} to {after.tokens:,} tokens the block took {times}.")
        if "model-time" in figures:
            yield figure_block(figures["model-time"], "Time of one block by the length of a text")
        yield Text(TIME_NOTE, "soft")

    def draw(self, folder: Path) -> list[Path]:
        """Draw model.svg, and model-cost.svg and model-time.svg if their numbers are known."""
        cost, measured, context = self.cost, self.measured, self.architecture.context
        files = draw_architecture(folder / "model", self.architecture, self.trained)
        if isinstance(cost, Cost):
            crossing = cost.crossing()
            longest = max(2 * (crossing or 0), min(context or 4096, 32768), 1024)
            lengths = [int(length) for length in np.geomspace(16, longest, 61)]
            lines = {
                "products with weights": [evaluate_cost(cost.others, length) for length in lengths],
                "attention's own products": [evaluate_cost(cost.attention, length) for length in lengths],
            }
            title = "Floating-point operations of a text"
            files += draw_growth(folder / "model-cost", lengths, lines, title, "FLOPs", crossing=crossing)
        if isinstance(measured, MeasuredBlock) and len(measured.points) > 1:
            points = measured.points
            seconds = {
                "a block": [point.block_seconds for point in points],
                "its self-attention": [point.attention_seconds for point in points],
            }
            lengths = [point.tokens for point in points]
            files += draw_growth(folder / "model-time", lengths, seconds, "One block, measured", "seconds")
        return files


def count_parts(architecture: Architecture) -> dict[str, int]:
    """Return parameters by kind of part; they sum to the model's total."""
    counts: Counter[str] = Counter()
    for stack in architecture.stacks:
        for part in (*stack.before, *stack.behind):
            counts[GROUPS.get(part.kind, "Other")] += part.parameters
        for blocks in stack.blocks:
            counts["Positions"] += blocks.bias_table
            for part in blocks.parts:
                title = GROUPS.get(part.kind) or part.kind.capitalize()
                counts[title] += len(blocks.numbers) * part.parameters
    counts["Other"] += architecture.other
    counts["Towers"] += sum(architecture.towers.values()) if architecture.reads_images else 0
    return {name: size for name, size in counts.items() if size}


def describe_growth(cost: Cost, architecture: Architecture) -> Iterator[str]:
    """Describe in sentences how the cost grows."""
    fixed, weights, pairs = cost.total[0], cost.others[1], cost.attention[2]
    if fixed > weights:
        yield f"The part that does not depend on the length costs {operations(fixed)}."
    halves = " (in each half)" if architecture.family == "encoder-decoder" and fixed <= weights else ""
    yield (
        f"A token{halves} costs {operations(weights)} in products with weights, however long the text is, and "
        f"{operations(pairs)} more for each token that attention compares it with."
    )
    crossing, context = cost.crossing(), architecture.context
    if crossing and context and crossing > context:
        yield (
            f"Only at {crossing:,} tokens, beyond the model's context of {context:,}, would attention's own products "
            "cost more than everything else."
        )
    elif crossing:
        yield f"From {crossing:,} tokens on, attention's own products cost more than everything else."


def operations(number: float) -> str:
    """Format a number of floating-point operations."""
    text = briefly(number)
    return f"{text}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"


def draw_growth(
    stem: Path,
    lengths: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    title: str,
    unit: str,
    *,
    crossing: int | None = None,
) -> list[Path]:
    """Draw two lines on logarithmic axes into `stem`.svg, with their crossing; mark points if there are few."""
    with figure_settings([], stem.name):
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        dots = "o" if len(lengths) < 20 else None
        for (name, values), colour in zip(lines.items(), (BLUE, ORANGE), strict=True):
            axes.plot(lengths, values, color=colour, linewidth=1.8, label=name, marker=dots)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: briefly(y)))
        axes.set_title(title, loc="left", weight="bold", fontsize=10)
        axes.set_xlabel("tokens", color=MUTED)
        axes.set_ylabel(unit, color=MUTED)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if crossing:
            axes.axvline(crossing, color=MUTED, linewidth=1, linestyle="--")
            axes.text(crossing, 0.02, f"{crossing:,} tokens: equal ", transform=axes.get_xaxis_transform(), ha="right")
        axes.legend(frameon=False)
        return save_figure(figure, stem, ("svg",))
