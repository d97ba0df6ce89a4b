"""Token ids into text, a piece at a time: nothing is returned that the next token could still change or take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the bytes of a character that lacks its rest; there are up to three of them."""


class Detokenizer:
    """The text of one answer as it grows; it ends before the stop text that is complete first."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, tuple(stops)
        self.ids: list[int] = []
        self.text = self.returned = ""
        self.stopped = False
        """Whether one of the stop texts was generated: what follows is not part of the answer."""

    def add(self, ids: Sequence[int]) -> str:
        """Take new ids and return the text that is certain now; ids behind a stop text are not counted."""
        for some in [[token] for token in ids] if self.stops else [list(ids)]:
            if self.stopped:
                break
            self.ids += some
            self._decode()
        certain = self.text
        if not self.stopped:
            certain = self.text[:-3] + self.text[-3:].rstrip(UNFINISHED)
            certain = certain[: len(certain) - self._begun(certain)]
        if not certain.startswith(self.returned):
            return ""
        piece, self.returned = certain[len(self.returned) :], certain
        return piece

    def close(self) -> str:
        """Return what is left of the text when no more ids come.

        Where a decoder changes what was returned, it is all behind what still holds.
        """
        holds = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(self.text, self.returned, strict=False))))
        self.returned = self.text
        return self.text[holds:]

    def _decode(self) -> None:
        self.text = self.decode(self.ids)
        starts = {self.text.index(stop): len(stop) for stop in self.stops if stop in self.text}
        if starts:
            _, start = min((start + size, start) for start, size in starts.items())
            self.text, self.stopped = self.text[:start], True

    def _begun(self, text: str) -> int:
        """Return how many characters at the end of `text` may be the beginning of a stop text."""
        sizes = range(min(max(map(len, self.stops), default=0) - 1, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self.stops)), 0)
