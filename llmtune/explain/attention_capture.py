"""A model's attention weights, a layer at a time while it runs: its own eager computation, nothing recomputed.

Shapes: H heads, Q queries (rows), T keys (columns), both in tokens or in groups of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtune.errors import EnvironmentProblem
from llmtune.explain.target import Family
from llmtune.explain.token_text import Line
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Kind = Literal["self", "masked-self", "cross"]
SELF: Kind = "self"
MASKED: Kind = "masked-self"
CROSS: Kind = "cross"
Matrix = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
MEAN, ROLLOUT = "mean", "rollout"
Head = int | str
"""A head by its number, or MEAN or ROLLOUT."""
EAGER = "eager"


@dataclass(frozen=True)
class Attended:
    """One attention of one layer, as the model has just computed it; copy what you keep."""

    kind: Kind
    layer: int
    """Counted from 0 within its half of the model, as in the names of its modules."""
    weights: torch.Tensor
    """[H, Q, T] float32; each row sums to 1, but for models with a sink (gpt-oss), where the rest goes there."""


Look = Callable[[Attended], None]


def attend(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], family: Family, look: Look) -> None:
    """Run `model` (PEFT may have wrapped it) once on one text, and give each layer's attention to `look`, in order.

    A layer's weights are freed before the next one's are made, unless `look` keeps them. Models that do not compute
    their attention through transformers' interface (DeBERTa) give all layers at once, after the pass.

    Raises:
        EnvironmentProblem: the model does not show its attention.
    """
    inner = unwrap(model)
    body = inner.base_model
    accepted = accepted_arguments(body.__class__)
    options: dict[str, object] = {key: part.to(inner.device) for key, part in inputs.items() if key in accepted}
    if "use_cache" in accepted:
        options["use_cache"] = False
    capture = _Capture(inner, family, look)
    with torch.inference_mode(), _capturing(capture):
        body(**options)
        if not capture.layers:
            _read_outputs(body, options, family, look)


@dataclass
class _Capture:
    """Which modules are looked at, and which layers were seen so far."""

    model: PreTrainedModel
    family: Family
    look: Look
    layers: dict[Kind, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.own = {id(module) for module in self.model.modules()}
        encoder = self.model.get_encoder() if self.family == "encoder-decoder" else None
        self.encoder = set() if encoder in (None, self.model) else {id(module) for module in encoder.modules()}

    def add(self, module: torch.nn.Module, weights_HQT: torch.Tensor) -> None:
        kind = self.kind_of(module, weights_HQT)
        before = self.layers.setdefault(kind, [])
        own = getattr(module, "layer_idx", None)
        layer = own if isinstance(own, int) and own not in before else len(before)  # ALBERT's layers are all the same
        before.append(layer)
        self.look(Attended(kind, layer, weights_HQT))

    def kind_of(self, module: torch.nn.Module, weights_HQT: torch.Tensor) -> Kind:
        """Tell the three apart: by the half of the model, and by whether any query sees a later key."""
        queries, keys = weights_HQT.shape[1:]
        if id(module) in self.encoder:
            return SELF
        causal = bool(getattr(module, "is_causal", False))
        if queries == keys > 1:
            causal = not bool(weights_HQT.triu(1).any())
        return MASKED if causal else CROSS if self.encoder else SELF


@contextmanager
def _capturing(capture: _Capture) -> Iterator[None]:
    """Stand between the model and its own eager attention.

    transformers looks up the name of the attention in its interface before it falls back on the model's own function,
    which `eager` has no entry for: with one, the model still believes that it is eager, as it is.
    """

    def attention(
        module: torch.nn.Module, *args: object, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        output, weights = eager(module, *args, **options)
        if id(module) in capture.own and weights is not None:
            capture.add(module, weights[0].float())
        return output, weights

    assert EAGER not in ALL_ATTENTION_FUNCTIONS, "attention is captured already"
    ALL_ATTENTION_FUNCTIONS[EAGER] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[EAGER]


def _read_outputs(body: PreTrainedModel, options: Mapping[str, object], family: Family, look: Look) -> None:
    """Let the model return all of its attention at once."""
    returns = "output_attentions" in accepted_arguments(body.__class__)
    outputs = body(**options, output_attentions=True) if returns else None
    own: Kind = MASKED if family == "decoder" else SELF
    names: dict[str, Kind] = {"attentions": own, "encoder_attentions": SELF, "decoder_attentions": MASKED}
    seen = [
        Attended(kind, layer, weights[0].float())
        for name, kind in {**names, "cross_attentions": CROSS}.items()
        for layer, weights in enumerate(getattr(outputs, name, None) or ())
        if weights is not None and weights.dim() == 4
    ]
    if not seen:
        what = f"{type(body).__name__} does not show its attention weights"
        fix = "It computes its attention in a way of its own; models of the usual kinds do show theirs."
        raise EnvironmentProblem.of(what, getattr(body, "name_or_path", None) or None, fix)
    for attended in seen:
        look(attended)


def shape_of(config: PretrainedConfig, family: Family) -> dict[Kind, tuple[int, int]]:
    """Return how many layers and heads each kind of attention has, as the configuration says."""
    if family != "encoder-decoder":
        text = config.get_text_config()
        kind = MASKED if family == "decoder" else SELF
        return {kind: (int(text.num_hidden_layers), int(text.num_attention_heads))}

    def first(half: PretrainedConfig, *names: str) -> int:
        return next(int(value) for name in names if (value := getattr(half, name, None)) is not None)

    encoder, decoder = (
        (
            first(half, f"{name}_layers", layers, "num_hidden_layers"),
            first(half, f"{name}_attention_heads", "num_heads", "num_attention_heads"),
        )
        for name, half, layers in (
            ("encoder", getattr(config, "encoder", config), "num_layers"),
            ("decoder", getattr(config, "decoder", config), "num_decoder_layers"),
        )
    )
    return {SELF: encoder, MASKED: decoder, CROSS: decoder}


# What is kept of it


@dataclass(frozen=True)
class Lines:
    """What the model reads, and (encoder-decoders) what its decoder reads."""

    source: Line
    target: Line | None = None

    def of(self, kind: Kind) -> tuple[Line, Line]:
        """Return the queries and the keys."""
        if self.target is None or kind == SELF:
            return self.source, self.source
        return (self.target, self.source) if kind == CROSS else (self.target, self.target)

    def count(self, kind: Kind) -> int:
        """Return how many weights a head has, of masked attention those that are not hidden."""
        rows, columns = map(len, self.of(kind))
        return rows * (rows + 1) // 2 if kind == MASKED else rows * columns

    def among_words(self, kind: Kind) -> Mask:
        """Return where a word looks at another one [Q, T]: neither is special, nor the first, nor are they the same."""
        rows, columns = self.of(kind)
        words_QT: Mask = ~np.array(rows.special)[:, None] & ~np.array(columns.special)[None, :]
        if kind != CROSS:
            words_QT[:, 0] = False
            np.fill_diagonal(words_QT, False)
        return words_QT


def merge(weights: Matrix, rows: Line, columns: Line) -> Matrix:
    """Bring [..., positions, positions] to [..., Q, T]: columns of a group are added, its rows averaged.

    So rows go on summing to 1 (Clark et al., "What Does BERT Look At?", 2019, section 4.1).
    """
    if weights.shape[-2:] == (len(rows), len(columns)):
        return weights
    starts_T, starts_Q = ([0, *accumulate(line.sizes)][:-1] for line in (columns, rows))
    added = np.add.reduceat(weights, starts_T, axis=-1)
    summed = np.add.reduceat(added, starts_Q, axis=-2)
    merged: Matrix = (summed / np.asarray(rows.sizes)[:, None]).astype(np.float32)
    return merged


def roll(before_TT: Matrix | None, mean_TT: Matrix) -> Matrix:
    """Add a layer to the attention rollout: half of each position is its own (the residual), half its heads' mean.

    Rows of the result sum to 1 where those of `mean_TT` do. `before_TT` is the rollout up to the layer before, None
    before the first. Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, section 3, where W_att is
    the mean over heads.
    """
    mixed_TT = 0.5 * mean_TT + 0.5 * np.eye(len(mean_TT), dtype=np.float32)
    return mixed_TT if before_TT is None else mixed_TT @ before_TT


@dataclass
class AttentionMaps:
    """What is kept of one model's attention by kind and layer; `add` takes it in while the model runs."""

    lines: Lines
    keep: Callable[[int], bool]
    """keep(layer): whether all heads are kept."""
    weights: dict[Kind, dict[int, dict[Head, Matrix]]] = field(default_factory=dict)
    """By kind, layer and head [Q, T]: MEAN over the heads, ROLLOUT (not of cross-attention), and heads by number."""
    _rolled: dict[Kind, Matrix] = field(default_factory=dict)

    def add(self, seen: Attended) -> None:
        """Keep mean and rollout of one layer, and its heads if `keep` says so."""
        rows, columns = self.lines.of(seen.kind)
        weights_HQT = seen.weights.cpu().numpy()
        mean_QT = weights_HQT.mean(axis=0)
        kept: dict[Head, Matrix] = {MEAN: merge(mean_QT, rows, columns)}
        if seen.kind != CROSS:
            self._rolled[seen.kind] = roll(self._rolled.get(seen.kind), mean_QT)
            kept[ROLLOUT] = merge(self._rolled[seen.kind], rows, columns)
        if self.keep(seen.layer):
            kept.update(enumerate(np.array(merge(weights_HQT, rows, columns))))
        self.weights.setdefault(seen.kind, {})[seen.layer] = kept


def most_telling_layer(means: Mapping[int, Matrix], base: Mapping[int, Matrix] | None, words_QT: Mask) -> int:
    """Return the layer that shows most: where single words look at single words, or where that was moved most.

    Much of what a model attends to is the first token, special ones, the word itself, or some token that all others
    look at, which says little about the text (Clark et al., 2019, section 3.2; Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks", 2024): only weights `among_words` count, as far as they are above what
    others look at the same word with. `base` has the means of the base model, beside those of the tuned one.
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


def strongest_pairs(weights_QT: Matrix, words_QT: Mask, most: int) -> Sequence[tuple[int, int]]:
    """Return row and column of the largest weights in size among words."""
    sizes = np.where(words_QT, np.abs(weights_QT), 0)
    order = np.argsort(-sizes, axis=None, kind="stable")[:most]
    places = (divmod(int(at), weights_QT.shape[1]) for at in order)
    return [place for place in places if sizes[place] > 0]
