"""Rows of task embed in one form: a query, its passages, negatives, and a score or label."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

from llmtune.data.rejected_rows import RowError, json_kind, nonempty_text, parse_cell, text_of


class EmbedRow(TypedDict):
    """A text with others to find. A row with a score has one passage, a row with a label has none."""

    query: str | None
    """None only in a prompt that asks for the vector of a passage."""
    passages: list[str]
    """Relevant passages; with a score, the other text."""
    negatives: list[str]
    """Passages that are not relevant."""
    score: float | None
    label: str | None


def texts_of(row: EmbedRow) -> list[str]:
    """Return all texts of a row in order: the query, the passages, the negatives."""
    return [*([] if row["query"] is None else [row["query"]]), *row["passages"], *row["negatives"]]


def embed_from_pair(row: Mapping[str, object]) -> EmbedRow:
    """Read `query` and `passage` (a text or a list), with `negatives` (a text or a list) or a `score`."""
    graded = next((name for name in ("relevance", "label") if row.get(name) is not None), None)
    if graded is not None:
        raise RowError("graded passage", f"the row has a '{graded}'; task: rerank learns it, or rename it to score")
    query, passages, negatives = (
        nonempty_text(row, "query"),
        _column_texts(row, "passage"),
        _column_texts(row, "negatives"),
    )
    if not passages:
        raise RowError("no passage", "'passage' is empty")
    if shared := set(passages) & set(negatives):
        raise RowError("a passage is a negative", f"{min(shared)[:60]!r} is in both")
    score = _score(row.get("score"))
    if score is not None and (len(passages) > 1 or negatives):
        raise RowError("too many texts", "a row with a score has two texts")
    return {"query": query, "passages": passages, "negatives": negatives, "score": score, "label": None}


def embed_from_label(row: Mapping[str, object]) -> EmbedRow:
    """Read `text` and `label`, a class."""
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise RowError("no class", f"'label' is {json_kind(label)}; it must be a class name or number")
    text, label = nonempty_text(row, "text"), str(label).strip()
    return {"query": text, "passages": [], "negatives": [], "score": None, "label": label}


def _column_texts(row: Mapping[str, object], column: str) -> list[str]:
    value = parse_cell(row.get(column))
    values = value if isinstance(value, list) else [] if value is None or value == "" else [row[column]]
    texts = [text_of(text, f"'{column}'") for text in values]
    if not all(text.strip() for text in texts):
        raise RowError("empty content", f"'{column}' has an empty text")
    return list(dict.fromkeys(texts))


def _score(value: object) -> float | None:
    if value is None or value == "":
        return None
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise RowError("no number", f"'score' is {value!r}")
    return score
