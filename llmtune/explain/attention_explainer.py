"""`llmtune explain attention`: which words look at which, by layer and head; base, tuned and the difference.

Shapes: Q queries (rows), T keys (columns).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from llmtune.errors import RecipeError
from llmtune.explain.attention_capture import CROSS, Kind, attend, shape_of
from llmtune.explain.attention_figures import STEM, draw_figures
from llmtune.explain.attention_graph import find_threshold
from llmtune.explain.attention_page import attention_page
from llmtune.explain.attention_summary import (
    MEAN,
    AttentionMaps,
    Line,
    Lines,
    Mask,
    Matrix,
    among_words,
    most_telling_layer,
    title_of,
)
from llmtune.explain.attention_view import DIFFERENCE, AttentionOptions, AttentionView, Selection, Shape, select
from llmtune.explain.decoder_target import decode_target
from llmtune.explain.explanation import Explanation
from llmtune.explain.inputs import AttentionRequest, ModelInputs, read_text
from llmtune.explain.target import Target
from llmtune.explain.token_text import label, name_tokens
from llmtune.report.blocks import Block, Column, Section, Table, Text
from llmtune.report.number_format import signed
from llmtune.report.render_html import write_page
from llmtune.store.atomic_files import explained

KEPT_BYTES = 2**30
"""Of the heads of all layers and models; where they are more, only those of the layer that is named are kept."""
STRONGEST = 3
"""Pairs of words that are listed of each layer."""
ISOLATE, POP = "\u2068", "\u2069"
"""Around words that may be written from right to left, so that they leave what is beside them in its place."""


def explain_attention(
    target: Target, request: AttentionRequest, options: AttentionOptions, out: Path, console: Console
) -> Explanation:
    """Show the attention on one text: words, the strongest pairs of each layer, figures and a page in `out`.

    Raises:
        RecipeError: an unknown layer, head or kind, or an option that is missing or that has no use.
        DataError: the text is empty or too long, or a recording cannot be read.
        EnvironmentProblem: the model is gone, or does not show its attention.
    """
    shape = shape_of(target.config, target.family)
    selection = select(shape, options)
    inputs = read_text(target, request)
    if inputs.note:
        console.print(f"attention: {inputs.note}", markup=False)
    maps, lines, answer = capture(target, inputs, request, selection, shape, console)
    shown, base = maps[target.models[-1]], maps[target.models[0]] if len(maps) > 1 else None
    check_layer(selection, shown)
    layers = {kind: _choose_layer(selection, shown, base, kind) for kind in selection.kinds}
    view = AttentionView(target, maps, lines, selection, layers, {})
    thresholds = {kind: _threshold(view, kind) if options.threshold is None else options.threshold for kind in layers}
    view = AttentionView(target, maps, lines, selection, layers, thresholds)
    summaries = {kind: [summarise(view, kind, number) for number in view.numbers(kind)] for kind in layers}
    page = attention_page(view, [Section("Strongest between words", list(make_tables(view, summaries)))])
    with console.status("drawing"), explained(out):
        figures = draw_figures(view, options, out, console)
        path = write_page(out / f"{STEM}.html", page)
    return Explanation(to_json(view, summaries, answer), page, [path, *figures])


def capture(
    target: Target,
    inputs: ModelInputs,
    request: AttentionRequest,
    selection: Selection,
    shape: Shape,
    console: Console,
) -> tuple[dict[str, AttentionMaps], Lines, str | None]:
    """Run each model once on the same tokens; returns what was kept of each, the words, and what the decoder wrote."""
    maps: dict[str, AttentionMaps] = {}
    source = inputs.frames or Line.of(name_tokens(target.processor, inputs.ids))
    lines, answer, tensors = _lines(source, None, request.words), None, inputs.text_tensors
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        for name in target.models:
            bar = bars.add_task(f"attention: {name}", total=sum(layers for layers, _ in shape.values()))
            with target.open_model(name) as model:
                if inputs.pair is not None and answer is None:
                    ids, answer = decode_target(model, inputs, target, request)
                    tensors["decoder_input_ids"] = torch.tensor([ids])
                    lines = _lines(source, Line.of(name_tokens(target.processor, ids)), request.words)
                    if not inputs.pair.target:
                        what = f"target: {answer!r}, the {name}'s own answer; --target gives another"
                        console.print(what, markup=False)
                keep = _keeper(shape, lines, len(target.models), selection)
                maps[name] = AttentionMaps(lines, keep, lambda bar=bar: bars.advance(bar))  # type: ignore[misc]
                attend(model, tensors, target.family, maps[name].add)
    return maps, lines, answer


def _lines(source: Line, written: Line | None, words: bool) -> Lines:
    return Lines(source.by_word(), written and written.by_word()) if words else Lines(source, written)


def _keeper(shape: Shape, lines: Lines, models: int, selection: Selection) -> Callable[[Kind, int], bool]:
    """Return whether a layer's heads are kept: all of them, or where that is too much those of the layer named.

    Raises RecipeError where heads are selected without a layer, and there is no room for all.
    """
    numbers = sum(
        layers * heads * len(lines.of(kind)[0]) * len(lines.of(kind)[1]) for kind, (layers, heads) in shape.items()
    )
    if 4 * models * numbers <= KEPT_BYTES:
        return lambda kind, layer: True
    if selection.layer is None and (selection.heads or isinstance(selection.head, int)):
        what = f"the heads of all layers are {4 * models * numbers / 2**30:.1f} GiB on this text: too many to keep"
        raise RecipeError.of(what, "--layer", "Name a layer, or give a shorter text.")
    return lambda kind, layer: layer == selection.layer


def check_layer(selection: Selection, maps: AttentionMaps) -> None:
    """Raise RecipeError for a layer that has no attention: in some models only every fourth layer has."""
    for kind in selection.kinds:
        known = maps.layers.get(kind, {})
        if selection.layer is not None and selection.layer not in known:
            fix = f"Those that have: {', '.join(map(str, sorted(known)))}."
            raise RecipeError.of(f"layer {selection.layer} has no {kind} attention", "--layer", fix)


def _choose_layer(selection: Selection, maps: AttentionMaps, base: AttentionMaps | None, kind: Kind) -> int:
    if selection.layer is not None:
        return selection.layer
    words_QT = among_words(*maps.lines.of(kind), kind)
    return most_telling_layer(maps.layers[kind], base.layers[kind] if base else None, words_QT)


def _threshold(view: AttentionView, kind: Kind) -> float:
    return find_threshold(view.drawn(view.target.models[-1], kind), among_words(*view.lines.of(kind), kind))


# What each layer looks at


Pair = TypedDict("Pair", {"from": str, "to": str, "row": int, "column": int, "weight": float})
"""A word, and one that it looks at."""


class LayerSummary(TypedDict, total=False):
    """The strongest pairs of words of a layer's mean, and where the rest goes; of a run also what moved most."""

    layer: int
    strongest: list[Pair]
    among_words: float
    itself: float
    """The share of each token's attention to itself; not of cross-attention, as the next one."""
    first: float
    changed_most: list[Pair]
    mean_change: float


