"""One encoded row: what the model reads and what it has to predict. Each task fills the columns that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmtune.records import Batch


@dataclass(frozen=True)
class Example:
    """One encoded row."""

    input_ids: Sequence[int]
    """Tokens that the model (of two parts: its encoder) reads; empty for speech."""
    spans: Sequence[int]
    """Supervised half-open ranges, flat: start, end, start, end. Token `start` is predicted from `start - 1`."""
    target_bytes: int
    """UTF-8 bytes of the supervised text, end markers not counted: the denominator of bits per byte."""
    target_ids: Sequence[int] = ()
    """Tokens that are written and no part of `input_ids`: by a decoder, or as the letters of a recording."""
    target_spans: Sequence[int] = ()
    """Supervised ranges of `target_ids`, as in `spans`."""
    other_ids: Sequence[int] = ()
    """The prompt with the other answer: the rejected one, or (KTO) the answer to another prompt."""
    other_spans: Sequence[int] = ()
    """The answer in `other_ids`, as in `spans`."""
    token_type_ids: Sequence[int] = ()
    """Which of two texts each token belongs to; empty where there is one text."""
    class_ids: Sequence[int] = ()
    """The class of the text, as one number."""
    tag_ids: Sequence[int] = ()
    """The tag of each token; `IGNORED` where none is predicted."""
    answer: Sequence[int] = ()
    """First and last token of the answer."""
    values: Sequence[float] = ()
    """Numbers to predict: one a class, or one alone."""
    weights: Sequence[float] = ()
    """What the example counts in the loss, as one number."""
    desirable: Sequence[int] = ()
    """1 for an answer that is liked, 0 for one that is not (KTO)."""
    audio: Sequence[int] = ()
    """Samples at the model's rate, 16 bits."""
    counted: int | None = None
    """How many predictions it stands for, where that is not the number of tokens in `spans`."""
    cost: int | None = None
    """Tokens that it takes up in a micro-batch, where those are not `input_ids` alone."""
    lost: tuple[int, int, int] | None = None
    """What its row lost that was cut (`llmtune.data.overlong.Lost`); counted when it is encoded, and not kept."""

    @property
    def supervised(self) -> int:
        """How many predictions are learned from."""
        return span_sizes(self.spans) if self.counted is None else self.counted

    @property
    def tokens(self) -> int:
        """What it costs in a micro-batch, in tokens."""
        return len(self.input_ids) if self.cost is None else self.cost

    @property
    def reach(self) -> int:
        """The longest sequence in it, in tokens: what the model's context must hold."""
        return max(len(self.input_ids), len(self.target_ids), len(self.other_ids))


Collate = Callable[[Sequence[Example], int], Batch]
"""Makes a batch of examples; the number (0 in evaluation) is the draw of what is random in it, such as masks."""


def span_sizes(spans: Sequence[int]) -> int:
    """Add up the lengths of flat half-open ranges."""
    return int(sum(spans[1::2]) - sum(spans[::2]))
