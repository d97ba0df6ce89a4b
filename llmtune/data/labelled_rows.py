"""Rows with labels: texts with classes or numbers, words with tags, questions with answers in a context."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

from llmtune.data.rejected_rows import RowError, describe, nonempty_text, text_of

OUTSIDE = "O"
TAG = re.compile(r"O|[BI]-\S.*")
JOINERS = "_\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


Label: TypeAlias = str | float | list[str]


class ClassifyRow(TypedDict):
    """A text, or two, with a label; a prompt has none."""

    text: str
    pair: str | None
    label: Label | None


class TokenClassifyRow(TypedDict):
    """Words with a tag each; a prompt has no tags."""

    tokens: list[str]
    tags: list[str]


class Answer(TypedDict):
    """A stretch of the context."""

    text: str
    start: int | None
    """Its first character in the context; None for an answer that was written."""


class QaRow(TypedDict):
    """A question on a context."""

    question: str
    context: str
    answers: list[Answer] | None
    """All that are right; empty where the context holds none; None where they were taken away."""


def classified(row: Mapping[str, object]) -> ClassifyRow:
    """Read `text` (and `pair`, a second text) with `label`: a text, a number, or a list of texts."""
    pair = row.get("pair")
    return {
        "text": nonempty_text(row, "text"),
        "pair": None if pair is None or pair == "" else text_of(pair, "'pair'"),
        "label": _label(row["label"]),
    }


def _label(value: object) -> Label:
    value = _parsed_list(value)
    if isinstance(value, list):
        names = [_label(item) for item in value if not isinstance(item, list)]
        if len(names) < len(value) or not all(isinstance(item, str) for item in names):
            raise RowError("wrong type", "'label' holds something else than names of classes")
        return sorted({str(item) for item in names})
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError("no number", f"'label' is {value}")
        return value
    if value is None or not isinstance(value, str) or not value.strip():
        what = "empty" if isinstance(value, str) else describe(value)
        raise RowError("no label", f"'label' is {what}")
    return value.strip()


def tagged_tokens(row: Mapping[str, object]) -> TokenClassifyRow:
    """Read `tokens` and `tags`, as many of one as of the other."""
    tokens, tags = _parsed_list(row["tokens"]), _parsed_list(row["tags"])
    if not isinstance(tokens, list) or not isinstance(tags, list):
        raise RowError("wrong type", "'tokens' and 'tags' must be lists of texts")
    if len(tokens) != len(tags):
        raise RowError("tags do not fit", f"{len(tokens)} tokens and {len(tags)} tags")
    if not tokens:
        raise RowError("empty content", "there are no tokens")
    words = [text_of(token, "'tokens'") for token in tokens]
    if blank := next((i for i, word in enumerate(words, 1) if not word.strip()), None):
        raise RowError("empty content", f"token {blank} is empty")
    return {"tokens": words, "tags": _checked_tags(tags)}


def _checked_tags(tags: Sequence[object]) -> list[str]:
    """Return tags in IOB2: an entity begins with `B-`; `I-` without its beginning is one (IOB1) and becomes `B-`."""
    fixed: list[str] = []
    for number, tag in enumerate(tags, 1):
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            fix = "tags are O, B-NAME and I-NAME; numbers need their names (a hub data set with ClassLabel has them)"
            raise RowError("not a tag", f"tag {number} is {tag!r}; {fix}")
        before = fixed[-1] if fixed else OUTSIDE
        fixed.append(f"B-{tag[2:]}" if tag.startswith("I-") and before[2:] != tag[2:] else tag)
    return fixed


def tagged_spans(row: Mapping[str, object]) -> TokenClassifyRow:
    """Read `text` and `spans`, each `{start, end, label}` in characters; words are those of `find_words`."""
    text, spans = nonempty_text(row, "text"), _parsed_list(row["spans"])
    if not isinstance(spans, list):
        raise RowError("wrong type", "'spans' must be a list of {start, end, label}")
    words = find_words(text)
    tags = [OUTSIDE] * len(words)
    for span in spans:
        start, end, label = _span(span, text)
        inside = [i for i, (left, right) in enumerate(words) if left >= start and right <= end]
        cut = any(left < end and right > start and i not in inside for i, (left, right) in enumerate(words))
        if not inside or cut:
            raise RowError("span within a word", f"{text[start:end]!r} does not begin and end where words do")
        if any(tags[i] != OUTSIDE for i in inside):
            raise RowError("spans overlap", f"{text[start:end]!r} is marked twice")
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{label}"
    return {"tokens": [text[left:right] for left, right in words], "tags": tags}


def find_words(text: str) -> list[tuple[int, int]]:
    """Return where the words of a text stand: letters and digits with their accents in a row, or one other sign."""
    words: list[tuple[int, int]] = []
    for at, sign in enumerate(text):
        if sign.isspace():
            continue
        joined = bool(words) and words[-1][1] == at and _in_word(sign) and _in_word(text[at - 1])
        words.append((words.pop()[0], at + 1) if joined else (at, at + 1))
    return words


def _in_word(sign: str) -> bool:
    """Whether a character goes on with a word; vowel signs and accents of their own (category M) are letters here."""
    return sign in JOINERS or unicodedata.category(sign)[0] in "LNM"


def _span(span: object, text: str) -> tuple[int, int, str]:
    if not isinstance(span, dict) or not {"start", "end", "label"} <= span.keys():
        raise RowError("wrong type", "a span must be {start, end, label}")
    start, end = span["start"], span["end"]
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
        raise RowError("span outside the text", f"characters {start} to {end} of {len(text)}")
    return start, end, nonempty_text(span, "label")


def question_squad(row: Mapping[str, object]) -> QaRow:
    """Read `question`, `context` and `answers` as SQuAD has them: texts and where they start; none is no answer."""
    answers = row["answers"]
    if isinstance(answers, str):
        answers = _parsed(answers)
    if isinstance(answers, list):
        pairs = [(_part(answer, "text"), _part(answer, "answer_start", "start")) for answer in answers]
    elif isinstance(answers, dict) and isinstance(answers.get("text"), list):
        starts = answers.get("answer_start") or [None] * len(answers["text"])
        if len(starts) != len(answers["text"]):
            raise RowError("wrong type", f"{len(answers['text'])} answers and {len(starts)} starts")
        pairs = list(zip(answers["text"], starts, strict=True))
    else:
        raise RowError("wrong type", "'answers' must be {text: [...], answer_start: [...]}")
    return _question(row, pairs)


def question_answer(row: Mapping[str, object]) -> QaRow:
    """Read `question`, `context` and `answer`, a text that stands in the context; empty or null is no answer."""
    answer = row["answer"]
    return _question(row, [] if answer is None or answer == "" else [(answer, None)])


def _part(answer: object, *names: str) -> object:
    if not isinstance(answer, dict):
        raise RowError("wrong type", f"an answer is {describe(answer)}; it must be {{text, answer_start}}")
    return next((answer[name] for name in names if name in answer), None)


def _question(row: Mapping[str, object], pairs: Sequence[tuple[object, object]]) -> QaRow:
    context = nonempty_text(row, "context")
    answers: list[Answer] = []
    for value, start in pairs:
        text = text_of(value, "an answer")
        if not text.strip():
            raise RowError("no answer", "an answer is an empty text; a question without one has an empty list")
        offset = context.find(text) if start is None else start
        if not isinstance(offset, int) or isinstance(offset, bool):
            raise RowError("wrong type", f"'answer_start' is {describe(offset)}")
        if offset < 0 or context[offset : offset + len(text)] != text:
            there = "" if start is None else f" at character {start}"
            raise RowError("answer not in the context", f"{text[:60]!r} does not stand in it{there}")
        answers.append({"text": text, "start": offset})
    return {"question": nonempty_text(row, "question"), "context": context, "answers": answers}


def _parsed_list(value: object) -> object:
    """Read a list that stands in a cell as JSON, as in CSV."""
    return _parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
