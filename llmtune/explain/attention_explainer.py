"""`llmtune explain attention`: which words look at which, by layer and head; base, tuned and the difference.

Shapes: Q queries (rows), T keys (columns).
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from markupsafe import Markup
from rich.console import Console
from rich.progress import track

from llmtune.errors import RecipeError
from llmtune.explain.attention_capture import (
    CROSS,
    MASKED,
    MEAN,
    AttentionMaps,
    Kind,
    Lines,
    Matrix,
    attend,
    shape_of,
    strongest_pairs,
)
from llmtune.explain.attention_figures import STEM, draw_figures
from llmtune.explain.attention_view import AXES, DIFFERENCE, AttentionOptions, AttentionView, Selection, Shape, select
from llmtune.explain.explanation import Explanation, asset, write_explanation
from llmtune.explain.figures import DIFFERENCE_COLOURS, WEIGHT_COLOURS
from llmtune.explain.inputs import AttentionRequest, ModelInputs, decode_target, read_text
from llmtune.explain.target import Family, Target
from llmtune.explain.token_text import Line, label, name_tokens
from llmtune.report.blocks import Block, Bullets, Column, Html, Page, Section, Table, Text
from llmtune.store.atomic_files import explained

MOST_NUMBERS = 12_000_000
"""Weights that are kept and in the page, 2.7 bytes each: 32 MB. Where there are more, heads are those of one layer."""
FULL = 65535
"""What 1 is written as in the page, in 16 bits: weights are right to 0.00001."""
STRONGEST = 2
"""Pairs of words that are listed of each layer."""
ISOLATE, POP = "\u2068", "\u2069"
"""Around words that may be written from right to left, so that they leave what is beside them in its place."""
LEAD = (
    "Each token of a text looks at others to find out what it means here. A row says where one token looks: its "
    "numbers sum to 1, and brighter is stronger. Choose a layer and a head, and point at a cell to read it."
)
READING = (
    "Special tokens, such as the start and the end of a text, are slanted. Models park attention that they have no use "
    "for on them, or on the first token: it says little about the text.",
    "A dot in front (·ing) says that a piece goes on with the word before it. ␣ is a space, ⏎ the end of a line.",
    "Heads are the several ways in which one layer looks; each has its own queries and keys. The mean is over all "
    "heads of a layer.",
    "Rollout follows attention through all layers up to the one chosen, half of each step being the token itself: "
    "how much of each input word has reached this position (Abnar and Zuidema, 2020).",
    "Masked self-attention sees no later token, since that is what the model learns to predict.",
    "Attention says where a model looks, not why it answers as it does.",
)
Pair = TypedDict("Pair", {"from": str, "to": str, "row": int, "column": int, "weight": float})
"""A word, and one that it looks at."""


@dataclass(frozen=True)
class LayerSummary:
    """The strongest pairs of words of a layer's mean, and where the rest goes."""

    layer: int
    strongest: list[Pair]
    among_words: float
    first: float | None
    """The share that goes to the first token; not of cross-attention."""
    mean_change: float | None
    """Of a run."""


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
    check_layer(selection, maps[target.models[-1]])
    view = AttentionView(target, maps, lines, selection, options, shape)
    summaries = {kind: [summarise(view, kind, number) for number in view.numbers(kind)] for kind in view.kinds}
    with console.status("drawing"), explained(out):
        figures = draw_figures(view, out, console)
        page = make_page(view, list(make_tables(view, summaries)))
        return write_explanation(out / STEM, to_json(view, summaries, answer), page, figures)


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
    lines, answer, tensors = Lines(source), None, inputs.text_tensors
    shown = track(target.models, "attention", console=console, transient=True, disable=not console.is_terminal)
    for name in shown:
        with target.open_model(name) as model:
            if inputs.pair is not None and answer is None:
                ids, answer = decode_target(model, inputs, target, request)
                tensors["decoder_input_ids"] = torch.tensor([ids])
                lines = Lines(source, Line.of(name_tokens(target.processor, ids)))
                if not inputs.pair.target:
                    console.print(f"target: {answer!r}, the {name}'s own answer; --target gives another", markup=False)
            if request.words and not maps:
                lines = Lines(lines.source.by_word(), lines.target and lines.target.by_word())
            maps[name] = AttentionMaps(lines, find_keeper(shape, lines, len(target.models), selection))
            attend(model, tensors, target.family, maps[name].add)
    return maps, lines, answer


