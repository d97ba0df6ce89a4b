"""`llmtune explain model`: the parts of a model, their shapes and sizes, their cost, and which of them were trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from llmtune.errors import EnvironmentProblem
from llmtune.explain.architecture import BIASES, Architecture, Blocks, Stack, describe_model
from llmtune.explain.architecture_figure import draw_architecture
from llmtune.explain.block_timing import Measured, choose_stack, cost_of_block, measure_block
from llmtune.explain.block_wiring import Branch
from llmtune.explain.cost_figures import draw_costs, draw_times
from llmtune.explain.explanation import FIGURE_STYLE, Explanation, figure_block
from llmtune.explain.flops import Cost, UncountableError, choose_lengths, count_cost, value
from llmtune.explain.labels import (
    TITLES,
    brief_size,
    describe_branch,
    describe_extras,
    describe_piece,
    mark,
    number_blocks,
    operations,
    rows_of,
    title_branch,
    title_piece,
)
from llmtune.explain.meta_device_model import build_meta_model
from llmtune.explain.target import Target
from llmtune.explain.trained_modules import TrainedModules, find_trained
from llmtune.model.config import UNREADABLE, first_line
from llmtune.report.blocks import Block, Column, KeyValues, Page, Section, Shares, Table, Text
from llmtune.report.number_format import count, share
from llmtune.report.render_html import write_page
from llmtune.store.atomic_files import explained, write_json

LEAD = (
    "Words come in below and go up. A block reads the residual path (the grey line at its left), works out something "
    "to add, and adds it at ⊕: what a block does not change passes by it untouched. Equal blocks are drawn once. At "
    "the right of a box stand its parameters; where there is an arrow, the inputs and outputs of a matrix."
)
KINDS = {"encoder": "an encoder", "decoder": "a decoder", "encoder-decoder": "an encoder with a decoder"}
COST_NOTE = (
    "Floating-point operations of one forward pass: 2 M K N for a product of [M, K] with [K, N]. Attention is counted "
    "over all pairs of positions, also those that a mask or a window hides. “Attention” is queries times keys and "
    "weights times values; the projections around it are products with weights."
)
TIME_NOTE = (
    "Attention is computed plainly, with all its weights in memory, as the counts assume; fused kernels do the same "
    "products faster, because they move less memory."
)
STEP = "\u2003"
"""A step to the right in a table."""


@dataclass(frozen=True)
class Portrait:
    """All that is shown of a model."""

    name: str
    architecture: Architecture
    trained: TrainedModules | None
    """None of a model that is no run's."""
    cost: Cost | str
    """Or why it could not be counted."""
    measured: Measured | str
    """Or why nothing was measured."""
    base: str | None
    """Of a run, the name of its base model."""

    @property
    def lengths(self) -> list[int]:
        """Lengths of a text at which its cost is shown."""
        return choose_lengths(self.architecture.context)

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        cost, measured = self.cost, self.measured
        return {
            **asdict(self.architecture),
            "base": self.base,
            "parameters_by_part": count_parts(self.architecture),
            "trained": self.trained.to_json() if self.trained else None,
            "flops": cost.to_json(self.lengths) if isinstance(cost, Cost) else None,
            "flops_unknown": cost if isinstance(cost, str) else None,
            "measured": measured.to_json() if isinstance(measured, Measured) else None,
            "not_measured": measured if isinstance(measured, str) else None,
        }


