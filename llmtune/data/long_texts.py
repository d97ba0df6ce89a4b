"""Tokenize texts of any length at the cost of their first tokens: they are cut in characters first.

The server tokenizes in two threads, and setting the truncation of a tokenizer changes it: one lock serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase

CHARACTERS = 16
"""Characters per token of the limit that are read first. A text whose tokens are longer is read further."""
WIDER = 4
"""Factor to the next length."""
SURE = 2
"""A start with so many times the limit in tokens determines the first ones, wherever its last word was cut."""
_TOKENIZING = Lock()


def tokenize(processor: PreTrainedTokenizerBase, *texts: str | Sequence[str], **options: Any) -> Any:
    """Return the output of the processor; only one thread at a time may use it."""
    with _TOKENIZING:
        return processor(*texts, return_attention_mask=False, verbose=False, **options)


def start_of(text: str, processor: PreTrainedTokenizerBase, limit: int) -> str:
    """Return a start of the text that has its first `limit` tokens; a short text is returned unchanged.

    A start that is shorter than the text has at least twice as many tokens as the limit.
    """
    size = CHARACTERS * limit
    while size < len(text):
        if len(tokenize(processor, text[:size], add_special_tokens=False)["input_ids"]) >= SURE * limit:
            return text[:size]
        size *= WIDER
    return text


def count_tokens(text: str, processor: PreTrainedTokenizerBase, limit: int, **options: Any) -> int:
    """Return the number of tokens of a text; of a long one, some number above `limit`."""
    return len(tokenize(processor, start_of(text, processor, limit), **options)["input_ids"])


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
    """Return the ids and token types of pairs, cut to `limit` tokens; each different text is tokenized once.

    They equal those of `processor(*pair, truncation=True, max_length=limit)`. If both texts have more than `limit`
    tokens, one token may come from the other text.
    """
    starts = {text: start_of(text, processor, limit) for text in dict.fromkeys(text for pair in pairs for text in pair)}
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python has no encodings to join
        texts = [[starts[text] for text in column] for column in zip(*pairs, strict=True)]
        tokenized = tokenize(processor, *texts, truncation=True, max_length=limit)
        return list(zip(tokenized["input_ids"], tokenized.get("token_type_ids") or [[]] * len(pairs), strict=True))
    typed = "token_type_ids" in processor.model_input_names
    with _TOKENIZING:
        backend.no_truncation()
        backend.no_padding()
        encodings = {text: backend.encode(start, add_special_tokens=False) for text, start in starts.items()}
        backend.enable_truncation(limit, direction=processor.truncation_side)
        joined = [backend.post_process(encodings[first], encodings[second]) for first, second in pairs]
    return [(one.ids, one.type_ids if typed else []) for one in joined]
