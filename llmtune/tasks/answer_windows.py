"""Contexts of extractive qa, cut into windows behind their question; where an answer lies in them.

Shapes: T positions of a window, L lengths of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Characters = tuple[int, int]
"""The first character and the one behind the last."""


@dataclass(frozen=True)
class Window:
    """A stretch of a context behind its question, as the model reads it."""

    ids: list[int]
    kinds: list[int]
    characters: list[Characters | None]
    """By token, its characters in the context without spaces around them; None for the question and special tokens."""
    null: int
    """The token that stands for `no answer`: the one of the whole sequence, which comes first."""
    opens: bool
    """Whether the context begins in it."""
    closes: bool
    """Whether the context ends in it."""


def cut_context(
    question: str, context: str, processor: PreTrainedTokenizerBase, stride: int, max_length: int
) -> list[Window] | str:
    """Return the windows of a question's context, each with the whole question; or why there are none."""
    question = question.strip()
    alone = len(processor(question, "")["input_ids"])
    if alone + stride >= max_length:
        limit = f"{max_length} tokens (data.max_length)"
        return f"too long: the question takes {alone} of {limit}, and leaves no room for windows"
    tokenized = processor(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows: list[Window] = []
    count = len(tokenized["input_ids"])
    for i, ids in enumerate(tokenized["input_ids"]):
        texts, offsets = tokenized.sequence_ids(i), tokenized["offset_mapping"][i]
        characters = [
            trim(context, *offset) if text == 1 else None for offset, text in zip(offsets, texts, strict=True)
        ]
        kinds = tokenized["token_type_ids"][i] if "token_type_ids" in tokenized else []
        null = ids.index(processor.cls_token_id) if processor.cls_token_id in ids else 0
        windows.append(Window(ids, kinds, characters, null, opens=i == 0, closes=i == count - 1))
    return windows


def trim(text: str, start: int, end: int) -> Characters:
    """Leave spaces at either end of a range out: byte-level tokens and those of sentencepiece begin with one."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def answer_tokens(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token of an answer, by its characters, that lies whole in a window.

    A letter of it that the tokenizer drops is missed at the edge of a window alone: there it may be in the next one.
    """
    seen = _visible(window)
    inside = [token for token, (left, right) in seen if left < end and right > start]
    if not inside:
        return None
    (first, (reach_left, _)), (last, (_, reach_right)) = seen[0], seen[-1]
    begins = window.opens or inside[0] != first or reach_left <= start
    ends = window.closes or inside[-1] != last or reach_right >= end
    return (inside[0], inside[-1]) if begins and ends else None


def explain_missing(windows: Sequence[Window], start: int, end: int) -> str:
    """Return why an answer, by its characters, lies whole in no window."""
    if any(left < end and right > start for window in windows for _, (left, right) in _visible(window)):
        return "the answer lies whole in no window: raise qa.stride or data.max_length"
    return "the tokenizer makes nothing of the answer"


def _visible(window: Window) -> list[tuple[int, Characters]]:
    """Return the tokens of the context that have characters, and those."""
    return [(token, at) for token, at in enumerate(window.characters) if at is not None and at[1] > at[0]]


def find_span(
    starts_T: torch.Tensor, ends_T: torch.Tensor, window: Window, longest: int
) -> tuple[float, int, int] | None:
    """Return the best answer of one window: its score, its first character in the context and the one behind it.

    Of all pairs of tokens in the context that are in order and no more than `longest` tokens apart, the one whose
    logits have the highest sum; the SQuAD scripts look at the 20 likeliest of either end alone.
    """
    inside_T = torch.tensor([at is not None and at[1] > at[0] for at in window.characters])
    if not inside_T.any():
        return None
    firsts_T, lasts_T = (part.cpu().masked_fill(~inside_T, -torch.inf) for part in (starts_T, ends_T))
    reach = min(longest, len(firsts_T))
    padded = torch.cat([lasts_T, lasts_T.new_full((reach - 1,), -torch.inf)])
    scores_TL = firsts_T[:, None] + padded.unfold(0, reach, 1)  # [first, tokens from it to the last]
    first, further = divmod(int(scores_TL.argmax()), reach)
    left, right = window.characters[first], window.characters[first + further]
    assert left is not None
    assert right is not None
    return float(scores_TL[first, further]), left[0], right[1]
