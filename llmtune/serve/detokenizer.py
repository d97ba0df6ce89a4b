"""Token ids into text, a piece at a time: nothing is told that the next token could still change or take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmtune.serve.chat_session import UNFINISHED

Decode = Callable[[Sequence[int]], str]


class Wording:
    """The text of one answer as it grows; it ends before the stop text that is complete first."""

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, tuple(stops)
        self.ids: list[int] = []
        self.text = self.told = ""
        self.stopped = False
        """Whether one of the stop texts was written: what follows is not part of the answer."""

    def take(self, ids: Sequence[int]) -> str:
        """Take new ids and return the text that is certain now; ids behind a stop text are not counted."""
        for some in [[token] for token in ids] if self.stops else [list(ids)]:
            if self.stopped:
                break
            self.ids += some
            self._read()
        certain = self.text if self.stopped else self.text[:-3] + self.text[-3:].rstrip(UNFINISHED)
        if not self.stopped:
            certain = certain[: len(certain) - self._begun(certain)]
        return self._tell(certain)

    def close(self) -> str:
        """Return what is left of the text when no more ids come.

        Where a decoder writes otherwise what was told, it is all behind what still holds.
        """
        pairs = enumerate(zip(self.text, self.told, strict=False))
        holds = next((at for at, pair in pairs if pair[0] != pair[1]), min(len(self.text), len(self.told)))
        piece, self.told = self.text[holds:], self.text
        return piece

    def _read(self) -> None:
        self.text = self.decode(self.ids)
        starts = [(self.text.index(stop), len(stop)) for stop in self.stops if stop in self.text]
        if starts:
            _, start = min((start + size, start) for start, size in starts)
            self.text, self.stopped = self.text[:start], True

    def _begun(self, text: str) -> int:
        """Return how many characters at the end of `text` may be the beginning of a stop text."""
        for size in range(min(max(map(len, self.stops), default=0) - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return size
        return 0

    def _tell(self, text: str) -> str:
        if not text.startswith(self.told):
            return ""
        piece, self.told = text[len(self.told) :], text
        return piece
