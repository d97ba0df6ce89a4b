"""`llmtune explain attention`: which words look at which, by layer and head; base, tuned and the difference.

Shapes: Q queries (rows), T keys (columns).
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from markupsafe import Markup
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from llmtune.explain.attention_capture import CROSS, MASKED, Kind, attend, shape_of
from llmtune.explain.attention_figures import AXES, STEM, draw_figures
from llmtune.explain.attention_maps import (
    DIFFERENCE,
    MEAN,
    MOST_NUMBERS,
    AttentionMaps,
    Lines,
    Matrix,
    Shape,
    select,
    strongest_pairs,
)
from llmtune.explain.explanation import Explanation, asset, in_percent, write_explanation
from llmtune.explain.figures import DIFFERENCE_COLOURS, WEIGHT_COLOURS
from llmtune.explain.generation_trace import Sampling, trace_answer
from llmtune.explain.inputs import AttentionRequest, ModelInputs, fit_tokens, read_text, transcript_ids
from llmtune.explain.target import Family, Target
from llmtune.explain.token_text import Line, label, name_tokens
from llmtune.model.causal_lm_loss import decoder_inputs
from llmtune.model.memory_plan import context_length
from llmtune.report.blocks import Block, Bullets, Column, Html, Page, Section, Table, Text
from llmtune.store.atomic_files import explained
from llmtune.tasks.text_to_text import target_ids

LONGEST_ANSWER = 64
"""Tokens that an encoder-decoder writes where there is no --target."""
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


def explain_attention(target: Target, request: AttentionRequest, out: Path, console: Console) -> Explanation:
    """Show the attention on one text: words, the strongest pairs of each layer, figures and a page in `out`.

    Raises:
        RecipeError: an unknown layer, head or kind, or an option that is missing or that has no use.
        DataError: the text is empty or too long, or a recording cannot be read.
        EnvironmentProblem: the model is gone, or does not show its attention.
    """
    shape = shape_of(target.config, target.family)
    select(shape, request)  # a mistake is named before any weights are read
    inputs = read_text(target, request)
    if inputs.note:
        console.print(f"attention: {inputs.note}", markup=False)
    maps, answer = capture(target, inputs, request, shape, console)
    summaries = {kind: [summarise(maps, kind, layer) for layer in maps.layers(kind)] for kind in maps.drawn_layers}
    with console.status("drawing"), explained(out):
        figures = draw_figures(maps, out, console)
        page = make_page(target, maps, list(make_tables(target.family, maps, summaries)))
        return write_explanation(out / STEM, to_json(target, maps, summaries, answer), page, figures)


def capture(
    target: Target, inputs: ModelInputs, request: AttentionRequest, shape: Shape, console: Console
) -> tuple[AttentionMaps, str | None]:
    """Run each model once on the same tokens; returns what was kept of each, and what the decoder wrote."""
    maps: AttentionMaps | None = None
    answer, tensors = None, inputs.text_tensors
    source = inputs.frames or Line.of(name_tokens(target.processor, inputs.ids))
    shown = track(target.models, "attention", console=console, transient=True, disable=not console.is_terminal)
    for name in shown:
        with target.open_model(name) as model:
            if maps is None:
                line = None
                if inputs.pair is not None:
                    ids, answer = decode_target(model, inputs, target, request)
                    tensors["decoder_input_ids"] = torch.tensor([ids])
                    line = Line.of(name_tokens(target.processor, ids))
                    if not inputs.pair.target:
                        what = f"target: {answer!r}, the {name}'s own answer; --target gives another"
                        console.print(what, markup=False)
                maps = AttentionMaps(target.models, Lines(source, line), shape, request)
            attend(model, tensors, target.family, partial(maps.add, name))
    assert maps is not None, "there is one model at least"
    return maps, answer


def decode_target(
    model: PreTrainedModel, inputs: ModelInputs, target: Target, request: AttentionRequest
) -> tuple[list[int], str]:
    """Return the tokens that the decoder reads, and the text: --target, or the model's own greedy answer."""
    assert inputs.pair is not None, "an encoder-decoder reads and writes"
    text = inputs.pair.target
    if not text:
        room = (context_length(target.config) or LONGEST_ANSWER + 1) - (len(inputs.decoder_ids) or 1)
        answer = trace_answer(model, inputs, target.processor, Sampling(min(LONGEST_ANSWER, room)))
        text, request = answer.text.strip(), replace(request, cut=True)
    pair = replace(inputs.pair, target=text)
    if target.is_whisper:
        return fit_tokens(transcript_ids(pair, target), "--target", target, request), text
    labels, _, end = target_ids(pair, target.processor)
    shifted = decoder_inputs(model, torch.tensor([labels], device=model.device))[0].tolist()
    return fit_tokens([int(i) for i in shifted[:end]], "--target", target, request), text


# What each layer looks at


def summarise(maps: AttentionMaps, kind: Kind, layer: int) -> LayerSummary:
    """Return what one layer looks at."""
    mean_QT, words_QT = maps.weights(maps.models[-1], kind, layer, MEAN), maps.lines.among_words(kind)
    rows, columns = (line.labels for line in maps.lines.of(kind))
    change = None
    if DIFFERENCE in maps.shown:
        change_QT = maps.weights(DIFFERENCE, kind, layer, MEAN)
        change = round(float(np.abs(change_QT).sum() / 2 / len(change_QT)), 6)
    return LayerSummary(
        layer=layer,
        strongest=[
            {"from": rows[i], "to": columns[k], "row": i, "column": k, "weight": round(float(mean_QT[i, k]), 6)}
            for i, k in strongest_pairs(mean_QT, words_QT, STRONGEST)
        ],
        among_words=round(float((mean_QT * words_QT).sum() / len(mean_QT)), 4),
        first=round(float(mean_QT[:, 0].mean()), 4) if kind != CROSS else None,
        mean_change=change,
    )