def find_keeper(shape: Shape, lines: Lines, models: int, selection: Selection) -> Callable[[int], bool]:
    """Return whether a layer's heads are kept: all of them, or where that is too much those of the layer named.

    Raises RecipeError where heads are selected without a layer, and there is no room for all.
    """
    numbers = models * sum(layers * heads * lines.count(kind) for kind, (layers, heads) in shape.items())
    if numbers <= MOST_NUMBERS:
        return lambda layer: True
    if selection.layer is None and (selection.heads or isinstance(selection.head, int)):
        what = f"the heads of all layers are {numbers / 1e6:.0f} million weights on this text: too many to keep"
        raise RecipeError.of(what, "--layer", "Name a layer, or give a shorter text.")
    return lambda layer: layer == selection.layer


def check_layer(selection: Selection, maps: AttentionMaps) -> None:
    """Raise RecipeError for a layer that has no attention: in some models only every fourth layer has."""
    for kind in selection.kinds:
        known = maps.weights.get(kind, {})
        if selection.layer is not None and selection.layer not in known:
            fix = f"Those that have: {', '.join(map(str, sorted(known)))}."
            raise RecipeError.of(f"layer {selection.layer} has no {kind} attention", "--layer", fix)


# What each layer looks at


def summarise(view: AttentionView, kind: Kind, number: int) -> LayerSummary:
    """Return what one layer looks at."""
    mean_QT, words_QT = view.weights(view.target.models[-1], kind, number, MEAN), view.lines.among_words(kind)
    assert mean_QT is not None, "means are always kept"
    change_QT = view.weights(DIFFERENCE, kind, number, MEAN) if DIFFERENCE in view.shown else None
    return LayerSummary(
        layer=number,
        strongest=_list_pairs(view, kind, mean_QT, STRONGEST),
        among_words=round(float((mean_QT * words_QT).sum() / len(mean_QT)), 4),
        first=round(float(mean_QT[:, 0].mean()), 4) if kind != CROSS else None,
        mean_change=None if change_QT is None else round(float(np.abs(change_QT).sum() / 2 / len(change_QT)), 6),
    )


def _list_pairs(view: AttentionView, kind: Kind, weights_QT: Matrix, most: int) -> list[Pair]:
    rows, columns = (line.labels for line in view.lines.of(kind))
    return [
        {"from": rows[i], "to": columns[k], "row": i, "column": k, "weight": round(float(weights_QT[i, k]), 6)}
        for i, k in strongest_pairs(weights_QT, view.lines.among_words(kind), most)
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
            "shown": {"layer": layer, "head": view.selection.head, "threshold": view.threshold(kind)},
            "by_layer": [asdict(summary) for summary in summaries[kind]],
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


def title_of(kind: Kind, family: Family) -> str:
    """Return the heading of a kind of attention."""
    if kind == CROSS:
        return "Cross-attention: the decoder looks at what the encoder read"
    if kind == MASKED:
        return "Masked self-attention: each token looks at itself and those before"
    whose = " of the encoder" if family == "encoder-decoder" else ""
    return f"Self-attention{whose}: each token looks at all of them"


# Page


def make_tables(view: AttentionView, summaries: Mapping[Kind, Sequence[LayerSummary]]) -> Iterator[Block]:
    """Yield a table for each kind: a layer's strongest pairs of words, where the rest goes, how far it moved."""
    counts = [("source", view.lines.source), ("target", view.lines.target)]
    counted = ", ".join(f"{name} {len(line)}" for name, line in counts if line)
    yield Text(f"rows of a figure: {counted}; the numbers are means over heads")
    for kind, layers in summaries.items():
        names = ["words", *([] if kind == CROSS else ["first"]), *(["moved"] if len(view.maps) > 1 else [])]
        columns = [Column("layer", "number"), Column("strongest between words")]
        rows = []
        for one in layers:
            shares = [share(part) for part in (one.among_words, one.first, one.mean_change) if part is not None]
            pairs = (
                f"{isolated(pair['from'])} → {isolated(pair['to'])} {pair['weight']:.2f}" for pair in one.strongest
            )
            rows.append([str(one.layer), ", ".join(pairs), *shares])
        columns += [Column(name, "number") for name in names]
        title = f"{title_of(kind, view.target.family)} ({len(layers)} layers, {view.heads(kind)} heads)"
        head = view.selection.head if isinstance(view.selection.head, str) else f"head {view.selection.head}"
        yield Table(columns, rows, title)
        yield Text(f"drawn: {kind}, layer {view.layers[kind]}, {head}")


def isolated(word: str) -> str:
    """Put marks around a word that is written from right to left; terminals that know none may show them."""
    turned = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in word)
    return f"{ISOLATE}{word}{POP}" if turned else word


