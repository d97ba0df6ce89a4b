"""What of a model's attention is shown: the options of the command, checked against what the model has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmtune.errors import RecipeError, nearest
from llmtune.explain.attention_capture import (
    CROSS,
    MASKED,
    MEAN,
    ROLLOUT,
    SELF,
    AttentionMaps,
    Head,
    Kind,
    Lines,
    Mask,
    Matrix,
    most_telling_layer,
)
from llmtune.explain.target import BASE, TUNED, Target

ALL = "all"
DIFFERENCE = "difference"
"""What is shown beside the models of a run: tuned minus base."""
TITLES = {"model": "", BASE: "base", TUNED: "tuned", DIFFERENCE: "difference: tuned − base"}
AXES: dict[Kind, tuple[str, str]] = {
    SELF: ("who looks", "what is looked at"),
    MASKED: ("who looks", "what is looked at"),
    CROSS: ("decoder: who looks", "encoder: what is looked at"),
}
EDGES_PER_WORD = 1.5
"""About how many edges a graph has where no threshold is given."""
LOWEST = 0.01
Shape = Mapping[Kind, tuple[int, int]]
"""Layers and heads of each kind of attention."""


@dataclass(frozen=True)
class AttentionOptions:
    """The options of `explain attention` that say what is shown; None is what shows most."""

    kind: str | None = None
    layer: str | None = None
    """A number from 0, or ALL."""
    head: str = MEAN
    """A number from 0, MEAN, ROLLOUT or ALL."""
    view: str = "both"
    threshold: float | None = None
    special: bool = False
    """Whether graphs are drawn with the edges to special tokens and to the first one."""


@dataclass(frozen=True)
class Selection:
    """Which layers and heads are drawn; the model has them."""

    kinds: tuple[Kind, ...]
    layer: int | None
    """None: that which shows most."""
    head: Head
    layers: bool = False
    """Whether all layers are drawn."""
    heads: bool = False
    """Whether all heads are drawn."""


@dataclass(frozen=True)
class AttentionView:
    """The attention of all models on one text, and what of it is drawn."""

    target: Target
    maps: Mapping[str, AttentionMaps]
    lines: Lines
    selection: Selection
    options: AttentionOptions
    shape: Shape

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of attention that are drawn."""
        return self.selection.kinds

    @cached_property
    def layers(self) -> dict[Kind, int]:
        """The layer that is drawn of each kind."""
        if self.selection.layer is not None:
            return dict.fromkeys(self.kinds, self.selection.layer)
        chosen = {}
        for kind in self.kinds:
            means = [{at: found[MEAN] for at, found in maps.weights[kind].items()} for maps in self.maps.values()]
            base = means[0] if len(means) > 1 else None
            chosen[kind] = most_telling_layer(means[-1], base, self.lines.among_words(kind))
        return chosen

    @property
    def shown(self) -> tuple[str, ...]:
        """What stands side by side: the model; or base, tuned and their difference."""
        names = tuple(self.maps)
        return (*names, DIFFERENCE) if names == (BASE, TUNED) else names

    def threshold(self, kind: Kind) -> float:
        """Return the weight from which a graph has an edge."""
        if self.options.threshold is not None:
            return self.options.threshold
        return find_threshold(self.drawn(self.target.models[-1], kind), self.lines.among_words(kind))

    def numbers(self, kind: Kind) -> list[int]:
        """Return the layers that have this kind of attention."""
        return sorted(next(iter(self.maps.values())).weights[kind])

    def heads(self, kind: Kind) -> int:
        """Return how many heads each layer has."""
        return self.shape[kind][1]

    def channels(self, kind: Kind, layer: int) -> list[Head]:
        """Return what was kept of a layer: MEAN, ROLLOUT and heads by number."""
        return list(next(iter(self.maps.values())).weights[kind][layer])

    def weights(self, model: str, kind: Kind, layer: int, head: Head) -> Matrix | None:
        """Return weights [Q, T] of a model, or tuned minus base; None where they were not kept."""
        if model != DIFFERENCE:
            return self.maps[model].weights[kind][layer].get(head)
        base, tuned = (self.weights(name, kind, layer, head) for name in (BASE, TUNED))
        return None if base is None or tuned is None else tuned - base

    def drawn(self, model: str, kind: Kind) -> Matrix:
        """Return weights [Q, T] of the layer and head that are drawn."""
        weights_QT = self.weights(model, kind, self.layers[kind], self.selection.head)
        assert weights_QT is not None, "what is selected is kept"
        return weights_QT


def find_threshold(weights_QT: Matrix, words_QT: Mask) -> float:
    """Return a threshold that leaves about EDGES_PER_WORD edges a word among those between words."""
    between = weights_QT[words_QT] if words_QT.any() else weights_QT.ravel()
    count = min(between.size, math.ceil(EDGES_PER_WORD * len(weights_QT)))
    return max(LOWEST, round(float(np.partition(between, -count)[-count]), 3))


def select(shape: Shape, options: AttentionOptions) -> Selection:
    """Check the options against what the model has.

    Raises RecipeError for a kind, a layer or a head that is not there.
    """
    kinds = tuple(kind for kind in shape if options.kind in (None, kind))
    if not kinds:
        fix = f"This model has {', '.join(shape)}.{nearest(str(options.kind), list(shape))}"
        raise RecipeError.of(f"there is no attention called {options.kind!r}", "--kind", fix)
    layer = None if options.layer in (None, ALL) else _number("layer", str(options.layer), shape, kinds, 0)
    head: Head = MEAN if options.head in (MEAN, ALL) else ROLLOUT
    if options.head not in (MEAN, ROLLOUT, ALL):
        head = _number("head", options.head, shape, kinds, 1)
    if layer is not None:  # an encoder may have more layers than its decoder
        kinds = tuple(kind for kind in kinds if layer < shape[kind][0])
    if isinstance(head, int):
        kinds = tuple(kind for kind in kinds if head < shape[kind][1])
    if head == ROLLOUT:
        kinds = tuple(kind for kind in kinds if kind != CROSS)
        if not kinds:
            what = "cross-attention has no rollout: its rows and columns are different texts"
            raise RecipeError.of(what, "--head", f"Use {MEAN}, {ALL} or a number.")
    return Selection(kinds, layer, head, options.layer == ALL, options.head == ALL)


def _number(name: str, stated: str, shape: Shape, kinds: Sequence[Kind], which: int) -> int:
    most = max(shape[kind][which] for kind in kinds)
    words = [ALL] if name == "layer" else [MEAN, ROLLOUT, ALL]
    fix = f"Use a number from 0 to {most - 1}, {', '.join(words[:-1])}{' or ' if words[:-1] else 'or '}{words[-1]}."
    if not stated.isdigit():
        raise RecipeError.of(f"{stated!r} is no {name}", f"--{name}", f"{fix}{nearest(stated, words)}")
    if int(stated) >= most:
        raise RecipeError.of(f"there is no {name} {stated}: the model has {most}", f"--{name}", fix)
    return int(stated)
