"""One encoded row: the model's input and its targets. A task with further columns has its own type of example."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llmtune.records import Batch

if TYPE_CHECKING:
    from llmtune.data.pictures import Picture

Samples: TypeAlias = Sequence[int]
"""Sound at the model's rate, 16 bits."""
Bytes: TypeAlias = Sequence[int]
"""UTF-8."""
AnyExample: TypeAlias = Any
"""An example of the task's own type."""


@dataclass(frozen=True)
class Example:
    """One encoded row, with the columns of every task. Those that a task does not need are empty.

    A subclass adds columns of type `Sequence[int]`, `Sequence[float]`, `Samples` or `Bytes`, which are stored on disk.
    """

    input_ids: Sequence[int]
    """Input tokens of the model, or of its encoder if it has one; empty for speech."""
    spans: Sequence[int]
    """Supervised half-open ranges of `input_ids`, flat: start, end, start, end. Token `start` is predicted from
    `start - 1`."""
    target_bytes: int
    """UTF-8 bytes of the supervised text without end markers: the denominator of bits per byte."""
    token_type_ids: Sequence[int] = ()
    """Which of two texts each token belongs to; empty if there is one text."""
    counted: int | None = None
    """The number of predictions, if it differs from the number of tokens in `spans`."""
    cost: int | None = None
    """The number of tokens in a micro-batch, if it differs from the length of `input_ids`."""
    longest: int | None = None
    """The longest text in tokens, if `input_ids` joins several; used during encoding, not stored."""
    lost: tuple[int, int, int] | None = None
    """What truncation removed from the row (`llmtune.data.overlong.Lost`); counted during encoding, not stored."""

    @property
    def sequences(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Everything that the model reads or writes, each with its supervised ranges."""
        return [(self.input_ids, self.spans)]

    @property
    def supervised(self) -> int:
        """The number of supervised predictions."""
        return span_sizes(self.spans) if self.counted is None else self.counted

    @property
    def tokens(self) -> int:
        """Its cost in a micro-batch, in tokens."""
        return len(self.input_ids) if self.cost is None else self.cost

    @property
    def reach(self) -> int:
        """Its longest sequence in tokens, which the model's context must fit."""
        return max(len(ids) for ids, _ in self.sequences) if self.longest is None else self.longest


@dataclass(frozen=True)
class ImageExample(Example):
    """A text with pictures. Their tensors are made from the files when a batch needs them."""

    pictures: Bytes = ()
    """The pictures as JSON, in the order of their places."""

    @classmethod
    def of(cls, example: Example, pictures: Sequence[Picture] = ()) -> ImageExample:
        """Return an example with its pictures; one that has some keeps them."""
        if isinstance(example, ImageExample):
            return example
        return cls(**vars(example), pictures=json.dumps(pictures).encode())

    def without_labels(self, ids: Collection[int]) -> ImageExample:
        """Return the example with no label on these tokens."""
        pairs = zip(self.spans[::2], self.spans[1::2], strict=True)
        labels = {place for start, end in pairs for place in range(start, end) if self.input_ids[place] not in ids}
        spans = [place + end for place in sorted(labels) for end in (0, 1) if place - 1 + 2 * end not in labels]
        return self if len(spans) == len(self.spans) else replace(self, spans=spans)

    def list_pictures(self) -> list[Picture]:
        """Return the pictures."""
        pictures: list[Picture] = json.loads(bytes(self.pictures))
        return pictures


Collate = Callable[[Sequence[AnyExample], int], Batch]
"""Makes a batch of examples. The number seeds random parts such as masks; evaluation passes 0."""
NUMBER_FORMATS: dict[str, type[np.generic]] = {
    "Sequence[int]": np.int32,
    "Sequence[float]": np.float32,
    "Samples": np.int16,
    "Bytes": np.uint8,
}
"""By the annotation of a column, the format of its numbers on disk."""


def list_columns(kind: type[Example]) -> dict[str, type[np.generic]]:
    """Return the columns of an example type that are lists, with their number formats."""
    return {one.name: NUMBER_FORMATS[str(one.type)] for one in fields(kind) if str(one.type) in NUMBER_FORMATS}


def span_sizes(spans: Sequence[int]) -> int:
    """Return the total length of flat half-open ranges."""
    return int(sum(spans[1::2]) - sum(spans[::2]))
