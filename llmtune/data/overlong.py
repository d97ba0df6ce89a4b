"""Rows longer than `data.max_length`: refused, left out, cut where no target is lost, or split.

`truncate` keeps the last answer whole. Of a conversation the earliest exchanges go first (their answers with them), the
system message stays, then the start of the last question goes; of a completion the start of its prompt goes. What
still does not fit, and plain text, which has no prompt, is left out with the reason.

`split` loses nothing that is learned: a conversation is cut before a user's turn, each part with the system message and
as many exchanges as fit; a completion into windows. Each window starts as the tokenizer starts a text, then repeats the
last token of the window before, so each token is predicted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from llmtune.data.chat_rows import ChatRow, Message
from llmtune.records import Example, span_sizes

TOO_LONG = "too long"
"""How the reason begins for a row that is left out because of its length."""

NOTHING = "nothing to learn"
"""How the reason begins for a row without a supervised token."""

Encoded = list[Example] | str
Encode = Callable[[ChatRow], Encoded]
"""Encode one conversation whatever its length: its examples, or the reason why not."""

_TRIES = 6


class Lost(NamedTuple):
    """What was cut off a row that was too long."""

    tokens: int
    answers: int = 0
    """Answers that are learned no more."""
    supervised: int = 0
    """Tokens that are learned no more."""


def longest(examples: Sequence[Example]) -> int:
    """Return the length in tokens of the longest example."""
    return max(len(example.input_ids) for example in examples)


def too_long(tokens: int, max_length: int, why: str = "") -> str:
    """Return the reason for a row of so many tokens."""
    return f"{TOO_LONG}: {tokens} tokens, data.max_length is {max_length}{why}"


def fit_chat(
    row: ChatRow,
    examples: list[Example],
    encode: Encode,
    *,
    on_overlong: str,
    max_length: int,
    shorten: Callable[[str, int], str],
) -> Encoded:
    """Bring the examples of a conversation below `max_length` tokens, or say why not.

    `shorten(text, tokens)` cuts at least so many tokens from the start of a text.
    """
    if longest(examples) <= max_length:
        return examples
    if on_overlong == "truncate":
        kept = _truncate_chat(row, longest(examples), encode, max_length, shorten)
        return kept if isinstance(kept, str) else _with_loss(kept, examples)
    if on_overlong == "split":
        return _split_chat(row, longest(examples), encode, max_length)
    return too_long(longest(examples), max_length)


def _with_loss(kept: list[Example], whole: Sequence[Example]) -> list[Example]:
    """Note at the first example what is not there any more."""

    def counted(examples: Sequence[Example]) -> tuple[int, int, int]:
        spans = [example.spans for example in examples]
        tokens = sum(len(example.input_ids) for example in examples)
        return tokens, sum(map(len, spans)) // 2, sum(map(span_sizes, spans))

    lost = Lost(*(before - after for before, after in zip(counted(whole), counted(kept), strict=True)))
    return [replace(kept[0], lost=lost), *kept[1:]]


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split a conversation into its system messages and its exchanges: from a user's turn up to the next."""
    start = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    exchanges: list[list[Message]] = []
    for i, message in enumerate(messages[start:], start):
        begins = message["role"] == "user" and (i == start or messages[i - 1]["role"] == "assistant")
        if begins or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:start]), exchanges


def _truncate_chat(
    row: ChatRow, tokens: int, encode: Encode, max_length: int, shorten: Callable[[str, int], str]
) -> Encoded:
    system, exchanges = _exchanges(row["messages"])
    for first in range(1, len(exchanges)):
        examples = encode({**row, "messages": [*system, *chain.from_iterable(exchanges[first:])]})
        if isinstance(examples, str):
            return too_long(tokens, max_length, f", and cut at a turn: {examples}")
        if longest(examples) <= max_length:
            return examples
    question, *rest = exchanges[-1]
    for _ in range(_TRIES):  # a cut text may take a token more than was counted
        examples = encode({**row, "messages": [*system, question, *rest]})
        if isinstance(examples, str):
            return too_long(tokens, max_length, f", and with its question cut: {examples}")
        if longest(examples) <= max_length:
            return examples
        if question["role"] != "user":
            break
        question = {**question, "content": shorten(question["content"], longest(examples) - max_length)}
        if not question["content"]:
            break
    return too_long(tokens, max_length, ", and its last answer does not fit with any of its question")


def _split_chat(row: ChatRow, tokens: int, encode: Encode, max_length: int) -> Encoded:
    """Fill parts with exchanges from the first to the last."""
    system, exchanges = _exchanges(row["messages"])
    parts: list[Example] = []
    first = 0
    while first < len(exchanges):
        best: list[Example] = []
        end = first
        for stop in range(first + 1, len(exchanges) + 1):
            examples = encode({**row, "messages": [*system, *chain.from_iterable(exchanges[first:stop])]})
            if isinstance(examples, str):
                if not examples.startswith(NOTHING):
                    return too_long(tokens, max_length, f", and split at a turn: {examples}")
            elif longest(examples) > max_length:
                break
            else:
                best = examples
            end = stop  # exchanges with nothing to learn in them are passed over
        if end == first:
            return too_long(tokens, max_length, ", and one exchange alone does not fit")
        parts += best
        first = end
    return parts or too_long(tokens, max_length, ", and what is left of it has nothing to learn")


def fit_completion(
    example: Example,
    prompt_tokens: int,
    byte_at: Callable[[int], int],
    *,
    on_overlong: str,
    max_length: int,
    start: int,
) -> Encoded:
    """Bring a completion below `max_length` tokens, or say why not.

    `start` counts the first tokens that the tokenizer puts before every text; `byte_at(k)` is how many bytes of the
    text the first k tokens hold.
    """
    tokens = len(example.input_ids)
    if tokens <= max_length:
        return [example]
    if on_overlong == "truncate":
        if not prompt_tokens:
            return too_long(
                tokens, max_length, ", and plain text has no prompt to cut: data.on_overlong: split keeps all"
            )
        excess = tokens - max_length
        if prompt_tokens - start <= excess:
            return too_long(tokens, max_length, ", and the completion does not fit with any of its prompt")
        ids = [*example.input_ids[:start], *example.input_ids[start + excess :]]
        spans = [border - excess for border in example.spans]
        return [Example(ids, spans, example.target_bytes, lost=Lost(excess))]
    if on_overlong == "split":
        if max(prompt_tokens, start + 1) >= max_length:
            return too_long(tokens, max_length, ", and its prompt alone does not fit")
        return _windows(example, byte_at, max_length, start)
    return too_long(tokens, max_length)


def _windows(example: Example, byte_at: Callable[[int], int], max_length: int, start: int) -> list[Example]:
    """Cut into windows; each begins with the `start` tokens and the last token of the one before, as context."""
    ids, first = example.input_ids, example.spans[0]
    head: Sequence[int] = ()
    windows: list[Example] = []
    begin = 0
    while begin < len(ids) - 1:
        end = min(begin + max_length - len(head), len(ids))
        learned, shift = max(first, begin + 1), len(head) - begin
        spans = [learned + shift, end + shift]
        windows.append(Example([*head, *ids[begin:end]], spans, byte_at(end) - byte_at(learned)))
        begin, head = end - 1, ids[:start]
    return windows