def to_json(
    target: Target, maps: AttentionMaps, summaries: Mapping[Kind, Sequence[LayerSummary]], answer: str | None
) -> dict[str, object]:
    """Return what was seen as JSON values."""
    lines = {"source": maps.lines.source, "target": maps.lines.target}
    kinds = {
        kind: {
            "title": title_of(kind, target.family),
            "layers": len(layers),
            "heads": maps.shape[kind][1],
            "shown": {
                "layer": maps.drawn_layers[kind],
                "head": maps.head,
                "threshold": maps.threshold(kind),
            },
            "by_layer": [asdict(layer) for layer in layers],
        }
        for kind, layers in summaries.items()
    }
    return {
        "name": target.name,
        "family": target.family,
        "sides": list(maps.models),
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


def make_tables(
    family: Family, maps: AttentionMaps, summaries: Mapping[Kind, Sequence[LayerSummary]]
) -> Iterator[Block]:
    """Yield a table for each kind: a layer's strongest pairs of words, where the rest goes, how far it moved."""
    counts = [("source", maps.lines.source), ("target", maps.lines.target)]
    counted = ", ".join(f"{name} {len(line)}" for name, line in counts if line)
    yield Text(f"rows of a figure: {counted}; the numbers are means over heads")
    for kind, layers in summaries.items():
        names = ["words", *([] if kind == CROSS else ["first"]), *(["moved"] if len(maps.models) > 1 else [])]
        columns = [Column("layer", "number"), Column("strongest between words")]
        columns += [Column(name, "number") for name in names]
        rows = []
        for one in layers:
            shares = [in_percent(part) for part in (one.among_words, one.first, one.mean_change) if part is not None]
            pairs = (
                f"{isolated(pair['from'])} → {isolated(pair['to'])} {pair['weight']:.2f}" for pair in one.strongest
            )
            rows.append([str(one.layer), ", ".join(pairs), *shares])
        title = f"{title_of(kind, family)} ({len(layers)} layers, {maps.shape[kind][1]} heads)"
        head = maps.head if isinstance(maps.head, str) else f"head {maps.head}"
        yield Table(columns, rows, title)
        yield Text(f"drawn: {kind}, layer {maps.drawn_layers[kind]}, {head}")


def isolated(word: str) -> str:
    """Put marks around a word that is written from right to left; terminals that know none may show them."""
    turned = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in word)
    return f"{ISOLATE}{word}{POP}" if turned else word


def make_page(target: Target, maps: AttentionMaps, tables: Sequence[Block]) -> Page:
    """Return the page: any layer and head that was kept by choice, or where these are too many the layer drawn."""
    layers = {kind: maps.layers(kind) for kind in maps.drawn_layers}
    numbers = sum(
        len(maps.models) * maps.lines.count(kind) * len(maps.heads(kind, layer))
        for kind, known in layers.items()
        for layer in known
    )
    complete = maps.keeps_all_heads and numbers <= MOST_NUMBERS
    if numbers > MOST_NUMBERS:
        layers = {kind: [layer] for kind, layer in maps.drawn_layers.items()}
    note = "The text is long: this page has the heads of one layer at most. --layer names it; a shorter text has room."
    data = {
        "kinds": [_describe(target.family, maps, kind, known) for kind, known in layers.items()],
        "sides": list(maps.models),
        "colours": {"weight": WEIGHT_COLOURS, "difference": DIFFERENCE_COLOURS},
        "full": FULL,
    }
    interactive: list[Block] = [Html(Markup(asset("attention.html")))]  # noqa: S704 - the program's own
    return Page(
        f"Attention in {target.name}",
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


def _describe(family: Family, maps: AttentionMaps, kind: Kind, layers: Sequence[int]) -> dict[str, object]:
    """Return what the page's script reads of one kind of attention."""
    rows, columns = maps.lines.of(kind)
    values = {
        f"{model}/{layer}/{head}": pack(maps.weights(model, kind, layer, head), masked=kind == MASKED)
        for model in maps.models
        for layer in layers
        for head in maps.heads(kind, layer)
    }
    words = [
        [{"text": label(token), "whole": label(token, 80), "special": token.special} for token in line.tokens]
        for line in (rows, columns)
    ]
    return {
        "name": kind,
        "title": title_of(kind, family),
        "rows": words[0],
        "columns": words[1],
        "same": rows is columns,
        "masked": kind == MASKED,
        "axes": AXES[kind],
        "layers": list(layers),
        "heads": maps.shape[kind][1],
        "shown": {"layer": maps.drawn_layers[kind], "head": str(maps.head)},
        "threshold": maps.threshold(kind),
        "values": values,
    }


def pack(weights_QT: Matrix, *, masked: bool) -> str:
    """Write weights as 16-bit numbers, low byte first, in base64: row by row, masked ones up to the diagonal."""
    shown = weights_QT[np.tril_indices(len(weights_QT))] if masked else weights_QT
    rounded = np.rint(np.clip(shown, 0, 1) * FULL).astype("<u2")
    return base64.b64encode(rounded.tobytes()).decode()