def explain_model(target: Target, folder: Path, console: Console, *, measure: bool = True) -> Explanation:
    """Write page, figures and numbers into `folder`; no weights are loaded.

    Raises:
        EnvironmentProblem: the model cannot be built from its configuration, the run's adapter is gone, or the files
            cannot be written.
    """
    trained = find_trained(target)
    try:
        meta = build_meta_model(target)
    except UNREADABLE as error:
        raise EnvironmentProblem.of(
            f"the model cannot be built from its configuration: {first_line(error)}",
            str(target.config.name_or_path),
            "Get the model again from where it comes from; `llmtune doctor` shows what this machine has.",
        ) from error
    cost: Cost | str
    with console.status("reading the architecture"):
        architecture = describe_model(target, meta)
        try:
            cost = count_cost(meta, architecture)
        except UncountableError as error:
            cost = str(error)
    measured = measure_block(meta, architecture, console) if measure else "--no-measure was given"
    base = str(target.recipe.model.name) if target.recipe else None
    portrait = Portrait(target.short_name, architecture, trained, cost, measured, base)
    values = portrait.to_json()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        figures = draw_figures(portrait, folder)
        page = make_page(portrait, {path.stem: path for path in figures})
        written = [write_page(folder / "model.html", page), *figures, folder / "model.json"]
        write_json(folder / "model.json", values)
    return Explanation(values, page, written)


def count_parts(architecture: Architecture) -> dict[str, int]:
    """Return parameters by kind of part; they add up to all that the model has."""
    counts: Counter[str] = Counter()
    kinds = {"norm": "Norms", "embedding": "Embedding", "positions": "Positions", "linear": "Head"}
    for stack in architecture.stacks:
        for piece in (*stack.before, *stack.behind):
            counts[kinds.get(piece.kind, "Other")] += piece.parameters
        for group in stack.blocks:
            times, rest = len(group.numbers), group.parameters
            parts = [(TITLES[branch.kind], branch.modules) for branch in group.branches()]
            parts.append(("Norms", tuple(norm.module for norm in group.norms())))
            for title, modules in parts:
                size = times * sum(group.sizes.get(name, 0) for name in dict.fromkeys(modules))
                counts[title] += size
                rest -= size
            counts["Positions" if any(name.endswith(BIASES) for name in group.extras) else "Other"] += rest
    counts["Other"] += sum(architecture.other.values())
    return {name: size for name, size in counts.items() if size}


def draw_figures(portrait: Portrait, folder: Path) -> list[Path]:
    """Draw model.svg, and where the cost is known model-cost.svg and model-time.svg."""
    architecture, cost = portrait.architecture, portrait.cost
    files = draw_architecture(folder / "model", architecture, portrait.trained)
    chosen = choose_stack(architecture)
    if isinstance(cost, Cost) and chosen is not None:
        files += draw_costs(folder / "model-cost", cost, architecture.context)
        if isinstance(portrait.measured, Measured) and portrait.measured.points:
            files += draw_times(folder / "model-time", cost_of_block(cost, chosen[0]), portrait.measured)
    return files


# Page


def make_page(portrait: Portrait, figures: dict[str, Path]) -> Page:
    """Return what the model is, its parts, and what a text costs."""
    architecture = portrait.architecture
    sizes = sorted(count_parts(architecture).items(), key=lambda item: -item[1])
    total = sum(size for _, size in sizes) or 1
    shares = [(name, f"{size:,}  {100 * size / total:.1f} %", size / total) for name, size in sizes]
    drawing = figure_block(figures["model"], f"Architecture of {architecture.model_class}")
    sections = [
        Section("What it is", [KeyValues(list(facts(portrait)))]),
        Section("", [drawing], brief=False),
        Section("Where the parameters are", [Shares(shares)], brief=False),
        Section("Parts", list(_part_tables(portrait))),
        Section("What a text costs", list(_cost_blocks(portrait, figures))),
        Section("How long a block takes here", list(_time_blocks(portrait, figures))),
    ]
    title = f"Architecture: {portrait.name}"
    return Page(title, sections, lead=LEAD, navigation=False, style=FIGURE_STYLE)


