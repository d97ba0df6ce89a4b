"""Conversations longer than `data.max_length`: refused, left out, truncated without losing a target, or split.

`truncate` keeps the complete last answer and the system message. It removes the earliest exchanges first, with their
answers, then the start of the last question. A row that still does not fit is left out with the reason.

`split` loses no supervised text: it cuts before a user's turn. Each part has the system message and as many exchanges
as fit.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_messages import list_pictures
from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.example import Example, span_sizes
from llmtune.data.pictures import PLACE
from llmtune.data.task_interface import Encoded
from llmtune.data.tokenization import cut_start, tokenize_each

TOO_LONG = "too long"
"""Prefix of the reason for a row that is left out because of its length."""

NOTHING = "nothing to learn"
"""Prefix of the reason for a row without a supervised token."""

Encode = Callable[[Sequence[ChatRow]], list[Encoded]]
"""Encodes conversations of any length: returns the examples of each, or the reason why it has none."""
Cut: TypeAlias = Generator[ChatRow, Encoded, Encoded]
"""Shortens one conversation: yields shorter versions, receives their encodings, returns its own."""

CUTS_PICTURE = ", and a picture would be cut"

_TRIES = 6
_GUESSES = 4
"""How often to estimate the number of exchanges that fit, before the search continues by bisection."""


class Lost(NamedTuple):
    """What truncation removed from an overlong row."""

    tokens: int
    answers: int = 0
    """Number of answers that are no longer supervised."""
    supervised: int = 0
    """Number of tokens that are no longer supervised."""


def only_last(row: ChatRow) -> ChatRow:
    """Mark all answers but the last as not trained. This then holds in each part of a split row."""
    messages = row["messages"]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return {**row, "messages": [m if i == last else {**m, "train": False} for i, m in enumerate(messages)]}


def longest(examples: Sequence[Example]) -> int:
    """Return the length of the longest example, in tokens."""
    return max(len(example.input_ids) for example in examples)


def too_long(tokens: int, max_length: int, why: str = "") -> str:
    """Return the reason for a row with this many tokens."""
    return f"{TOO_LONG}: {tokens} tokens, data.max_length is {max_length}{why}"


@dataclass(frozen=True)
class ChatFit:
    """Fits conversations into `max_length` tokens."""

    encode: Encode
    processor: PreTrainedTokenizerBase
    on_overlong: str
    max_length: int

    def fit(self, rows: Sequence[ChatRow], encoded: Sequence[Encoded]) -> list[Encoded]:
        """Return the examples of each conversation that fit, or the reason why it has none.

        All conversations are shortened together: each round encodes one shorter version of each, in one call.
        """
        results = list(encoded)
        cuts: dict[int, Cut] = {}
        for k, (row, examples) in enumerate(zip(rows, encoded, strict=True)):
            if isinstance(examples, str) or longest(examples) <= self.max_length:
                continue
            if self.on_overlong in ("truncate", "split"):
                way = _truncate_chat if self.on_overlong == "truncate" else _split_chat
                cuts[k] = way(_Conversation(row, examples, self), self)
            else:
                results[k] = too_long(longest(examples), self.max_length)
        replies: dict[int, Any] = dict.fromkeys(cuts)  # None starts a generator
        while replies:
            batch: dict[int, ChatRow] = {}
            for k, reply in replies.items():
                try:
                    batch[k] = cuts[k].send(reply)
                except StopIteration as end:
                    results[k] = end.value
            replies = dict(zip(batch, self.encode(list(batch.values())) if batch else [], strict=True))
        return results


class _Conversation:
    """An overlong conversation, in exchanges, with an estimated size in tokens for each."""

    def __init__(self, row: ChatRow, examples: Sequence[Example], fit: ChatFit) -> None:
        self.row, self.examples, self.tokens = row, examples, longest(examples)
        self.system, self.exchanges = _exchanges(row["messages"])
        parts = [self.system, *self.exchanges]
        counts = list(map(len, tokenize_each(fit.processor, ["\n".join(map(_spoken, part)) for part in parts])))
        around = (self.tokens - sum(counts)) / len(row["messages"])
        sizes = [count + around * len(part) for count, part in zip(counts, parts, strict=True)]
        self.base, self.sizes = sizes[0], sizes[1:]
        self._max_length = fit.max_length

    def part(self, first: int, end: int) -> ChatRow:
        """Return the row with only these exchanges, after its system messages."""
        return {**self.row, "messages": [*self.system, *chain.from_iterable(self.exchanges[first:end])]}

    def loses_picture(self, first: int) -> bool:
        """Whether the exchanges before `first` have a picture, which the later ones may be about."""
        return bool(list_pictures([*chain.from_iterable(self.exchanges[:first])]))

    def most(
        self, sizes: Sequence[float], take: Callable[[int], ChatRow]
    ) -> Generator[ChatRow, Encoded, tuple[int, Encoded]]:
        """Return the highest number of exchanges that is not too long, with its encoding; 0 if none is.

        `take(n)` is the conversation of n exchanges; their estimated sizes are the first n of `sizes`. An estimate only
        guides the search: the result is encoded, and one more exchange is verified to be too long.
        """
        estimates = list(accumulate(sizes, initial=self.base))
        fits, over, kept = 0, len(estimates), cast(Encoded, "")
        guess, tries = bisect_right(estimates, self._max_length) - 1, 0
        while over - fits > 1:
            guess = min(max(guess, fits + 1), over - 1)
            encoded = yield take(guess)
            tries += 1
            if isinstance(encoded, str):  # mostly "nothing to learn", which does not show the length
                fits, kept, guess = guess, encoded, 2 * guess
                continue
            size = longest(encoded)
            if size > self._max_length:
                over = guess
            else:
                fits, kept = guess, encoded
            error = size - estimates[guess]
            guess = bisect_right(estimates, self._max_length - error) - 1 if tries < _GUESSES else (fits + over) // 2
        return fits, kept


def _spoken(message: Message) -> str:
    """Return the text of a message, including its calls."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls) if calls else "")


