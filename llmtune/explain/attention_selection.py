"""What of a model's attention is shown: the wishes of a person, held against what the model has; and what was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtune.errors import RecipeError, nearest
from llmtune.explain.attention_summary import MEAN, ROLLOUT, Gathered, Head, Lines
from llmtune.explain.capture import CROSS, Kind
from llmtune.explain.rollout import Matrix
from llmtune.explain.target import BASE, TUNED, Subject

ALL = "all"
DIFFERENCE = "difference"
"""What is shown beside the sides of a run: tuned minus base."""
Shape = Mapping[Kind, tuple[int, int]]
"""Layers and heads of each kind of attention."""


@dataclass(frozen=True)
class Wishes:
    """What is to be shown; None is what shows most."""

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
class Choice:
    """Which layers and heads are drawn, once it is known that there are such."""

    kinds: tuple[Kind, ...]
    layer: int | None
    """None: that which shows most."""
    head: Head
    layers: bool = False
    """Whether all layers are drawn."""
    heads: bool = False
    """Whether all heads are drawn."""


@dataclass(frozen=True)
class Seen:
    """What was seen of all sides on one text, and what of it is drawn."""

    subject: Subject
    sides: Mapping[str, Gathered]
    lines: Lines
    choice: Choice
    layers: Mapping[Kind, int]
    """The layer that is drawn of each kind."""

    @property
    def shown(self) -> tuple[str, ...]:
        """What stands side by side: the model; or base, tuned and their difference."""
        names = tuple(self.sides)
        return (*names, DIFFERENCE) if names == (BASE, TUNED) else names

    def numbers(self, kind: Kind) -> list[int]:
        """Return the layers that have this kind of attention."""
        return sorted(next(iter(self.sides.values())).layers[kind])

    def heads(self, kind: Kind) -> int:
        """Return how many heads each layer has."""
        return max(layer.count for layer in next(iter(self.sides.values())).layers[kind].values())

    def weights(self, side: str, kind: Kind, layer: int, head: Head) -> Matrix | None:
        """Return weights [Q, T] of a side, or tuned minus base; None where they were not kept."""
        if side != DIFFERENCE:
            return self.sides[side].layers[kind][layer].of(head)
        base, tuned = (self.weights(name, kind, layer, head) for name in (BASE, TUNED))
        return None if base is None or tuned is None else tuned - base


def choose(shape: Shape, wishes: Wishes) -> Choice:
    """Hold what a person wants against what the model has.

    Raises RecipeError, for all that is not there at once by name and range.
    """
    kinds = tuple(shape)
    if wishes.kind is not None:
        if wishes.kind not in shape:
            fix = f"This model has {', '.join(shape)}.{nearest(wishes.kind, list(shape))}"
            raise RecipeError.of(f"there is no attention called {wishes.kind!r}", "--kind", fix)
        kinds = (next(kind for kind in shape if kind == wishes.kind),)
    layer = None if wishes.layer in (None, ALL) else _number("layer", str(wishes.layer), shape, kinds, 0)
    head: Head = MEAN if wishes.head in (MEAN, ALL) else ROLLOUT
    if wishes.head not in (MEAN, ROLLOUT, ALL):
        head = _number("head", wishes.head, shape, kinds, 1)
    if layer is not None:  # an encoder may have more layers than its decoder
        kinds = tuple(kind for kind in kinds if layer < shape[kind][0])
    if isinstance(head, int):
        kinds = tuple(kind for kind in kinds if head < shape[kind][1])
    if head == ROLLOUT:
        kinds = tuple(kind for kind in kinds if kind != CROSS)
        if not kinds:
            what = "cross-attention has no rollout: its rows and columns are different texts"
            raise RecipeError.of(what, "--head", f"Use {MEAN}, {ALL} or a number.")
    return Choice(kinds, layer, head, wishes.layer == ALL, wishes.head == ALL)


def _number(name: str, stated: str, shape: Shape, kinds: Sequence[Kind], which: int) -> int:
    most = max(shape[kind][which] for kind in kinds)
    words = [ALL] if name == "layer" else [MEAN, ROLLOUT, ALL]
    fix = f"Use a number from 0 to {most - 1}, {', '.join(words[:-1])}{' or ' if words[:-1] else 'or '}{words[-1]}."
    if not stated.isdigit():
        raise RecipeError.of(f"{stated!r} is no {name}", f"--{name}", f"{fix}{nearest(stated, words)}")
    if int(stated) >= most:
        raise RecipeError.of(f"there is no {name} {stated}: the model has {most}", f"--{name}", fix)
    return int(stated)