def summarise(view: AttentionView, kind: Kind, number: int) -> LayerSummary:
    """Return what one layer looks at."""
    rows, columns = view.lines.of(kind)
    mean_QT = view.weights(view.target.models[-1], kind, number, MEAN)
    assert mean_QT is not None, "means are always kept"
    words_QT = among_words(rows, columns, kind)
    summary = LayerSummary(layer=number, strongest=_strongest(mean_QT, words_QT, rows, columns))
    summary["among_words"] = round(float((mean_QT * words_QT).sum() / len(rows)), 4)
    if kind != CROSS:
        summary["itself"] = round(float(mean_QT.trace() / len(rows)), 4)
        summary["first"] = round(float(mean_QT[:, 0].mean()), 4)
    change_QT = view.weights(DIFFERENCE, kind, number, MEAN) if DIFFERENCE in view.shown else None
    if change_QT is not None:
        summary["changed_most"] = _strongest(change_QT, words_QT, rows, columns)[:1]
        summary["mean_change"] = round(float(np.abs(change_QT).sum() / 2 / len(rows)), 6)
    return summary


def _strongest(weights_QT: Matrix, words_QT: Mask, rows: Line, columns: Line) -> list[Pair]:
    """Return the pairs of words with the largest weights in size."""
    sizes = np.where(words_QT, np.abs(weights_QT), 0)
    order = np.argsort(-sizes, axis=None, kind="stable")[:STRONGEST]
    places = [divmod(int(at), weights_QT.shape[1]) for at in order]
    return [
        {
            "from": label(rows.tokens[i]),
            "to": label(columns.tokens[k]),
            "row": i,
            "column": k,
            "weight": round(float(weights_QT[i, k]), 6),
        }
        for i, k in places
        if sizes[i, k] > 0
    ]


