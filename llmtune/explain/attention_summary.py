"""What is kept of a model's attention: of each layer the mean, the rollout, and the heads where memory allows.

Shapes: H heads, Q queries (rows), T keys (columns), both in tokens or in groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from llmtune.explain.attention_capture import CROSS, MASKED, SELF, Attended, Kind
from llmtune.explain.target import Family
from llmtune.explain.token_text import Token, joined

Matrix = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
MEAN, ROLLOUT = "mean", "rollout"
Head = int | str
"""A head by its number, or MEAN or ROLLOUT."""


@dataclass(frozen=True)
class Line:
    """The labels of an axis: a token of a text (or a stretch of a recording) for each row."""

    tokens: tuple[Token, ...]
    sizes: tuple[int, ...]
    """How many of the model's positions each stands for."""

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> Line:
        """Give each token a row of its own."""
        return cls(tuple(tokens), (1,) * len(tokens))

    def by_word(self) -> Line:
        """Put the pieces of a word into one row."""
        tokens: list[Token] = []
        sizes: list[int] = []
        for token, size in zip(self.tokens, self.sizes, strict=True):
            if token.continues and tokens:
                tokens[-1] = joined(tokens[-1], token)
                sizes[-1] += size
            else:
                tokens.append(token)
                sizes.append(size)
        return Line(tuple(tokens), tuple(sizes))

    def __len__(self) -> int:
        return len(self.tokens)


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


@dataclass(frozen=True)
class Layer:
    """One layer's attention of one kind."""

    mean: Matrix
    """[Q, T] over the heads."""
    rollout: Matrix | None
    """[Q, T]; None for cross-attention, whose rows and columns are different texts."""
    heads: Matrix | None
    """[H, Q, T]; None where it was not kept."""
    count: int
    """How many heads there are."""

    def of(self, head: Head) -> Matrix | None:
        """Return the weights [Q, T] of a head, the mean or the rollout; None where that is not kept."""
        if head == MEAN:
            return self.mean
        if head == ROLLOUT:
            return self.rollout
        assert isinstance(head, int)
        return None if self.heads is None else self.heads[head]


@dataclass
class AttentionMaps:
    """The attention of one model by kind and layer; `add` takes it in while the model runs."""

    lines: Lines
    keep: Callable[[Kind, int], bool]
    """keep(kind, layer): whether all heads are kept."""
    advance: Callable[[], None] = lambda: None
    layers: dict[Kind, dict[int, Layer]] = field(default_factory=dict)
    _rolled: dict[Kind, Matrix] = field(default_factory=dict)

    def add(self, seen: Attended) -> None:
        """Keep mean and rollout of one layer, and its heads if `keep` says so."""
        rows, columns = self.lines.of(seen.kind)
        weights_HQT = seen.weights.cpu().numpy()
        mean_QT = weights_HQT.mean(axis=0)
        rollout_QT = None
        if seen.kind != CROSS:
            self._rolled[seen.kind] = roll(self._rolled.get(seen.kind), mean_QT)
            rollout_QT = merge(self._rolled[seen.kind], rows, columns)
        heads_HQT = np.array(merge(weights_HQT, rows, columns)) if self.keep(seen.kind, seen.layer) else None
        layer = Layer(merge(mean_QT, rows, columns), rollout_QT, heads_HQT, len(weights_HQT))
        self.layers.setdefault(seen.kind, {})[seen.layer] = layer
        self.advance()


def title_of(kind: Kind, family: Family) -> str:
    """Return the heading of a kind of attention."""
    if kind == CROSS:
        return "Cross-attention: the decoder looks at what the encoder read"
    if kind == MASKED:
        return "Masked self-attention: each token looks at itself and those before"
    whose = " of the encoder" if family == "encoder-decoder" else ""
    return f"Self-attention{whose}: each token looks at all of them"


def most_telling_layer(layers: Mapping[int, Layer], base: Mapping[int, Layer] | None, words_QT: Mask) -> int:
    """Return the layer that shows most: where single words look at single words, or where that was moved most.

    Much of what a model attends to is the first token, special ones, the word itself, or some token that all others
    look at, which says little about the text (Clark et al., 2019, section 3.2; Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks", 2024): only weights `among_words` count, as far as they are above what
    others look at the same word with.

    Args:
        layers: of the model, or of the tuned one.
        base: of the base, beside the tuned one.
        words_QT: see `among_words`.
    """
    if not words_QT.any():
        return max(layers)

    rows_T = np.maximum(words_QT.sum(axis=0), 1)

    def shows(layer: int) -> float:
        weights_QT = layers[layer].mean * words_QT
        if base is not None:
            return float(np.abs(weights_QT - base[layer].mean * words_QT).sum())
        above_QT = np.maximum(weights_QT - weights_QT.sum(axis=0) / rows_T, 0) * words_QT
        return float((above_QT**2).sum())

    return max(layers, key=shows)


def among_words(rows: Line, columns: Line, kind: Kind) -> Mask:
    """Return where a word looks at another one [Q, T]: neither is special, nor the first, nor are they the same."""
    from_Q = np.array([not token.special for token in rows.tokens])
    to_T = np.array([not token.special for token in columns.tokens])
    if kind != CROSS:
        to_T[0] = False
    words_QT: Mask = from_Q[:, None] & to_T[None, :]
    if kind != CROSS:
        np.fill_diagonal(words_QT, False)
    return words_QT
