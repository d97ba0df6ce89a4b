"""Stretches of an example's text, and which of them are learned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 2000

Piece = tuple[str, bool]
"""A text, and whether it is learned."""


def highlight(ids: Sequence[int], spans: Sequence[int], processor: PreTrainedTokenizerBase) -> list[Piece]:
    """Cut token ids into stretches of text, and say of each whether it lies in `spans`."""
    learned = [False] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        learned[start:end] = [True] * (end - start)
    pieces = []
    for flag, pairs in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
        pieces.append((decode_shortened([token for token, _ in pairs], processor), flag))
    return pieces


def decode_shortened(ids: Sequence[int], processor: PreTrainedTokenizerBase) -> str:
    """Return the text of token ids, special ones too, without the middle of a long one."""
    return _cut(processor.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _cut(text: str) -> str:
    """Leave the middle of a long text out, and say how much that is."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
