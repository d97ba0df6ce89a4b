"""What is kept of a model's attention: a layer's mean, its rollout, and its heads where there is room for them.

Shapes: H heads, Q rows (who looks), T columns (what is looked at), both in tokens or in groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.explain.capture import CROSS, MASKED, SELF, Attended, Kind
from llmtune.explain.rollout import Matrix, roll
from llmtune.explain.target import Family
from llmtune.explain.token_text import Token, joined

Mask = npt.NDArray[np.bool_]
MEAN, ROLLOUT = "mean", "rollout"
Head = int | str
"""A head by its number, or MEAN or ROLLOUT."""


@dataclass(frozen=True)
class Line:
    """A text (or a recording) as it stands beside a picture: a token a row, or several positions that make one."""

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

    @property
    def positions(self) -> int:
        """How many of the model's positions it covers."""
        return sum(self.sizes)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Lines:
    """What the model reads, and (encoder-decoders) what its decoder reads."""

    source: Line
    target: Line | None = None

    def of(self, kind: Kind) -> tuple[Line, Line]:
        """Return who looks and what is looked at."""
        if self.target is None or kind == SELF:
            return self.source, self.source
        return (self.target, self.source) if kind == CROSS else (self.target, self.target)


def merge(weights: np.ndarray[Any, Any], rows: Line, columns: Line) -> Matrix:
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
        """Return the weights [Q, T] of one head, the mean over all, or the rollout; None where that is not kept."""
        if head == MEAN:
            return self.mean
        if head == ROLLOUT:
            return self.rollout
        assert isinstance(head, int)
        return None if self.heads is None else self.heads[head]


@dataclass
class Gathered:
    """The attention of one side (base or tuned): by kind and layer; `see` takes it in while the model runs."""

    lines: Lines
    keep: Callable[[Kind, int], bool]
    """keep(kind, layer): whether all heads are kept."""
    advance: Callable[[], None] = lambda: None
    layers: dict[Kind, dict[int, Layer]] = field(default_factory=dict)
    _rolled: dict[Kind, Matrix] = field(default_factory=dict)

    def see(self, seen: Attended) -> None:
        """Keep what is wanted of one layer."""
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
    """Name a kind of attention as people do."""
    if kind == CROSS:
        return "Cross-attention: the decoder looks at what the encoder read"
    if kind == MASKED:
        return "Masked self-attention: each token looks at itself and those before"
    whose = " of the encoder" if family == "encoder-decoder" else ""
    return f"Self-attention{whose}: each token looks at all of them"


def plainest(layers: Mapping[int, Layer], base: Mapping[int, Layer] | None, telling_QT: Mask) -> int:
    """Return the layer that shows most: where single words look at single words, or where that was moved most.

    Much of what a model attends to is the first token, special ones, the word itself, or some token that all others
    look at, which says little about the text (Clark et al., 2019, section 3.2; Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks", 2024): only weights `among_words` count, as far as they are above what
    others look at the same word with.

    Args:
        layers: of the model, or of the tuned one.
        base: of the base, beside the tuned one.
        telling_QT: see `among_words`.
    """
    if not telling_QT.any():
        return max(layers)

    rows_T = np.maximum(telling_QT.sum(axis=0), 1)

    def shows(layer: int) -> float:
        weights_QT = layers[layer].mean * telling_QT
        if base is not None:
            return float(np.abs(weights_QT - base[layer].mean * telling_QT).sum())
        above_QT = np.maximum(weights_QT - weights_QT.sum(axis=0) / rows_T, 0) * telling_QT
        return float((above_QT**2).sum())

    return max(layers, key=shows)


def among_words(rows: Line, columns: Line, kind: Kind) -> Mask:
    """Return where a word looks at another one [Q, T]: neither is special, nor the first, nor are they the same."""
    from_Q = np.array([not token.special for token in rows.tokens])
    to_T = np.array([not token.special for token in columns.tokens])
    if kind != CROSS:
        to_T[0] = False
    telling_QT: Mask = from_Q[:, None] & to_T[None, :]
    if kind != CROSS:
        np.fill_diagonal(telling_QT, False)
    return telling_QT
