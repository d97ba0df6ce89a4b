"""Tokenize texts of any length at the cost of their first tokens: they are cut in characters first.

The server tokenizes in two threads, and setting the truncation of a tokenizer changes it: one lock serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase

CHARACTERS = 16
"""Characters per token of the limit that are read first. A text whose tokens are longer is read further."""
WIDER = 4
"""Factor to the next length."""
MOST_CHARACTERS = 1 << 18
"""Characters that are read at most, or CHARACTERS per token: a word of a million letters may be a single token."""
SURE = 2
"""A start with so many times the limit in tokens determines the first ones, wherever its last word was cut."""
_TOKENIZING = Lock()


def tokenize(processor: PreTrainedTokenizerBase, *texts: str | Sequence[str], **options: Any) -> Any:
    """Return the output of the processor; only one thread at a time may use it."""
    with _TOKENIZING:
        return processor(*texts, return_attention_mask=False, verbose=False, **options)


def start_of(text: str, processor: PreTrainedTokenizerBase, limit: int) -> str:
    """Return a start of the text that has its first `limit` tokens; a short text is returned unchanged.

    A start that is shorter than the text has at least twice as many tokens as the limit, or MOST_CHARACTERS.
    """
    size, most = CHARACTERS * limit, max(CHARACTERS * limit, MOST_CHARACTERS)
    while size < min(len(text), most):
        if len(tokenize(processor, text[:size], add_special_tokens=False)["input_ids"]) >= SURE * limit:
            return text[:size]
        size *= WIDER
    return text[:most]


def count_tokens(text: str, processor: PreTrainedTokenizerBase, limit: int, **options: Any) -> int:
    """Return the number of tokens of a text; of a long one, some number above `limit`."""
    count = len(tokenize(processor, start := start_of(text, processor, limit), **options)["input_ids"])
    return count if len(start) == len(text) else max(count, limit + 1)


def tokenize_columns(
    columns: Sequence[Sequence[str]], processor: PreTrainedTokenizerBase, limit: int | None
) -> list[tuple[list[int], list[int]]]:
    """Return the ids and token types of each text, or pair of texts, cut to `limit` tokens."""
    if limit is not None and len(columns) == 2:
        return tokenize_pairs([*zip(*columns, strict=True)], processor, limit)
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    texts = columns if limit is None else [[start_of(text, processor, limit) for text in columns[0]]]
    tokenized = tokenize(processor, *texts, **cut)
    kinds = tokenized.get("token_type_ids") or [[]] * len(columns[0])
    return list(zip(tokenized["input_ids"], kinds, strict=True))


def tokenize_pairs(
    pairs: Sequence[tuple[str, str]], processor: PreTrainedTokenizerBase, limit: int
) -> list[tuple[list[int], list[int]]]:
    """Return the ids and token types of pairs, cut to `limit` tokens; a text is tokenized once, whatever its pairs.

    They equal those of `processor(*pair, truncation=True, max_length=limit)`. If both texts have more than `limit`
    tokens, one token may come from the other text.
    """
    backend, typed = getattr(processor, "backend_tokenizer", None), "token_type_ids" in processor.model_input_names
    if backend is None or not backend.encode("a", add_special_tokens=False).ids:  # its special tokens are unknown
        texts = [[start_of(text, processor, limit) for text in column] for column in zip(*pairs, strict=True)]
        tokenized = tokenize(processor, *texts, truncation=True, max_length=limit)
        return list(zip(tokenized["input_ids"], tokenized.get("token_type_ids") or [[]] * len(pairs), strict=True))
    with _TOKENIZING:
        backend.no_truncation()
        backend.no_padding()
        word = backend.encode("a", add_special_tokens=False)
        frame = backend.post_process(word, word)
    ids, types, size = frame.ids, frame.type_ids, len(word.ids)
    places = [place for place, is_added in enumerate(frame.special_tokens_mask) if not is_added]
    left, right, room = places[0], places[size], limit - len(ids) + len(places)
    joined: list[tuple[list[int], list[int]]] = []

    def cut(ids: list[int], most: int) -> list[int]:
        return ids[:most] if processor.truncation_side == "right" else ids[max(0, len(ids) - most) :]

    for pair in pairs:  # a post-processor would join everything that it cuts off too
        first, second = _start_ids(pair[0], processor, limit), _start_ids.__wrapped__(pair[1], processor, limit)
        first = cut(first, max(room // 2, room - len(second)))
        second = cut(second, room - len(first))
        both = [*ids[:left], *first, *ids[left + size : right], *second, *ids[right + size :]]
        kinds = [types[left]] * len(first) + types[left + size : right] + [types[right]] * len(second)
        joined.append((both, [*types[:left], *kinds, *types[right + size :]] if typed else []))
    return joined


@lru_cache(maxsize=8)  # a query has many passages, which may be asked for a few at a time
def _start_ids(text: str, processor: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Return the ids of a start of the text, which has its first `limit` tokens."""
    return list(tokenize(processor, start_of(text, processor, limit), add_special_tokens=False)["input_ids"])
