"""The page of `llmtune explain model`: the drawing, where the parameters are, and the curves of its cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from llmtune.explain.drawing import draw_architecture
from llmtune.explain.flops import value
from llmtune.explain.html_page import asset, fill, write_page
from llmtune.explain.labels import operations
from llmtune.explain.length_cost import choose_stack, cost_of_block
from llmtune.explain.length_curves import draw_costs, draw_measured, rate
from llmtune.explain.svg import write_svg
from llmtune.report.number_format import count, share

if TYPE_CHECKING:
    from llmtune.explain.architecture import Architecture
    from llmtune.explain.model import Portrait

LEAD = (
    "Words come in below and go up. A block reads the residual path (the grey line at its left), works out something "
    "to add, and adds it at ⊕: what a block does not change passes by it untouched. Equal blocks are drawn once. At "
    "the right of a box stand its parameters; where there is an arrow, the inputs and outputs of a matrix."
)
KINDS = {"encoder": "an encoder", "decoder": "a decoder", "encoder-decoder": "an encoder with a decoder"}


def write_model_page(folder: Path, portrait: Portrait) -> list[Path]:
    """Write model.html with all of it, and model.svg, model-cost.svg and model-time.svg by themselves."""
    style = asset("drawing.css")
    drawing = draw_architecture(portrait.architecture, portrait.carriers)
    pictures = {"model": drawing, **draw_curves(portrait)}
    context = {
        "drawing": drawing,
        "facts": facts(portrait),
        "parts": parts(portrait),
        "cost": pictures.get("model-cost"),
        "costs": costs(portrait),
        "crossing": tell_crossing(portrait),
        "uncounted": portrait.uncounted,
        "time": pictures.get("model-time"),
        "times": tell_times(portrait),
        "unmeasured": portrait.unmeasured,
        "unknown": [group.unknown for stack in portrait.architecture.stacks for group in stack.blocks if group.unknown],
        "untraced": portrait.architecture.untraced,
    }
    page = write_page(
        folder / "model.html",
        title=f"Architecture: {portrait.name}",
        lead=LEAD,
        body=fill("model.html.jinja", context),
        style=style + asset("model.css"),
    )
    return [page, *(write_svg(folder / f"{name}.svg", picture, style) for name, picture in pictures.items())]


def draw_curves(portrait: Portrait) -> dict[str, Markup]:
    """Return the curves by the name of their file; none where the cost is not known."""
    architecture, cost = portrait.architecture, portrait.cost
    chosen = choose_stack(architecture)
    if cost is None or chosen is None:
        return {}
    curves = {"model-cost": draw_costs(cost, architecture.context)}
    if portrait.measured is not None and portrait.measured.points:
        curves["model-time"] = draw_measured(cost_of_block(cost, chosen[0]), portrait.measured)
    return curves


def facts(portrait: Portrait) -> list[tuple[str, str]]:
    """Return what the model is, as names and values."""
    model = portrait.architecture
    found = [("model", portrait.model)] if portrait.model else []
    found += [("kind", KINDS[model.family]), ("class", model.model_class), ("parameters", count(model.parameters))]
    found += [("width", count(model.width))] if model.width else []
    found += [("vocabulary", f"{model.vocabulary:,} tokens")] if model.vocabulary else []
    found += [("context", f"{model.context:,} tokens" if model.context else "no end that its configuration states")]
    for stack in model.stacks:
        where = f" of the {stack.name}" if len(model.stacks) > 1 else ""
        found.append((f"positions{where}", "; ".join(stack.orders) or "nothing that was found"))
    found.append(("head", describe_head(model)))
    return [*found, *trained(portrait)]


def describe_head(model: Architecture) -> str:
    """Say whose weights turn a vector into scores over the vocabulary, if any do."""
    if model.tied_head:
        return "uses the embedding's weights"
    pieces = [piece for stack in model.stacks for piece in stack.behind if piece.kind == "linear"]
    own = any(piece.shape[-1] == model.vocabulary for piece in pieces)
    return "over the vocabulary, with weights of its own" if own else "none over the vocabulary"


def trained(portrait: Portrait) -> list[tuple[str, str]]:
    """Say what was trained of a run's model."""
    carriers, model = portrait.carriers, portrait.architecture
    if carriers is None:
        return []
    if carriers.method == "full":
        return [("trained", "all weights (method: full)")]
    kinds: dict[str, int] = {}
    for carrier in carriers.modules.values():
        kinds[carrier.kind] = kinds.get(carrier.kind, 0) + 1
    words = {"whole": "trained whole", "tokens": "new rows", "bias": "bias"}
    told = ", ".join(f"{words.get(kind, kind)} on {number} modules" for kind, number in kinds.items())
    size = share(carriers.parameters, model.parameters, 2)
    base = "; the base in 4 bits" if carriers.method == "qlora" else ""
    return [("trained", f"{told}: {carriers.parameters:,} parameters, {size} of the base's{base}")]