def facts(portrait: Portrait) -> Iterator[tuple[str, str]]:
    """Yield what the model is, as names and values."""
    model = portrait.architecture
    if portrait.base:
        yield "model", portrait.base
    yield "kind", KINDS[model.family]
    yield "class", model.model_class
    yield "parameters", count(model.parameters)
    if model.width:
        yield "width", count(model.width)
    if model.vocabulary:
        yield "vocabulary", f"{model.vocabulary:,} tokens"
    yield "context", f"{model.context:,} tokens" if model.context else "no end that its configuration states"
    for stack in model.stacks:
        where = f" of the {stack.name}" if len(model.stacks) > 1 else ""
        yield f"positions{where}", "; ".join(stack.orders) or "nothing that was found"
    heads = [piece for stack in model.stacks for piece in stack.behind if piece.kind == "linear"]
    own = any(piece.shape[-1] == model.vocabulary for piece in heads)
    head = "over the vocabulary, with weights of its own" if own else "none over the vocabulary"
    yield "head", "uses the embedding's weights" if model.tied_head else head
    if portrait.trained is not None:
        yield "trained", describe_trained(portrait.trained, model.parameters)


def describe_trained(trained: TrainedModules, parameters: int) -> str:
    """Say what was trained of a model with so many parameters."""
    if trained.method == "full":
        return "all weights (method: full)"
    kinds = Counter(module.kind for module in trained.modules.values())
    words = {"whole": "trained whole", "tokens": "new rows", "bias": "bias"}
    what = ", ".join(f"{words.get(kind, kind)} on {number} modules" for kind, number in kinds.items())
    size = share(trained.parameters, parameters, 2)
    base = "; the base in 4 bits" if trained.method == "qlora" else ""
    return f"{what}: {trained.parameters:,} parameters, {size} of the base's{base}"


def _part_tables(portrait: Portrait) -> Iterator[Block]:
    """Yield a table for each stack, from what comes in down to what goes out."""
    architecture, trained = portrait.architecture, portrait.trained
    if architecture.untraced:
        reason = f"The model could not be run on shapes alone ({architecture.untraced}), so the order of its parts is"
        yield Text(f"{reason} not known; shapes and sizes are.", "note")
    for stack in architecture.stacks:
        rows = []
        for piece in stack.before:
            rows.append(_row(title_piece(piece), describe_piece(piece), piece.parameters, mark([piece.name], trained)))
        for group in stack.blocks:
            rows += _block_rows(group, stack, trained)
        for piece in stack.behind:
            rows.append(_row(title_piece(piece), describe_piece(piece), piece.parameters, mark([piece.name], trained)))
        columns = [Column("part"), Column("shape"), Column("parameters", "number"), Column("trained")]
        yield Table(columns, rows, stack.name)


def _row(name: str, shape: str, size: int, trained: str = "") -> list[str]:
    return [name, shape, brief_size(size) if size else "", trained]


def _block_rows(group: Blocks, stack: Stack, trained: TrainedModules | None) -> Iterator[list[str]]:
    times = len(group.numbers) * max(group.runs, 1)
    again = ", the same weights each time" if group.runs > 1 else ""
    extras = f"; {describe_extras(group)}" if group.extras else ""
    yield _row(f"{times} × block{again}", f"{number_blocks(group)}{extras}", group.typical)
    if group.wiring is None:
        yield _row(f"{STEP}order of parts not known", group.unknown or "", 0)
        names: Sequence[str] = [name for name, size in group.sizes.items() if size]
        yield from (
            _row(STEP * 2 + row.name, row.shape, row.parameters, row.mark) for row in rows_of(names, group, trained)
        )
        return
    for norm in group.wiring.entry:
        yield _row(f"{STEP}{norm.kind}", "", group.sizes.get(norm.module, 0))
    for sublayer in group.wiring.sublayers:
        for number, branch in enumerate(sublayer.branches):
            joined = "+ " if number == 0 else "and at once "
            words = "; ".join(describe_branch(branch, group, stack))
            yield _row(f"{STEP}{joined}{_chain(branch, stack)}", words, 0)
            for row in rows_of(branch.modules, group, trained):
                yield _row(STEP * 2 + row.name, row.shape, row.parameters, row.mark)
        for norm in sublayer.behind:
            yield _row(f"{STEP}{norm.kind}", "on the residual path", group.sizes.get(norm.module, 0))