def _with_loss(kept: list[Example], whole: Sequence[Example]) -> list[Example]:
    """Record on the first example what was lost."""

    def counted(examples: Sequence[Example]) -> tuple[int, int, int]:
        spans = [example.spans for example in examples]
        tokens = sum(len(example.input_ids) for example in examples)
        return tokens, sum(map(len, spans)) // 2, sum(map(span_sizes, spans))

    lost = Lost(*(before - after for before, after in zip(counted(whole), counted(kept), strict=True)))
    return [replace(kept[0], lost=lost), *kept[1:]]


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split a conversation into its system messages and its exchanges: each runs from a user's turn to the next."""
    start = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    exchanges: list[list[Message]] = []
    for i, message in enumerate(messages[start:], start):
        begins = message["role"] == "user" and (i == start or messages[i - 1]["role"] == "assistant")
        if begins or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:start]), exchanges


def _truncate_chat(chat: _Conversation, fit: ChatFit) -> Cut:
    """Keep as many of the last exchanges as fit, at least one; cut its question if necessary."""
    n, max_length = len(chat.exchanges), fit.max_length
    kept, examples = yield from chat.most(chat.sizes[:0:-1], lambda last: chat.part(n - last, n))
    if chat.loses_picture(n - max(kept, 1)):
        return too_long(chat.tokens, max_length, CUTS_PICTURE)
    if isinstance(examples, str) and kept:
        return too_long(chat.tokens, max_length, f", and cut at a turn: {examples}")
    if not isinstance(examples, str):
        return _with_loss(examples, chat.examples)
    question, *rest = chat.exchanges[-1]
    for _ in range(_TRIES):  # a cut text may take one token more than counted
        examples = yield {**chat.row, "messages": [*chat.system, question, *rest]}
        if isinstance(examples, str):
            return too_long(chat.tokens, max_length, f", and with its question cut: {examples}")
        if longest(examples) <= max_length:
            return _with_loss(examples, chat.examples)
        if question["role"] != "user":
            break
        text = cut_start(fit.processor, question["content"], longest(examples) - max_length)
        if text.count(PLACE) < question["content"].count(PLACE):
            return too_long(chat.tokens, max_length, CUTS_PICTURE)
        question = {**question, "content": text}
        if not text:
            break
    return too_long(chat.tokens, max_length, ", and its last answer does not fit with any of its question")


def _split_chat(chat: _Conversation, fit: ChatFit) -> Cut:
    """Fill parts with exchanges from first to last; skip exchanges without supervised text."""
    parts: list[Example] = []
    first, n = 0, len(chat.exchanges)
    while first < n:
        sizes = chat.sizes[first:] if first else chat.sizes[:-1]  # all of them together are known to be too long

        def take(count: int, first: int = first) -> ChatRow:
            return chat.part(first, first + count)

        taken, examples = yield from chat.most(sizes, take)
        if not taken:
            return too_long(chat.tokens, fit.max_length, ", and one exchange alone does not fit")
        if chat.loses_picture(first):
            return too_long(chat.tokens, fit.max_length, CUTS_PICTURE)
        if not isinstance(examples, str):
            parts += examples
        elif not examples.startswith(NOTHING):
            return too_long(chat.tokens, fit.max_length, f", and split at a turn: {examples}")
        first += taken
    return parts or too_long(chat.tokens, fit.max_length, ", and the rest has nothing to learn")