def to_json(
    view: AttentionView, summaries: Mapping[Kind, Sequence[LayerSummary]], answer: str | None
) -> dict[str, object]:
    """Return what was seen as JSON values."""
    lines = {"source": view.lines.source, "target": view.lines.target}
    kinds = {
        kind: {
            "title": title_of(kind, view.target.family),
            "layers": len(view.numbers(kind)),
            "heads": view.heads(kind),
            "shown": {"layer": layer, "head": view.selection.head, "threshold": view.thresholds[kind]},
            "by_layer": list(summaries[kind]),
        }
        for kind, layer in view.layers.items()
    }
    return {
        "name": view.target.name,
        "family": view.target.family,
        "sides": list(view.maps),
        "tokens": {name: [asdict(token) for token in line.tokens] for name, line in lines.items() if line},
        **({"target": answer} if answer is not None else {}),
        "attention": kinds,
    }


def make_tables(view: AttentionView, summaries: Mapping[Kind, Sequence[LayerSummary]]) -> Sequence[Block]:
    """Return a row a layer for each kind: the strongest pairs of words, what goes elsewhere, and what moved most."""
    several = len(view.maps) > 1
    counts = [("source", view.lines.source), ("target", view.lines.target)]
    counted = ", ".join(f"{name} {len(line)}" for name, line in counts if line)
    blocks: list[Block] = [Text(f"rows of a figure: {counted}; the numbers are means over heads")]
    for kind, layers in summaries.items():
        columns = [Column("layer", "number"), Column("strongest between words"), Column("words", "number")]
        columns += [] if kind == CROSS else [Column("itself", "number"), Column("first", "number")]
        columns += [Column("moved", "number"), Column("most")] if several else []
        rows = []
        for one in layers:
            row = [str(one["layer"]), pairs(one["strongest"][: 1 if several else 2]), share(one["among_words"])]
            row += [] if kind == CROSS else [share(one["itself"]), share(one["first"])]
            row += [share(one["mean_change"]), pairs(one["changed_most"], change=True)] if several else []
            rows.append(row)
        title = f"{title_of(kind, view.target.family)} ({len(layers)} layers, {view.heads(kind)} heads)"
        head = view.selection.head if isinstance(view.selection.head, str) else f"head {view.selection.head}"
        blocks += [Table(columns, rows, title), Text(f"drawn: {kind}, layer {view.layers[kind]}, {head}")]
    return blocks


def pairs(found: Sequence[Pair], *, change: bool = False) -> str:
    """Write pairs of words with their weights."""
    return ", ".join(
        f"{isolated(pair['from'])} → {isolated(pair['to'])} "
        f"{signed(pair['weight']) if change else format(pair['weight'], '.2f')}"
        for pair in found
    )


def isolated(word: str) -> str:
    """Put marks around a word that is written from right to left; terminals that know none may show them."""
    turned = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in word)
    return f"{ISOLATE}{word}{POP}" if turned else word


def share(part: float) -> str:
    """Write a share in percent."""
    return f"{100 * part:.0f} %" if part >= 0.01 or part == 0 else f"{100 * part:.2g} %"