def parts(portrait: Portrait) -> list[dict[str, Any]]:
    """Return parameters by part, the largest first, with their share."""
    sizes = sorted(portrait.sizes.items(), key=lambda item: -item[1])
    total = sum(size for _, size in sizes) or 1
    return [{"name": name, "size": size, "share": size / total} for name, size in sizes]


def costs(portrait: Portrait) -> list[dict[str, str]]:
    """Return rows of a table: what a text of some length costs."""
    cost = portrait.cost
    if cost is None:
        return []
    rows = []
    for tokens in portrait.lengths:
        total, pairs = value(cost.sum(), tokens), value(cost.sum(pairs=True), tokens)
        rows.append(
            {
                "tokens": f"{tokens:,}",
                "total": f"{operations(total)}",
                "token": f"{operations(total / tokens)}",
                "attention": share(pairs, total),
            }
        )
    return rows


def tell_crossing(portrait: Portrait) -> list[str]:
    """Say in sentences how the cost grows."""
    cost = portrait.cost
    if cost is None:
        return []
    fixed, _, _ = cost.sum()
    _, weights, _ = cost.sum(pairs=False)
    _, _, pairs = cost.sum(pairs=True)
    told = [f"What does not depend on the length costs {operations(fixed)}."] if fixed > weights else []
    halves = " (in each half)" if portrait.architecture.family == "encoder-decoder" and not told else ""
    told.append(
        f"A token{halves} costs {operations(weights)} in products with weights, however long the text is, and "
        f"{operations(pairs)} more for each token that attention sets it beside."
    )
    crossing, context = cost.crossing(), portrait.architecture.context
    if crossing and context and crossing > context:
        told.append(
            f"Only at {crossing:,} tokens, beyond the model's context of {context:,}, would attention's own products "
            "cost more than everything else."
        )
    elif crossing:
        told.append(f"From {crossing:,} tokens on, attention's own products cost more than everything else.")
    return told


def tell_times(portrait: Portrait) -> list[str]:
    """Say in sentences what was measured."""
    measured, cost, chosen = portrait.measured, portrait.cost, choose_stack(portrait.architecture)
    if measured is None or not measured.points:
        return []
    threads = (
        f" with {measured.threads} thread{'s' if measured.threads > 1 else ''}" if measured.device == "cpu" else ""
    )
    told = [f"One block ({measured.block}) by itself on this machine ({measured.device}{threads}), in float32."]
    if cost is not None and chosen is not None:
        speed = rate(cost_of_block(cost, chosen[0]), measured)
        told.append(f"The dots lie on the lines at {operations(speed)} a second, the mean over these lengths.")
    if len(measured.points) > 1:
        before, after = measured.points[-2:]
        block = after.block_seconds / before.block_seconds
        told.append(
            f"From {before.tokens:,} to {after.tokens:,} tokens the block took {block:.1f} times as long"
            + (
                f", its attention {after.attention_seconds / before.attention_seconds:.1f} times."
                if after.attention_seconds and before.attention_seconds
                else "."
            )
        )
    return [*told, *([f"Longer texts were left out: {measured.stopped}."] if measured.stopped else [])]
