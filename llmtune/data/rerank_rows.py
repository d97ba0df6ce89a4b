"""Rows of the task rerank: a query with passages, each with its relevance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from llmtune.data.rejected_rows import RowError, json_kind, nonempty_text, parse_cell
from llmtune.data.task_rows import THUMBS


class RerankRow(TypedDict):
    """A query with some of its passages; other rows may have more passages of the same query."""

    query: str
    passages: list[str]
    relevances: list[float]
    """Relevance of each passage: 0 is irrelevant, more is better; empty in a prompt."""


def ranked_pair(row: Mapping[str, object]) -> RerankRow:
    """Read `query`, `passage` and `relevance`: a number from 0, or true or false."""
    return _ranked(row, [row["passage"]], [row["relevance"]])


def ranked_list(row: Mapping[str, object]) -> RerankRow:
    """Read `query`, `passages` and as many `relevances`."""
    passages, relevances = (_list_of(row, name) for name in ("passages", "relevances"))
    if len(passages) != len(relevances):
        raise RowError("relevances do not fit", f"{len(passages)} passages and {len(relevances)} relevances")
    return _ranked(row, passages, relevances)


def ranked_negatives(row: Mapping[str, object]) -> RerankRow:
    """Read `query`, its relevant `passage` (or a list of them), and `negatives`, which are irrelevant."""
    right, wrong = _list_of(row, "passage"), _list_of(row, "negatives")
    return _ranked(row, [*right, *wrong], [1] * len(right) + [0] * len(wrong))


def _list_of(row: Mapping[str, object], column: str) -> Sequence[object]:
    value = parse_cell(row[column])
    return value if isinstance(value, list) else [] if value is None else [value]


def _ranked(row: Mapping[str, object], passages: Sequence[object], relevances: Sequence[object]) -> RerankRow:
    if not passages:
        raise RowError("empty content", "no passages")
    texts = [passage_text(passage) for passage in passages]
    return {"query": nonempty_text(row, "query"), "passages": texts, "relevances": [*map(_relevance, relevances)]}


def passage_text(value: object) -> str:
    """Return a passage: a text, or an object with `text` and an optional `title`, as in BEIR and Tevatron."""
    if isinstance(value, Mapping) and "text" in value:
        title = str(value.get("title") or "").strip()
        return f"{title}\n{nonempty_text(value, 'text')}" if title else nonempty_text(value, "text")
    return nonempty_text({"passage": value}, "passage")


def _relevance(value: object) -> float:
    thumb = THUMBS.get(value.strip().lower()) if isinstance(value, str) else None
    try:
        number = float(value if thumb is None else thumb)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        what = f"'relevance' is {value!r}" if isinstance(value, str) else f"'relevance' is {json_kind(value)}"
        raise RowError("no relevance", f"{what}; it must be a number from 0, or true or false") from None
    if not math.isfinite(number) or number < 0:
        raise RowError("no relevance", f"'relevance' is {value}; 0 is irrelevant, and more is better")
    return number


def given_passages(text: str | None) -> list[str]:
    """Return passages from one text: a JSON list, or one text per line."""
    parsed = parse_cell(text)
    if isinstance(parsed, list):
        return [passage if isinstance(passage, str) else json.dumps(passage) for passage in parsed]
    return [line for line in str(text or "").splitlines() if line.strip()]
