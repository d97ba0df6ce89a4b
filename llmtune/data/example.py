"""One encoded row: the model's input and its targets. Each task fills the columns that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmtune.records import Batch


@dataclass(frozen=True)
class Example:
    """One encoded row. Columns that a task does not need are empty."""

    input_ids: Sequence[int]
    """Input tokens of the model, or of its encoder if it has one; empty for speech."""
    spans: Sequence[int]
    """Supervised half-open ranges, flat: start, end, start, end. Token `start` is predicted from `start - 1`. For
    vectors, the range of each text in `input_ids`."""
    target_bytes: int
    """UTF-8 bytes of the supervised text without end markers: the denominator of bits per byte."""
    target_ids: Sequence[int] = ()
    """Target tokens outside `input_ids`: a decoder's output, or the letters of a recording."""
    target_spans: Sequence[int] = ()
    """Supervised ranges of `target_ids`, as in `spans`."""
    other_ids: Sequence[int] = ()
    """The prompt with the other answer: the rejected answer, or (KTO) the answer to another prompt."""
    other_spans: Sequence[int] = ()
    """The answer in `other_ids`, as in `spans`."""
    token_type_ids: Sequence[int] = ()
    """Which of two texts each token belongs to; empty if there is one text."""
    class_ids: Sequence[int] = ()
    """The class of the text, as a one-element list; for vectors, a hash of each text."""
    tag_ids: Sequence[int] = ()
    """The tag of each token; `IGNORED` if not predicted. For vectors, a hash of the row's label."""
    answer: Sequence[int] = ()
    """First and last token of the answer span."""
    values: Sequence[float] = ()
    """Numeric targets: one per class, or a single number."""
    weights: Sequence[float] = ()
    """The example's weight in the loss, as a one-element list."""
    desirable: Sequence[int] = ()
    """1 for a liked answer, 0 for a disliked one (KTO)."""
    audio: Sequence[int] = ()
    """Samples at the model's rate, 16 bits."""
    counted: int | None = None
    """The number of predictions, if it differs from the number of tokens in `spans`."""
    cost: int | None = None
    """The number of tokens in a micro-batch, if it differs from the length of `input_ids`."""
    longest: int | None = None
    """The longest text in tokens, if `input_ids` joins several; used during encoding, not stored."""
    lost: tuple[int, int, int] | None = None
    """What truncation removed from the row (`llmtune.data.overlong.Lost`); counted during encoding, not stored."""

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
        if self.longest is not None:
            return self.longest
        return max(len(self.input_ids), len(self.target_ids), len(self.other_ids))


Collate = Callable[[Sequence[Example], int], Batch]
"""Makes a batch of examples. The number seeds random parts such as masks; evaluation passes 0."""


def span_sizes(spans: Sequence[int]) -> int:
    """Return the total length of flat half-open ranges."""
    return int(sum(spans[1::2]) - sum(spans[::2]))