def _chain(branch: Branch, stack: Stack) -> str:
    """Write the parts of a branch in their order."""
    before, after = ([norm.kind for norm in norms] for norms in (branch.before, branch.after))
    return " → ".join([*before, title_branch(branch, stack), *after])


def _cost_blocks(portrait: Portrait, figures: dict[str, Path]) -> Iterator[Block]:
    cost = portrait.cost
    if isinstance(cost, str):
        yield Text(f"It could not be counted: {cost}.", "note")
        return
    total, pairs = cost.sum(), cost.sum(pairs=True)
    rows = []
    for tokens in portrait.lengths:
        whole = value(total, tokens)
        rows.append([f"{tokens:,}", operations(whole), operations(whole / tokens), share(value(pairs, tokens), whole)])
    names = ("tokens", "a text", "a token", "of it attention")
    yield from map(Text, describe_growth(portrait, cost))
    yield Table([Column(name, "number") for name in names], rows)
    if "model-cost" in figures:
        yield figure_block(figures["model-cost"], "What a text costs by its length")
    yield Text(COST_NOTE, "soft")


def describe_growth(portrait: Portrait, cost: Cost) -> list[str]:
    """Say in sentences how the cost grows."""
    fixed, _, _ = cost.sum()
    weights, pairs = cost.sum(pairs=False)[1], cost.sum(pairs=True)[2]
    sentences = [f"What does not depend on the length costs {operations(fixed)}."] if fixed > weights else []
    halves = " (in each half)" if portrait.architecture.family == "encoder-decoder" and not sentences else ""
    sentences.append(
        f"A token{halves} costs {operations(weights)} in products with weights, however long the text is, and "
        f"{operations(pairs)} more for each token that attention sets it beside."
    )
    crossing, context = cost.crossing(), portrait.architecture.context
    if crossing and context and crossing > context:
        sentences.append(
            f"Only at {crossing:,} tokens, beyond the model's context of {context:,}, would attention's own products "
            "cost more than everything else."
        )
    elif crossing:
        sentences.append(f"From {crossing:,} tokens on, attention's own products cost more than everything else.")
    return sentences


def _time_blocks(portrait: Portrait, figures: dict[str, Path]) -> Iterator[Block]:
    measured = portrait.measured
    if isinstance(measured, str):
        yield Text(f"Not measured: {measured}.")
        return
    yield from map(Text, describe_times(portrait, measured))
    if "model-time" in figures:
        yield figure_block(figures["model-time"], "How long one block takes by the length of a text")
    yield Text(TIME_NOTE, "soft")


def describe_times(portrait: Portrait, measured: Measured) -> list[str]:
    """Say in sentences what was measured."""
    cost, chosen, count = portrait.cost, choose_stack(portrait.architecture), measured.threads
    threads = f" with {count} thread{'s' if count > 1 else ''}" if measured.device == "cpu" else ""
    sentences = [f"One block ({measured.block}) by itself on this machine ({measured.device}{threads}), in float32."]
    if isinstance(cost, Cost) and chosen is not None and measured.points:
        speed = measured.speed(cost_of_block(cost, chosen[0])["block"])
        sentences.append(f"The dots lie on the lines at {operations(speed)} a second, the mean over these lengths.")
    if len(measured.points) > 1:
        before, after = measured.points[-2:]
        block = f"{after.block_seconds / before.block_seconds:.1f} times as long"
        attention = ""
        if after.attention_seconds and before.attention_seconds:
            attention = f", its attention {after.attention_seconds / before.attention_seconds:.1f} times"
        sentences.append(f"From {before.tokens:,} to {after.tokens:,} tokens the block took {block}{attention}.")
    return [*sentences, *([f"Longer texts were left out: {measured.stopped}."] if measured.stopped else [])]
