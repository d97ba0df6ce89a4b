"""Encodes prompts with completions, and plain text, into token ids and supervised spans; also overlong ones.

`truncate` cuts the start of a prompt; plain text has no prompt, so it is left out. `split` cuts a text into windows.
Each starts as the tokenizer starts a text, then repeats the last token of the window before. So each token is
predicted once.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_rows import CompletionRow
from llmtune.data.example import Example
from llmtune.data.overlong import NOTHING, Lost, too_long
from llmtune.data.task_interface import Encoded
from llmtune.data.tokenization import continue_ids, decode, encode_texts, first_context, start_ids
from llmtune.errors import EnvironmentProblem
from llmtune.recipe.schema import Recipe


def encode_completion(
    rows: Sequence[CompletionRow], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Encoded]:
    """Return the examples of each row of `prompt` and `completion`, or the reason why it has none.

    The completion and its end token are supervised. Plain text (no prompt) is supervised from token 1 on. The
    tokenizer's start tokens are never supervised; each piece of a split text begins with them.
    """
    if processor.eos_token_id is None:
        raise EnvironmentProblem.of("the tokenizer has no end token", str(processor.name_or_path), "Set its eos_token.")
    joint = encode_texts(processor, [row["prompt"] + row["completion"] for row in rows], special=True)
    encodings = getattr(joint, "encodings", None) or [None] * len(rows)
    start = start_ids(processor)
    return [
        _encode_row(row, ids, encoding, start, processor, recipe)
        for row, ids, encoding in zip(rows, joint["input_ids"], encodings, strict=True)
    ]


def prompt_ids(prompt: str, processor: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids to complete `prompt` from: with the tokenizer's own start token, without an end token.

    For an empty prompt, return the context that predicts a text's first token.
    """
    ids = _plain_ends(encode_texts(processor, [prompt], special=True)["input_ids"][0], processor)
    return ids or first_context(processor)


def _encode_row(
    row: CompletionRow,
    joint: list[int],
    encoding: Encoding | None,
    start: list[int],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> Encoded:
    """Encode one prompt, which may be empty, and its completion."""
    text, completion = row["prompt"], row["completion"]
    if not completion.strip():
        return "the completion is empty" if text else "the text is empty"
    prompt = prompt_ids(text, processor) if text else []
    ids = _plain_ends(joint, processor)
    if ids[: len(prompt)] != prompt:
        target = continue_ids(processor, prompt, text, completion)
        if target is None:
            return "the tokenizer joins the end of the prompt and the start of the completion in one token"
        ids, encoding = [*prompt, *target], None
    elif ids != joint[: len(ids)]:
        encoding = None  # its offsets count a start token that was removed
    if len(ids) <= len(prompt or start):
        return f"the tokenizer drops every character of the {'completion' if text else 'text'}"
    if not start and ids[0] == processor.bos_token_id:
        start = ids[:1]  # the author wrote it
    starts = len(start) if ids[: len(start)] == start else 0
    first = len(prompt) or starts or 1
    byte_at = _byte_counter(text + completion, ids, encoding, processor, starts)
    learned = len(completion.encode()) if text else byte_at(len(ids)) - byte_at(first)
    if learned <= 0:
        return f"{NOTHING}: the text is a single token or character"
    example = Example([*ids, processor.eos_token_id], [first, len(ids) + 1], learned)
    data = recipe.data
    return _fit_completion(
        example, len(prompt), byte_at, on_overlong=data.on_overlong, max_length=data.max_length, start=starts
    )


def _plain_ends(ids: list[int], processor: PreTrainedTokenizerBase) -> list[int]:
    """Remove an end token that the tokenizer added, and a doubled start token."""
    end, start = processor.eos_token_id, processor.bos_token_id
    while ids and ids[-1] == end and len(ids) > 1:
        ids = ids[:-1]
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _byte_counter(
    text: str, ids: list[int], encoding: Encoding | None, processor: PreTrainedTokenizerBase, start: int
) -> Callable[[int], int]:
    """Return a function that counts the bytes of `text` in the first k tokens; the first `start` tokens have none."""

    def by_text(tokens: int) -> int:
        return len(decode(processor, ids[start : min(tokens, len(ids))]).encode())

    if encoding is None:
        return by_text
    offsets = encoding.token_to_chars

    def by_offset(tokens: int) -> int:
        span = offsets(min(tokens, len(ids)) - 1) if tokens > 0 else None
        end = span[1] if span else 0
        while end and end < len(text) and unicodedata.combining(text[end]):
            end += 1  # NFC joins a letter and its marks in one character, but its offsets are the letter's
        return len(text[:end].encode())

    return by_offset


def _fit_completion(
    example: Example,
    prompt_tokens: int,
    byte_at: Callable[[int], int],
    *,
    on_overlong: str,
    max_length: int,
    start: int,
) -> Encoded:
    """Fit a completion into `max_length` tokens, or return the reason why it does not fit.

    `start` counts the tokens that the tokenizer puts before every text. `byte_at(k)` counts the bytes of the text in
    the first k tokens.
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
    """Cut into windows. Each begins with the `start` tokens and, as context, the last token of the window before."""
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
