"""`llmtune explain attention`: which tokens attend to which, by layer and head; base, tuned and difference.

Shapes: Q queries (rows), T keys (columns).
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.data.text_pairs import target_ids
from llmtune.display.blocks import Block, Bullets, Column, Html, Page, Section, Table, Text
from llmtune.display.console import spinner, track_items
from llmtune.explain.attention_figures import AXES, STEM, draw_attention
from llmtune.explain.attention_maps import (
    CROSS,
    DIFFERENCE,
    MASKED,
    MEAN,
    MOST_NUMBERS,
    AttentionKind,
    AttentionMaps,
    Matrix,
    TextLines,
    attend,
    check_selection,
    shape_of,
    strongest_pairs,
)
from llmtune.explain.explainer import Explainer, Family, Target, in_percent
from llmtune.explain.figures import DIFFERENCE_COLOURS, WEIGHT_COLOURS
from llmtune.explain.generation_trace import Sampling, trace_answer
from llmtune.explain.inputs import AttentionRequest, ModelInputs, fit_tokens, read_attention_text, transcript_ids
from llmtune.explain.picture_attention import (
    draw_pictures,
    find_row,
    list_shares,
    list_unmapped,
    picture_data,
    picture_values,
)
from llmtune.explain.picture_prompts import picture_line
from llmtune.explain.token_text import TokenLine, name_tokens, token_label
from llmtune.model.causal_lm_loss import decoder_inputs
from llmtune.model.memory_plan import context_length

LONGEST_ANSWER = 64
"""Tokens that an encoder-decoder generates without --target."""
FULL = 65535
"""The 16-bit integer for weight 1 in the page; weights are accurate to 0.00001."""
STRONGEST = 2
"""Pairs of words listed per layer."""
ISOLATE, POP = "\u2068", "\u2069"
"""Marks around right-to-left words, to keep their neighbours in place."""
READING = (
    "Special tokens, such as the start and end of a text, are slanted. Models park unused attention on them or on "
    "the first token. That attention says little about the text.",
    "A leading dot (·ing) marks a piece that continues the previous word. ␣ is a space, ⏎ the end of a line.",
    "Heads are the parallel attentions of one layer, each with its own queries and keys. The mean is over all "
    "heads of a layer.",
    "Rollout follows attention through all layers up to the chosen one, with half of each step from the token itself: "
    "how much of each input word has reached this position (Abnar and Zuidema, 2020).",
    "Masked self-attention sees no later token, because the model learns to predict it.",
    "Attention shows where a model looks, not why it gives its answer.",
)
NO_ROOM = "The text is long, so this page has heads of at most one layer. Choose it with --layer, or shorten the text."


@dataclass
class AttentionExplainer(Explainer):
    """Runs each model once on the same tokens and shows its attention."""

    target: Target
    console: Console
    request: AttentionRequest

    stem = STEM
    lead = (
        "Each token of a text looks at others to find its meaning in context. A row shows where one token looks: its "
        "numbers sum to 1, and brighter is stronger. Choose a layer and a head, and point at a cell to read it."
    )

    def read(self) -> None:
        """Check the options against the model's layers and heads, and make its inputs."""
        self.title = f"Attention in {self.target.name}"
        self.shape = shape_of(self.target.config, self.target.family)
        check_selection(self.shape, self.request)
        self.inputs = read_attention_text(self.target, self.request)
        if self.inputs.note:
            self.console.print(f"attention: {self.inputs.note}", markup=False)

    def run(self) -> None:
        """Run each model once on the same tokens, and keep its attention and the decoder's answer."""
        target = self.target
        self.answer: str | None = None
        for number, name in enumerate(track_items(self.console, target.models, "attention")):
            with target.open_model(name) as model:
                if number == 0:
                    tensors, lines = self._read_lines(model, name)
                    self.maps = AttentionMaps(target.models, lines, self.shape, self.request)
                attend(model, tensors, target.family, partial(self.maps.add, name))
        kinds = self.maps.drawn_layers
        self.layers = {kind: [list_strongest(self.maps, kind, at) for at in self.maps.layers(kind)] for kind in kinds}

    def _read_lines(self, model: PreTrainedModel, name: str) -> tuple[dict[str, torch.Tensor], TextLines]:
        """Return the inputs of all models and their rows, with --target or the first model's own answer."""
        target, inputs, request = self.target, self.inputs, self.request
        tensors, line, pictures = inputs.text_tensors, None, inputs.pictures
        source = inputs.frames or picture_line(target.processor, inputs.ids, pictures)
        if inputs.pair is not None:
            ids, self.answer = decode_target(model, inputs, target, request)
            tensors["decoder_input_ids"] = torch.tensor([ids])
            line = TokenLine.of(name_tokens(target.processor, ids))
        if pictures:
            ids, self.answer = answer_question(model, inputs, target, request)
            tensors, answer = replace(inputs, ids=[*inputs.ids, *ids]).text_tensors, len(source)
            source = picture_line(target.processor, [*inputs.ids, *ids], pictures)
            self.row = find_row(source, answer, request.word)
        if self.answer is not None and not request.target:
            what = f"target: {self.answer!r}, the {name}'s own answer; --target gives another"
            self.console.print(what, markup=False)
        return tensors, TextLines(source, line, tuple(at for picture in pictures for at in picture.places))

    def draw(self, folder: Path) -> list[Path]:
        """Draw a heatmap and a graph of each kind of attention, and attention on pictures."""
        with spinner(self.console, "drawing"):
            files = draw_attention(self.maps, folder, self.console)
            if pictures := self.inputs.pictures:
                files += draw_pictures(self.maps, pictures, self.row, folder)
            return files

    def to_json(self) -> dict[str, object]:
        """Return the tokens, and the strongest pairs of each layer for each kind of attention."""
        maps = self.maps
        lines = {"source": maps.lines.source, "target": maps.lines.target}
        kinds = {
            kind: {
                "title": kind_title(kind, self.target.family),
                "layers": len(layers),
                "heads": maps.shape[kind][1],
                "shown": {"layer": maps.drawn_layers[kind], "head": maps.head, "threshold": maps.threshold(kind)},
                "by_layer": layers,
            }
            for kind, layers in self.layers.items()
        }
        return {
            "name": self.target.name,
            "family": self.target.family,
            "sides": list(maps.models),
            "tokens": {name: [vars(token) for token in line.tokens] for name, line in lines.items() if line},
            **({"target": self.answer} if self.answer is not None else {}),
            "attention": kinds,
            **(picture_values(maps, self.inputs.pictures, self.row) if self.inputs.pictures else {}),
        }

    def sections(self, figures: Mapping[str, Path]) -> Iterator[Section]:
        """Yield the interactive maps, a table of the strongest pairs, and a reading guide."""
        interactive: list[Block] = [Html(Markup(_asset("attention.html")))]  # noqa: S704 - the program's own
        complete = self.maps.keeps_all_heads and self._count_numbers() <= MOST_NUMBERS
        yield Section("", [*interactive, *([] if complete else [Text(NO_ROOM, "note")])], brief=False)
        if self.inputs.pictures:
            notes = [Text(note, "note") for note in list_unmapped(self.inputs.pictures, self.target.config.model_type)]
            yield Section("Attention on the picture", [*notes, *list_shares(self.maps, self.row)])
        yield Section("Strongest between words", list(self._tables()))
        yield Section("How to read it", [Bullets(READING, soft=True)], brief=False)

    def page(self, figures: Mapping[str, Path]) -> Page:
        """Return the page with every kept layer and head, or only the drawn layer if those are too many."""
        few = self._count_numbers() <= MOST_NUMBERS
        kinds = {kind: self.maps.layers(kind) if few else [layer] for kind, layer in self.maps.drawn_layers.items()}
        data: dict[str, object] = {
            "kinds": [self._pack_kind(kind, layers) for kind, layers in kinds.items()],
            "sides": list(self.maps.models),
            "colours": {"weight": WEIGHT_COLOURS, "difference": DIFFERENCE_COLOURS},
            "full": FULL,
        }
        if pictures := self.inputs.pictures:
            data["pictures"] = picture_data(self.maps, pictures, self.row, kinds[MASKED], pack)
        style, script = _asset("attention.css"), _asset("attention.js")
        return replace(super().page(figures), style=style, script=script, data=data)

    def _count_numbers(self) -> int:
        maps = self.maps
        return len(maps.models) * sum(
            maps.lines.count(kind) * len(maps.heads(kind, layer))
            for kind in maps.drawn_layers
            for layer in maps.layers(kind)
        )

    def _tables(self) -> Iterator[Block]:
        """Yield a table per kind: each layer's strongest word pairs, the rest, and its change."""
        maps = self.maps
        counts = [("source", maps.lines.source), ("target", maps.lines.target)]
        counted = ", ".join(f"{name} {len(line)}" for name, line in counts if line)
        yield Text(f"rows of a figure: {counted}; the numbers are means over heads")
        for kind, layers in self.layers.items():
            names = ["words", *([] if kind == CROSS else ["first"]), *(["moved"] if len(maps.models) > 1 else [])]
            columns = [Column("layer", "number"), Column("strongest between words")]
            columns += [Column(name, "number") for name in names]
            rows = []
            for layer in layers:
                shares = [layer[key] for key in ("among_words", "first", "mean_change") if layer[key] is not None]
                pairs = (
                    f"{isolated(pair['from'])} → {isolated(pair['to'])} {pair['weight']:.2f}"
                    for pair in layer["strongest"]
                )
                rows.append([str(layer["layer"]), ", ".join(pairs), *map(in_percent, shares)])
            title = f"{kind_title(kind, self.target.family)} ({len(layers)} layers, {maps.shape[kind][1]} heads)"
            head = maps.head if isinstance(maps.head, str) else f"head {maps.head}"
            yield Table(columns, rows, title)
            yield Text(f"drawn: {kind}, layer {maps.drawn_layers[kind]}, {head}")

    def _pack_kind(self, kind: AttentionKind, layers: Sequence[int]) -> dict[str, object]:
        """Return the data of one kind of attention for the page's script."""
        maps = self.maps
        rows, columns = maps.lines.of(kind)
        values = {
            f"{model}/{layer}/{head}": pack(maps.weights(model, kind, layer, head), masked=kind == MASKED)
            for model in maps.models
            for layer in layers
            for head in maps.heads(kind, layer)
        }
        words = [
            [{"text": token_label(one), "whole": token_label(one, 80), "special": one.special} for one in line.tokens]
            for line in (rows, columns)
        ]
        return {
            "name": kind,
            "title": kind_title(kind, self.target.family),
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


def _asset(name: str) -> str:
    return files("llmtune.explain").joinpath(name).read_text(encoding="utf-8")


def decode_target(
    model: PreTrainedModel, inputs: ModelInputs, target: Target, request: AttentionRequest
) -> tuple[list[int], str]:
    """Return the decoder's tokens and their text: --target, or the model's own greedy answer."""
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


def answer_question(
    model: PreTrainedModel, inputs: ModelInputs, target: Target, request: AttentionRequest
) -> tuple[list[int], str]:
    """Return the tokens and the text of the answer to a question with pictures: --target, or the model's own."""
    if request.target is None:
        answer = trace_answer(model, inputs, target.processor, Sampling(LONGEST_ANSWER))
        return answer.ids, answer.text
    return list(target.processor(request.target, add_special_tokens=False)["input_ids"]), request.target


def list_strongest(maps: AttentionMaps, kind: AttentionKind, layer: int) -> dict[str, Any]:
    """Return the strongest word pairs of a layer's mean, and the shares of all other attention.

    `first` is the share of the first token (not for cross-attention). `mean_change` is the change by tuning, for runs.
    """
    mean_QT, words_QT = maps.weights(maps.models[-1], kind, layer, MEAN), maps.lines.among_words(kind)
    rows, columns = (line.labels for line in maps.lines.of(kind))
    change = None
    if DIFFERENCE in maps.shown:
        change_QT = maps.weights(DIFFERENCE, kind, layer, MEAN)
        change = round(float(np.abs(change_QT).sum() / 2 / len(change_QT)), 6)
    return {
        "layer": layer,
        "strongest": [
            {"from": rows[i], "to": columns[k], "row": i, "column": k, "weight": round(float(mean_QT[i, k]), 6)}
            for i, k in strongest_pairs(mean_QT, words_QT, STRONGEST)
        ],
        "among_words": round(float((mean_QT * words_QT).sum() / len(mean_QT)), 4),
        "first": round(float(mean_QT[:, 0].mean()), 4) if kind != CROSS else None,
        "mean_change": change,
    }


def kind_title(kind: AttentionKind, family: Family) -> str:
    """Return the heading of a kind of attention."""
    if kind == CROSS:
        return "Cross-attention: the decoder looks at the encoder's text"
    if kind == MASKED:
        return "Masked self-attention: each token looks at itself and earlier tokens"
    whose = " of the encoder" if family == "encoder-decoder" else ""
    return f"Self-attention{whose}: each token looks at all tokens"


def isolated(word: str) -> str:
    """Put marks around a right-to-left word; terminals without support may show them."""
    turned = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in word)
    return f"{ISOLATE}{word}{POP}" if turned else word


def pack(weights_QT: Matrix, *, masked: bool) -> str:
    """Encode weights as base64 of little-endian 16-bit integers, row by row; masked ones up to the diagonal."""
    shown = weights_QT[np.tril_indices(len(weights_QT))] if masked else weights_QT
    rounded = np.rint(np.clip(shown, 0, 1) * FULL).astype("<u2")
    return base64.b64encode(rounded.tobytes()).decode()
