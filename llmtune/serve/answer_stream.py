"""Turn token ids into the parts of an answer: thoughts, text and calls, each as soon as it is final."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_parser import canonical_call, response_parser
from llmtune.data.chat_rows import ToolCall
from llmtune.data.chat_template import ChatTemplate, Tools
from llmtune.evaluate.generation import prompt_end

ParserEvent = Mapping[str, object]
CONTENT, REASONING, CALLS = "content", "reasoning_content", "tool_calls"
FIELDS = {CONTENT: CONTENT, REASONING: REASONING, "thinking": REASONING, CALLS: CALLS}
"""Field of a response template -> field of a message."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoders write it for each byte of an incomplete character, up to three times."""


class Detokenizer:
    """The text of one answer as it grows; it ends before the first stop text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, tuple(stops)
        self.ids: list[int] = []
        self.text = self.returned = ""
        self.stopped = False
        """Whether a stop text was generated; text after it is not part of the answer."""

    def add(self, ids: Sequence[int]) -> str:
        """Add ids and return the text that is now final; ids after a stop text are ignored."""
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
        """Return the rest of the text; no ids may follow.

        If the decoder changed text that was already returned, return everything after the unchanged part.
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
        """Return the number of characters at the end of `text` that may begin a stop text."""
        sizes = range(min(max(map(len, self.stops), default=0) - 1, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self.stops)), 0)


@dataclass(frozen=True)
class Delta:
    """An addition to an answer; deltas add up to the answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)

    def __add__(self, more: Delta) -> Delta:
        return Delta(self.content + more.content, self.reasoning + more.reasoning, self.tool_calls + more.tool_calls)


class _Part:
    """Growing text without leading whitespace; trailing whitespace is held back until more text follows."""

    def __init__(self) -> None:
        self.text = self.pending = ""

    def add(self, text: str) -> str:
        """Add text and return the part that is final."""
        text = self.pending + text
        text = text if self.text else text.lstrip()
        kept = text.rstrip()
        self.pending = text[len(kept) :]
        self.text += kept
        return kept


class AnswerStream:
    """A growing answer in its parts; without a template all of it is text, whitespace included."""

    def __init__(
        self,
        processor: PreTrainedTokenizerBase,
        ends: Collection[int],
        template: ChatTemplate | None = None,
        tools: Tools = None,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self.processor, self.ends, self.template = processor, ends, template
        self.parser = None if template is None else response_parser(template, tools, prompt_end(processor, prompt))
        self.detokenizer = Detokenizer(self._decode, stops)
        self._parts = {CONTENT: _Part(), REASONING: _Part()}
        self._body = ""
        """The text of an incomplete call."""
        self.tool_calls: list[ToolCall] = []
        special = processor.added_tokens_decoder.items() if template else ()
        self._special = {number: token.content for number, token in special if token.special}
        self._stray: set[str] = set()
        """Generated special tokens that do not mark a part of an answer."""

    @property
    def content(self) -> str:
        """The text so far."""
        return self.detokenizer.returned if self.template is None else self._parts[CONTENT].text

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        return self._parts[REASONING].text

    def add(self, ids: Sequence[int]) -> Delta:
        """Add ids and return the parts that are now final."""
        self._stray |= {self._special[token] for token in ids if token in self._special}
        return self._feed(self.detokenizer.add(ids))

    def close(self) -> Delta:
        """Return the rest; no ids may follow."""
        last = self._feed(self.detokenizer.close())
        if self.parser is None:
            return last
        parser = self.parser
        return last + self._read(lambda: parser.finalize()[1], "")

    def _decode(self, ids: Sequence[int]) -> str:
        written = list(takewhile(lambda token: token not in self.ends, ids))
        # Special tokens mark parts of an answer; without a template there are none.
        options = {"skip_special_tokens": self.template is None, "clean_up_tokenization_spaces": False}
        return str(self.processor.decode(written, **options))

    def _feed(self, text: str) -> Delta:
        if self.template is None:
            return Delta(text)
        if self.parser is None:
            return Delta(self._parts[CONTENT].add(text))
        parser = self.parser
        return self._read(lambda: parser.feed(text), text)

    def _read(self, step: Callable[[], list[ParserEvent]], text: str) -> Delta:
        """Process the events of a parser's step; after an unreadable call, everything else is text."""
        try:
            return self._take(step())
        except (ValueError, KeyError, TypeError):
            self.parser = None
            return Delta(self._parts[CONTENT].add(self._body + text))

    def _take(self, events: Iterable[ParserEvent]) -> Delta:
        delta = Delta()
        for event in events:
            field, kind = FIELDS.get(str(event["field"])), event["type"]
            if kind == "region_chunk" and field in self._parts:
                text = str(event["text"])
                for token in self._stray:
                    text = text.replace(token, "")
                grown = self._parts[field].add(text)
                delta += Delta(grown) if field == CONTENT else Delta(reasoning=grown)
            elif kind == "region_chunk" and field == CALLS:
                self._body += str(event["text"])
            elif kind == "region_close" and field == CALLS:
                value: Any = event["value"]
                calls = tuple(canonical_call(call) for call in (value if isinstance(value, list) else [value]))
                self._body = ""
                self.tool_calls += calls
                delta += Delta(tool_calls=calls)
        return delta
