"""A model's attention weights, read layer by layer while it runs, and the part that is kept and drawn.

Shapes: H heads, Q queries (rows), T keys (columns), both in tokens or, for a recording, in stretches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtune.errors import EnvironmentProblem, RecipeError, nearest
from llmtune.explain.explainer import BASE, TUNED, Family
from llmtune.explain.inputs import AttentionRequest
from llmtune.explain.token_text import TokenLine
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.model.config import layer_configs
from llmtune.model.towers import find_towers

AttentionKind = Literal["self", "masked-self", "cross"]
SELF: AttentionKind = "self"
MASKED: AttentionKind = "masked-self"
CROSS: AttentionKind = "cross"
EAGER = "eager"
Matrix = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
MEAN, ROLLOUT = "mean", "rollout"
Head = int | str
"""A head by its number, or MEAN or ROLLOUT."""
Shape = Mapping[AttentionKind, tuple[int, int]]
"""Number of layers and heads per kind of attention."""
DIFFERENCE = "difference"
"""The third map of a run: tuned minus base."""
MOST_NUMBERS = 12_000_000
"""Maximum of weights kept and written to the page, 2.7 bytes each: 32 MB. Beyond it, only one layer keeps its heads."""
EDGES_PER_WORD = 1.5
"""Approximate edges per word in a graph without a given threshold."""
LOWEST = 0.01


@dataclass(frozen=True)
class Attended:
    """The attention of one layer, just computed by the model. Copy what you keep."""

    kind: AttentionKind
    layer: int
    """Index within its half of the model, from 0, as in module names."""
    weights: torch.Tensor
    """[H, Q, T] float32. Each row sums to 1, except in models with a sink (gpt-oss), which takes the rest."""


def attend(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], family: Family, look: Callable[[Attended], None]
) -> None:
    """Run `model` (possibly wrapped by PEFT) once on one text, and call `look` with each layer's attention, in order.

    Each layer's weights are freed before the next are computed, unless `look` keeps them. Models that do not compute
    their attention through transformers' interface (DeBERTa) return all layers at once, after the pass.

    Raises:
        EnvironmentProblem: the model does not show its attention.
    """
    inner = unwrap(model)
    body = inner.base_model
    accepted = accepted_arguments(body.__class__)
    options: dict[str, object] = {
        key: part.to(inner.device, inner.dtype if part.is_floating_point() else None)
        for key, part in inputs.items()
        if key in accepted
    }
    if "use_cache" in accepted:
        options["use_cache"] = False
    half = inner.get_encoder() if family == "encoder-decoder" else inner
    encoder = set() if half is inner else set(half.modules())
    towers = {module for name in find_towers(inner) for module in inner.get_submodule(name).modules()}
    layers: dict[AttentionKind, list[int]] = {}

    def attention(module: torch.nn.Module, *args: object, **given: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        output, weights = eager(module, *args, **given)
        if weights is not None and module not in towers:
            masked = bool(towers) or is_causal(module, weights)  # tokens of one picture may see each other both ways
            kind = SELF if module in encoder else MASKED if masked else CROSS if encoder else SELF
            before = layers.setdefault(kind, [])
            index = getattr(module, "layer_idx", None)
            shared = index in before  # as in ALBERT, whose positions share one layer
            before.append(index if isinstance(index, int) and not shared else len(before))
            look(Attended(kind, before[-1], weights[0].float()))
        return output, weights

    with torch.inference_mode(), _as_eager(attention):
        body(**options)
        if not layers:
            _read_outputs(body, options, family, look)


def is_causal(module: torch.nn.Module, weights_1HQT: torch.Tensor) -> bool:
    """Whether every query sees only itself and earlier keys."""
    queries, keys = weights_1HQT.shape[2:]
    if queries == keys > 1:
        return not bool(weights_1HQT[0].triu(1).any())
    return bool(getattr(module, "is_causal", False))


@contextmanager
def _as_eager(attention: Callable[..., object]) -> Iterator[None]:
    """Intercept the eager attention of models.

    transformers looks up the attention's name in its interface, then falls back on the model's own function. It
    has no entry for `eager`; adding one leaves the model in eager mode.
    """
    assert EAGER not in ALL_ATTENTION_FUNCTIONS, "attention is captured already"
    ALL_ATTENTION_FUNCTIONS[EAGER] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[EAGER]


def _read_outputs(
    body: PreTrainedModel, options: Mapping[str, object], family: Family, look: Callable[[Attended], None]
) -> None:
    """Read the attention that the model returns as outputs."""
    returns = "output_attentions" in accepted_arguments(body.__class__)
    outputs = body(**options, output_attentions=True) if returns else None
    self_attention: AttentionKind = MASKED if family == "decoder" else SELF
    names: dict[str, AttentionKind] = {
        "attentions": self_attention,
        "encoder_attentions": SELF,
        "decoder_attentions": MASKED,
    }
    layers = [
        Attended(kind, layer, weights[0].float())
        for name, kind in {**names, "cross_attentions": CROSS}.items()
        for layer, weights in enumerate(getattr(outputs, name, None) or ())
        if weights is not None and weights.dim() == 4
    ]
    if not layers:
        what = f"{type(body).__name__} does not show its attention weights"
        fix = "It computes attention in its own way. Use a model of a common architecture."
        raise EnvironmentProblem.of(what, getattr(body, "name_or_path", None) or None, fix)
    for attended in layers:
        look(attended)


def shape_of(config: PretrainedConfig, family: Family) -> dict[AttentionKind, tuple[int, int]]:
    """Return the number of layers and heads of each kind of attention, from the configuration."""
    if family != "encoder-decoder":
        text = config.get_text_config()
        kind = MASKED if family == "decoder" else SELF
        return {kind: (int(text.num_hidden_layers), min(int(one.num_attention_heads) for one in layer_configs(text)))}

    def first(half: PretrainedConfig, *names: str) -> int:
        return next(int(value) for name in names if (value := getattr(half, name, None)) is not None)

    reads, writes = getattr(config, "encoder", config), getattr(config, "decoder", config)
    encoder = first(reads, "encoder_layers", "num_layers", "num_hidden_layers")
    decoder = first(writes, "decoder_layers", "num_decoder_layers", "num_hidden_layers")
    written = decoder, first(writes, "decoder_attention_heads", "num_attention_heads")
    return {
        SELF: (encoder, first(reads, "encoder_attention_heads", "num_attention_heads")),
        MASKED: written,
        CROSS: written,
    }


# Kept and drawn weights


def check_selection(shape: Shape, request: AttentionRequest) -> tuple[tuple[AttentionKind, ...], Head]:
    """Check the options against the model's layers and heads; return the kinds of attention to draw, and the head.

    Raises RecipeError for a kind, layer or head that the model does not have.
    """
    kinds = [kind for kind in shape if request.kind in (None, kind)]
    if not kinds:
        fix = f"This model has {', '.join(shape)}.{nearest(str(request.kind), list(shape))}"
        raise RecipeError.of(f"unknown kind of attention {request.kind!r}", "--kind", fix)
    layers, heads = (max(shape[kind][which] for kind in kinds) for which in (0, 1))
    if request.layer is not None and request.layer >= layers:
        what = f"layer {request.layer} not found: the model has {layers}"
        raise RecipeError.of(what, "--layer", f"Use a number from 0 to {layers - 1}.")
    head: Head = int(request.head) if request.head.isdigit() else request.head
    if head not in (MEAN, ROLLOUT, *range(heads)):
        fix = f"Use a number from 0 to {heads - 1}, {MEAN} or {ROLLOUT}.{nearest(request.head, [MEAN, ROLLOUT])}"
        raise RecipeError.of(f"head {request.head!r} not found: a layer has {heads}", "--head", fix)
    if head == ROLLOUT:
        kinds = [kind for kind in kinds if kind != CROSS]
    # an encoder may have more layers, or heads, than its decoder
    last, most = request.layer or 0, head if isinstance(head, int) else 0
    kinds = [kind for kind in kinds if last < shape[kind][0] and most < shape[kind][1]]
    if not kinds:
        what = "cross-attention has no rollout: its rows and columns are different texts"
        raise RecipeError.of(what, "--head", f"Use {MEAN} or a number.")
    return tuple(kinds), head


@dataclass(frozen=True)
class TextLines:
    """The text that the model reads, and for encoder-decoders the decoder's text."""

    source: TokenLine
    target: TokenLine | None = None
    patches: tuple[int, ...] = ()
    """Positions of the tokens of pictures. The line has one row for each picture."""

    def of(self, kind: AttentionKind) -> tuple[TokenLine, TokenLine]:
        """Return the queries and the keys."""
        if self.target is None or kind == SELF:
            return self.source, self.source
        return (self.target, self.source) if kind == CROSS else (self.target, self.target)

    def count(self, kind: AttentionKind) -> int:
        """Return the number of weights per head; masked ones do not count."""
        rows, columns = map(len, self.of(kind))
        return (rows * (rows + 1) // 2 if kind == MASKED else rows * columns) + rows * len(self.patches)

    def among_words(self, kind: AttentionKind) -> Mask:
        """Return a mask [Q, T] of pairs of different words, without special tokens and the first token."""
        rows, columns = self.of(kind)
        words_QT: Mask = ~np.array(rows.special)[:, None] & ~np.array(columns.special)[None, :]
        if kind != CROSS:
            words_QT[:, 0] = False
            np.fill_diagonal(words_QT, False)
        return words_QT


@dataclass
class AttentionMaps:
    """The weights of all models; `add` collects them while a model runs."""

    models: tuple[str, ...]
    lines: TextLines
    shape: Shape
    request: AttentionRequest
    """The selection to draw. Defaults: the most telling layer, and about EDGES_PER_WORD edges per word."""
    kept: dict[str, dict[AttentionKind, dict[int, dict[Head, Matrix]]]] = field(default_factory=dict)
    """Weights [Q, T] by model, kind, layer and head: MEAN, ROLLOUT (not for cross-attention), or a head's number."""
    picture_maps: dict[str, dict[int, dict[Head, Matrix]]] = field(default_factory=dict)
    """Weights [Q, P] of the tokens of all pictures by model, layer and head; empty without pictures."""
    _rolled: dict[tuple[str, AttentionKind], Matrix] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds, self.head = check_selection(self.shape, self.request)
        sizes = (layers * heads * self.lines.count(kind) for kind, (layers, heads) in self.shape.items())
        numbers = len(self.models) * sum(sizes)
        self.keeps_all_heads = numbers <= MOST_NUMBERS
        if not self.keeps_all_heads and self.request.layer is None and isinstance(self.head, int):
            what = f"the heads of all layers are {numbers / 1e6:.0f} million weights on this text: too many to keep"
            raise RecipeError.of(what, "--layer", "Name a layer, or give a shorter text.")

    def add(self, model: str, entry: Attended) -> None:
        """Keep mean and rollout of one layer; keep its heads if they fit or if the layer is drawn."""
        rows, columns = self.lines.of(entry.kind)
        weights_HQT = entry.weights.cpu().numpy()
        mean_QT = weights_HQT.mean(axis=0)
        weights: dict[Head, Matrix] = {MEAN: mean_QT}
        if entry.kind != CROSS:
            weights[ROLLOUT] = self._rolled[model, entry.kind] = roll(self._rolled.get((model, entry.kind)), mean_QT)
        if self.keeps_all_heads or entry.layer == self.request.layer:
            weights.update(enumerate(weights_HQT.copy()))
        merged = {head: merge_stretches(one, rows, columns) for head, one in weights.items()}
        self.kept.setdefault(model, {}).setdefault(entry.kind, {})[entry.layer] = merged
        if self.lines.patches:
            patches = {head: average_rows(one[:, self.lines.patches], rows) for head, one in weights.items()}
            self.picture_maps.setdefault(model, {})[entry.layer] = patches

    @property
    def shown(self) -> tuple[str, ...]:
        """The maps shown side by side: the model; or base, tuned and their difference."""
        return (*self.models, DIFFERENCE) if self.models == (BASE, TUNED) else self.models

    def layers(self, kind: AttentionKind) -> list[int]:
        """Return the layers with this kind of attention; some models have it only in every fourth layer."""
        return sorted(self.kept[self.models[0]].get(kind, ()))

    def heads(self, kind: AttentionKind, layer: int) -> list[Head]:
        """Return the kept heads of a layer: MEAN, ROLLOUT and numbers."""
        return list(self.kept[self.models[0]][kind][layer])

    def weights(self, model: str, kind: AttentionKind, layer: int, head: Head) -> Matrix:
        """Return weights [Q, T] of a model, or tuned minus base."""
        if model == DIFFERENCE:
            return self.weights(TUNED, kind, layer, head) - self.weights(BASE, kind, layer, head)
        return self.kept[model][kind][layer][head]

    def on_pictures(self, model: str, layer: int, head: Head) -> Matrix:
        """Return the weights [Q, P] of a model on the tokens of all pictures, or tuned minus base."""
        if model == DIFFERENCE:
            return self.on_pictures(TUNED, layer, head) - self.on_pictures(BASE, layer, head)
        return self.picture_maps[model][layer][head]

    @cached_property
    def drawn_layers(self) -> dict[AttentionKind, int]:
        """The drawn layer of each kind; raises RecipeError if that layer does not have this attention."""
        chosen: dict[AttentionKind, int] = {}
        for kind in self.kinds:
            layers, layer = self.layers(kind), self.request.layer
            if layer is not None and layer not in layers:
                fix = f"Layers that have it: {', '.join(map(str, layers))}."
                raise RecipeError.of(f"layer {layer} has no {kind} attention", "--layer", fix)
            means = [{at: self.weights(model, kind, at, MEAN) for at in layers} for model in self.models]
            base, words_QT = means[0] if len(means) > 1 else None, self.lines.among_words(kind)
            if layer is None and self.lines.patches:
                words_Q, maps = ~np.array(self.lines.source.special), self.picture_maps[self.models[-1]]
                chosen[kind] = max(layers, key=lambda at: float(maps[at][MEAN][words_Q].sum()))
            else:
                chosen[kind] = most_telling_layer(means[-1], base, words_QT) if layer is None else layer
        return chosen

    def drawn(self, model: str, kind: AttentionKind) -> Matrix:
        """Return the weights [Q, T] of the drawn layer and head."""
        return self.weights(model, kind, self.drawn_layers[kind], self.head)

    def threshold(self, kind: AttentionKind) -> float:
        """Return the minimum weight of an edge."""
        if self.request.threshold is not None:
            return self.request.threshold
        return find_threshold(self.drawn(self.models[-1], kind), self.lines.among_words(kind))


def merge_stretches(weights: Matrix, rows: TokenLine, columns: TokenLine) -> Matrix:
    """Reduce [..., positions, positions] to [..., Q, T]: add the columns of a stretch and average its rows.

    Rows still sum to 1 (Clark et al., "What Does BERT Look At?", 2019, section 4.1).
    """
    if weights.shape[-2:] == (len(rows), len(columns)):
        return weights
    return average_rows(np.add.reduceat(weights, _starts(columns), axis=-1), rows)


def average_rows(weights: Matrix, rows: TokenLine) -> Matrix:
    """Average the rows [..., positions, T] of each stretch."""
    summed = np.add.reduceat(weights, _starts(rows), axis=-2)
    averaged: Matrix = (summed / np.asarray(rows.sizes)[:, None]).astype(np.float32)
    return averaged


def _starts(line: TokenLine) -> list[int]:
    return [0, *accumulate(line.sizes)][:-1]


def roll(before_TT: Matrix | None, mean_TT: Matrix) -> Matrix:
    """Add a layer to the attention rollout: half of each position is its own (the residual), half its heads' mean.

    Rows of the result sum to 1 if those of `mean_TT` do. `before_TT` is the rollout up to the previous layer, or None
    for the first. Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, section 3, with W_att as
    the mean over heads.
    """
    mixed_TT = 0.5 * mean_TT + 0.5 * np.eye(len(mean_TT), dtype=np.float32)
    return mixed_TT if before_TT is None else mixed_TT @ before_TT


def most_telling_layer(means: Mapping[int, Matrix], base: Mapping[int, Matrix] | None, words_QT: Mask) -> int:
    """Return the layer with the most attention between single words, or with the largest change of it.

    Much attention goes to the first token, special tokens, the word itself, or a token that all others
    look at. It says little about the text (Clark et al., 2019, section 3.2; Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks", 2024). Only weights `among_words` count, minus the weight with which
    other words look at the same word. If `base` has the base model's means, `means` has those of the tuned model.
    """
    if not words_QT.any():
        return max(means)
    rows_T = np.maximum(words_QT.sum(axis=0), 1)

    def shows(layer: int) -> float:
        weights_QT = means[layer] * words_QT
        if base is not None:
            return float(np.abs(weights_QT - base[layer] * words_QT).sum())
        above_QT = np.maximum(weights_QT - weights_QT.sum(axis=0) / rows_T, 0) * words_QT
        return float((above_QT**2).sum())

    return max(means, key=shows)


def strongest_pairs(weights_QT: Matrix, shown_QT: Mask, most: int) -> Sequence[tuple[int, int]]:
    """Return row and column of the shown weights with the largest absolute values."""
    sizes = np.where(shown_QT, np.abs(weights_QT), 0)
    order = np.argsort(-sizes, axis=None, kind="stable")[:most]
    places = (divmod(int(at), weights_QT.shape[1]) for at in order)
    return [place for place in places if sizes[place] > 0]


def find_threshold(weights_QT: Matrix, words_QT: Mask) -> float:
    """Return a threshold that leaves about EDGES_PER_WORD edges per word between words."""
    between = weights_QT[words_QT] if words_QT.any() else weights_QT.ravel()
    count = min(between.size, math.ceil(EDGES_PER_WORD * len(weights_QT)))
    return max(LOWEST, round(float(np.partition(between, -count)[-count]), 3))
