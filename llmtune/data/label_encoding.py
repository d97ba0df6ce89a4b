"""Rows with labels into token ids: classes, tags, the ends of answers, and text whose words will be hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmtune.data.labelled_rows import OUTSIDE
from llmtune.data.overlong import Encoded, too_long
from llmtune.data.target_collators import IGNORED
from llmtune.errors import EnvironmentProblem
from llmtune.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

UNKNOWN = "label unknown"


# Classes


def encode_classes(rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: the text (and its pair) with the number of its class, its classes, or its value."""
    limit = recipe.data.max_length
    encoded: list[Encoded] = []
    for row, read in zip(rows, read_texts(rows, processor), strict=True):
        target = class_target(row["label"], recipe)
        size = len(read.input_ids)
        if isinstance(target, str):
            encoded.append(target)
        elif size > limit and recipe.data.on_overlong != "truncate":
            encoded.append(too_long(size, limit))
        elif not size:
            encoded.append("the text has no tokens")
        else:
            kept = read if size <= limit else read_texts([row], processor, limit)[0]
            encoded.append([replace(kept, target_ids=target[0], values=target[1], counted=1)])
    return encoded


def read_texts(rows: Sequence[Any], processor: PreTrainedTokenizerBase, max_length: int | None = None) -> list[Example]:
    """Return what a model reads of each row's text (and its pair), cut to `max_length` tokens; by the row alone."""
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    found: dict[int, Example] = {}
    for paired in (False, True):
        places = [i for i, row in enumerate(rows) if bool(row.get("pair")) == paired]
        if places:
            texts = [[rows[i]["text"] for i in places], *([[rows[i]["pair"] for i in places]] if paired else [])]
            tokenized = processor(*texts, return_attention_mask=False, **cut)
            kinds = tokenized.get("token_type_ids") or [()] * len(places)
            for i, ids, third in zip(places, tokenized["input_ids"], kinds, strict=True):
                found[i] = Example(ids, [], 0, third_ids=third if any(third) else ())
    return [found[i] for i in range(len(rows))]


def class_target(label: Any, recipe: Recipe) -> tuple[list[int], list[float]] | str:
    """Return the number of a class with its weight, or the values to predict; or why there is none."""
    section = recipe.classify
    assert section is not None, "the rows have settled the section"
    if section.kind == "regression":
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = math.nan
        return ([], [value]) if math.isfinite(value) else f"no number: the label is {label!r}"
    labels = section.labels or ()
    named = label if isinstance(label, list) else [str(label)]
    wrong = next((name for name in named if name not in labels), None)
    if wrong is not None:
        known = ", ".join(labels[:20])
        return f"{UNKNOWN}: {wrong!r} is none of {known}"
    if section.kind == "multi":
        return [], [float(name in named) for name in labels]
    if len(named) != 1:
        return f"{len(named)} labels where classify.kind: single wants one"
    weights = section.class_weights
    weight = [float(weights.get(named[0], 1.0))] if isinstance(weights, dict) else []
    return [labels.index(named[0])], weight


# Tags


def tag_names(labels: Sequence[str]) -> list[str]:
    """Return the tags of kinds of entities in IOB2, in the order of the model's outputs."""
    return [OUTSIDE, *(f"{place}-{label}" for label in labels for place in "BI")]