def share(part: float) -> str:
    """Write a share in percent."""
    return f"{100 * part:.0f} %" if part >= 0.01 or part == 0 else f"{100 * part:.2g} %"


def make_page(view: AttentionView, tables: Sequence[Block]) -> Page:
    """Return the page: any layer and head that was kept by choice, or where these are too many the layer drawn."""
    channels = {kind: [len(view.channels(kind, number)) for number in view.numbers(kind)] for kind in view.kinds}
    numbers = len(view.maps) * sum(view.lines.count(kind) * sum(found) for kind, found in channels.items())
    whole = numbers <= MOST_NUMBERS
    complete = whole and all(min(found) > view.heads(kind) for kind, found in channels.items())
    note = "The text is long: this page has the heads of one layer at most. --layer names it; a shorter text has room."
    data = {
        "kinds": [_describe(view, kind, view.numbers(kind) if whole else [view.layers[kind]]) for kind in view.kinds],
        "sides": list(view.maps),
        "colours": {"weight": WEIGHT_COLOURS, "difference": DIFFERENCE_COLOURS},
        "full": FULL,
    }
    interactive: list[Block] = [Html(Markup(asset("attention.html")))]  # noqa: S704 - the program's own
    return Page(
        f"Attention in {view.target.name}",
        [
            Section("", [*interactive, *([] if complete else [Text(note, "note")])], brief=False),
            Section("Strongest between words", tables),
            Section("How to read it", [Bullets(READING, soft=True)], brief=False),
        ],
        lead=LEAD,
        navigation=False,
        style=asset("attention.css"),
        script=asset("attention.js"),
        data=data,
    )


def _describe(view: AttentionView, kind: Kind, layers: Sequence[int]) -> dict[str, object]:
    rows, columns = view.lines.of(kind)
    values: dict[str, str] = {}
    for model in view.maps:
        for layer in layers:
            for head in view.channels(kind, layer):
                weights_QT = view.weights(model, kind, layer, head)
                assert weights_QT is not None, "channels are what was kept"
                values[f"{model}/{layer}/{head}"] = pack(weights_QT, masked=kind == MASKED)
    words = [
        [{"text": label(token), "whole": label(token, 80), "special": token.special} for token in line.tokens]
        for line in (rows, columns)
    ]
    return {
        "name": kind,
        "title": title_of(kind, view.target.family),
        "rows": words[0],
        "columns": words[1],
        "same": rows is columns,
        "masked": kind == MASKED,
        "axes": AXES[kind],
        "layers": list(layers),
        "heads": view.heads(kind),
        "shown": {"layer": view.layers[kind], "head": str(view.selection.head)},
        "threshold": view.threshold(kind),
        "values": values,
    }


def pack(weights_QT: Matrix, *, masked: bool) -> str:
    """Write weights as 16-bit numbers, low byte first, in base64: row by row, masked ones up to the diagonal."""
    shown = weights_QT[np.tril_indices(len(weights_QT))] if masked else weights_QT
    rounded = np.rint(np.clip(shown, 0, 1) * FULL).astype("<u2")
    return base64.b64encode(rounded.tobytes()).decode()