def encode_tags(rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: its words with their tags, each at the word's first token."""
    section = recipe.token_classify
    assert section is not None, "the rows have settled the section"
    numbers = {name: i for i, name in enumerate(tag_names(section.labels or ()))}
    encoded: list[Encoded] = []
    for row, (ids, places) in zip(rows, place_words(rows, processor), strict=True):
        wrong = next((tag for tag in row["tags"] if tag not in numbers), None)
        if wrong is not None:
            encoded.append(f"{UNKNOWN}: {wrong!r} is none of {', '.join(list(numbers)[:20])}")
        elif None in places:
            encoded.append(f"the tokenizer makes nothing of the word {row['tokens'][places.index(None)]!r}")
        elif len(set(places)) < len(places):
            encoded.append("the tokenizer puts two words into one token, which can have one tag only")
        elif len(ids) > recipe.data.max_length:
            encoded.append(too_long(len(ids), recipe.data.max_length))
        else:
            targets = [IGNORED] * len(ids)
            for place, tag in zip(places, row["tags"], strict=True):
                targets[place or 0] = numbers[tag]
            encoded.append([Example(ids, [], 0, target_ids=targets, counted=len(places))])
    return encoded


def place_words(rows: Sequence[Any], processor: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int | None]]]:
    """Return, a row, the ids of its words with spaces between them, and where each word's first token stands.

    Raises EnvironmentProblem for a tokenizer that cannot say where in the text its tokens come from.
    """
    need_places(processor)
    texts = [" ".join(row["tokens"]) for row in rows]
    tokenized = processor(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    found = []
    for i, row in enumerate(rows):
        starts = _word_starts(row["tokens"])
        places: list[int | None] = [None] * len(starts)
        word = 0
        for token, (left, right) in enumerate(tokenized["offset_mapping"][i]):
            if tokenized["special_tokens_mask"][i][token] or right <= left:
                continue
            while word < len(starts) and right > starts[word][0]:
                if left < starts[word][1]:
                    places[word] = token
                word += 1
        found.append((tokenized["input_ids"][i], places))
    return found


def _word_starts(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return where words stand that are joined by single spaces."""
    places, at = [], 0
    for word in words:
        places.append((at, at + len(word)))
        at += len(word) + 1
    return places


def need_places(processor: PreTrainedTokenizerBase) -> None:
    """Raise EnvironmentProblem for a tokenizer that cannot say where in the text its tokens come from."""
    if not processor.is_fast:
        what = f"{type(processor).__name__} does not say where in a text its tokens stand"
        raise EnvironmentProblem.of(what, str(processor.name_or_path), "Use a model with a tokenizer.json.")


# Answers in a context


@dataclass(frozen=True)
class Window:
    """A stretch of a context behind its question, as the model reads it."""

    ids: list[int]
    kinds: list[int]
    places: list[tuple[int, int] | None]
    """By token, its characters in the context without spaces around them; None for the question and special tokens."""
    null: int
    """The token that stands for `no answer`: the one of the whole sequence, which comes first."""
    opens: bool
    """Whether the context begins in it."""
    closes: bool
    """Whether the context ends in it."""


def cut_context(row: Any, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Window] | str:
    """Return the windows of a question's context, each with the whole question; or why there are none."""
    question, context = row["question"].strip(), row["context"]
    room = recipe.data.max_length
    alone = len(processor(question, "")["input_ids"])
    if alone + _stride(recipe) >= room:
        return (
            f"too long: the question takes {alone} of {room} tokens (data.max_length), and leaves no room for windows"
        )
    tokenized = processor(
        question,
        context,
        truncation="only_second",
        max_length=room,
        stride=_stride(recipe),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows: list[Window] = []
    count = len(tokenized["input_ids"])
    for i, ids in enumerate(tokenized["input_ids"]):
        sides = tokenized.sequence_ids(i)
        offsets = tokenized["offset_mapping"][i]
        places = [_trim(context, *place) if side == 1 else None for place, side in zip(offsets, sides, strict=True)]
        kinds = tokenized["token_type_ids"][i] if "token_type_ids" in tokenized else []
        null = ids.index(processor.cls_token_id) if processor.cls_token_id in ids else 0
        windows.append(Window(ids, kinds, places, null, opens=i == 0, closes=i == count - 1))
    return windows


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Leave spaces at either side of a range out: byte-level tokens and those of sentencepiece begin with one."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _stride(recipe: Recipe) -> int:
    return recipe.qa.stride if recipe.qa else 128


def encode_windows(rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return an example for each window of a row; one that does not hold the answer points at `no answer`."""
    need_places(processor)
    encoded: list[Encoded] = []
    for row in rows:
        windows = cut_context(row, processor, recipe)
        if isinstance(windows, str):
            encoded.append(windows)
            continue
        if len(windows) > 1 and recipe.data.on_overlong == "drop":
            encoded.append(too_long(sum(len(window.ids) for window in windows), recipe.data.max_length))
            continue
        if not row["answers"]:
            encoded.append([_window_example(window, None) for window in windows])
            continue
        answer = row["answers"][0]
        place = _trim(row["context"], answer["start"], answer["start"] + len(answer["text"]))
        ends = [_answer_tokens(window, *place) for window in windows]
        if not any(ends):
            encoded.append(_no_window(windows, *place))
            continue
        encoded.append([_window_example(window, found) for window, found in zip(windows, ends, strict=True)])
    return encoded


def _window_example(window: Window, ends: tuple[int, int] | None) -> Example:
    third = window.kinds if any(window.kinds) else []
    target = ends or (window.null, window.null)
    return Example(window.ids, [], 0, target_ids=list(target), third_ids=third, counted=1)


def _answer_tokens(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token of an answer, by its characters, that lies whole in a window.

    A letter of it that the tokenizer drops is missed at the edge of a window alone: there it may be in the next one.
    """
    seen = [(token, place) for token, place in enumerate(window.places) if place is not None and place[1] > place[0]]
    inside = [token for token, (left, right) in seen if left < end and right > start]
    if not inside:
        return None
    (first, (reach_left, _)), (last, (_, reach_right)) = seen[0], seen[-1]
    begins = window.opens or inside[0] != first or reach_left <= start
    ends = window.closes or inside[-1] != last or reach_right >= end
    return (inside[0], inside[-1]) if begins and ends else None


def _no_window(windows: Sequence[Window], start: int, end: int) -> str:
    """Say why an answer, by its characters, lies whole in no window."""
    places = [place for window in windows for place in window.places if place is not None and place[1] > place[0]]
    if any(left < end and right > start for left, right in places):
        return "the answer lies whole in no window: raise qa.stride or data.max_length"
    return "the tokenizer makes nothing of the answer"


# Text whose words will be hidden


def encode_masked(rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return examples of plain text, of which a share of the tokens is hidden when a batch is made.

    With `data.on_overlong: split` a long text becomes several; with `truncate` its first part.
    """
    if processor.mask_token_id is None:
        what = "the tokenizer has no mask token, so nothing can be hidden"
        raise EnvironmentProblem.of(what, str(processor.name_or_path), "Name an encoder, or use objective: causal.")
    share = recipe.completion.mask_probability if recipe.completion else 0.15
    how, room = recipe.data.on_overlong, recipe.data.max_length
    encoded: list[Encoded] = []
    for row in rows:
        text = row["prompt"] + row["completion"]
        found = processor(text, return_special_tokens_mask=True, return_attention_mask=False)
        parts = [(found["input_ids"], found["special_tokens_mask"])]
        if len(parts[0][0]) > room:
            if how in ("error", "drop"):
                encoded.append(too_long(len(parts[0][0]), room))
                continue
            cut = processor(
                text,
                truncation=True,
                max_length=room,
                return_overflowing_tokens=True,
                return_special_tokens_mask=True,
            )
            parts = list(zip(cut["input_ids"], cut["special_tokens_mask"], strict=True))
            parts = parts[:1] if how == "truncate" else parts
        examples = [example for ids, special in parts if (example := _hidden(ids, special, share)) is not None]
        encoded.append(examples or "nothing to learn: the text has fewer than two tokens")
    return encoded


def _hidden(ids: list[int], special: list[int], share: float) -> Example | None:
    """Return a text's example; at least one of its tokens is hidden, and one is left to see."""
    borders = [i for i in range(len(ids) + 1) if _is_word(special, i) != _is_word(special, i - 1)]
    words = len(ids) - sum(special)
    if words < 2:
        return None
    return Example(ids, borders, 0, counted=min(max(1, round(share * words)), words - 1))


def _is_word(special: Sequence[int], at: int) -> bool:
    return 0 <= at < len(special) and not special[at]
