"""Rows of the tasks embed and rerank: queries with passages, and the files' formats that are read into them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

from llmtune.data.rejected_rows import RowError, json_kind, nonempty_text, parse_cell, passage_text, text_of
from llmtune.data.row_text import NearText, QuestionAnswer, RowInput, join_plain, plain_form, text_key
from llmtune.data.task_rows import THUMBS
from llmtune.data.written_numbers import read_number
from llmtune.recipe.class_names import tidy_name
from llmtune.records import Row
from llmtune.store.resource_limits import LARGEST_NUMBER

SHOWN_CHARACTERS = 80


def different_texts(texts: Iterable[str]) -> list[str]:
    """Return the first of the texts with the same `text_key`, in order."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(text_key(text), text)
    return [*first.values()]


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


def named_texts(row: EmbedRow) -> list[tuple[str, str]]:
    """Return all texts of a row, each with its name: query, passage, passage_2, negative, negative_2 and so on."""
    query = [] if row["query"] is None else [row["query"]]
    parts = (("query", query), ("passage", row["passages"]), ("negative", row["negatives"]))
    return [(name if i == 0 else f"{name}_{i + 1}", text) for name, texts in parts for i, text in enumerate(texts)]


def embed_from_pair(row: Mapping[str, object]) -> EmbedRow:
    """Read `query` and `passage` (a text or a list), with `negatives` (a text or a list) or a `score`."""
    graded = next((name for name in ("relevance", "label", "relevances", "labels") if row.get(name) is not None), None)
    if graded is not None:
        other = " learns them" if graded.endswith("s") else " learns it, or rename it to score"
        raise RowError("graded passage", f"the row has '{graded}'; task: rerank{other}")
    query, passages, negatives = (
        nonempty_text(row, "query"),
        _column_texts(row, "passage"),
        _column_texts(row, "negatives"),
    )
    if not passages:
        raise RowError("no passage", "'passage' is empty")
    if shared := {*map(text_key, passages)} & {*map(text_key, negatives)}:
        raise RowError("a passage is a negative", f"{min(shared)[:60]!r} is in both")
    score = _score(row.get("score"))
    if score is not None and (len(passages) > 1 or negatives):
        raise RowError("too many texts", "a row with a score has two texts")
    return {"query": query, "passages": passages, "negatives": negatives, "score": score, "label": None}


def embed_from_label(row: Mapping[str, object]) -> EmbedRow:
    """Read `text` and `label`, a class."""
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or not tidy_name(str(label)):
        raise RowError("no class", f"'label' is {json_kind(label)}; it must be a class name or number")
    text, label = nonempty_text(row, "text"), tidy_name(str(label))
    return {"query": text, "passages": [], "negatives": [], "score": None, "label": label}


def _column_texts(row: Mapping[str, object], column: str) -> list[str]:
    value = parse_cell(row.get(column))
    values = value if isinstance(value, list) else [] if value is None or value == "" else [row[column]]
    texts = [text_of(text, f"'{column}'") for text in values]
    if not all(text.strip() for text in texts):
        raise RowError("empty content", f"'{column}' has an empty text")
    return different_texts(texts)


def _score(value: object) -> float | None:
    if value is None or value == "":
        return None
    if (score := _finite(value)) is None:
        raise RowError("no number", f"'score' is {shortened(value)}")
    return score


def _finite(value: object) -> float | None:
    """Return the number in a cell, perhaps with a decimal comma; None if it is none."""
    if isinstance(value, str) and "," in value:
        value = read_number(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST_NUMBER else None


def shortened(value: object) -> str:
    """Return the beginning of a value as text; Python refuses to write numbers of thousands of digits."""
    try:
        return f"{value!r:.40}"
    except ValueError:
        return "a number of thousands of digits"


TEXT_KEYS = ("text", "passage_text", "passage", "content")
RELEVANCE_KEYS = ("relevance", "label", "score", "is_selected")
"""Keys of a passage that is an object with its relevance."""


class RerankRow(TypedDict):
    """A query with some of its passages; other rows may have more passages of the same query."""

    query: str
    passages: list[str]
    relevances: list[float]
    """Relevance of each passage: 0 is irrelevant, more is better; empty in a prompt."""


def ranked_pair(row: Mapping[str, object]) -> RerankRow:
    """Read `query`, `passage` and `relevance`: a number from 0, or true or false."""
    return _ranked(row, [passage_text(row["passage"])], [row["relevance"]])


def ranked_list(row: Mapping[str, object]) -> RerankRow:
    """Read `query`, `passages` and as many `relevances`."""
    passages, relevances = _passages_of(row, "passages"), _list_of(row, "relevances")
    if len(passages) != len(relevances):
        raise RowError("relevances do not fit", f"{len(passages)} passages and {len(relevances)} relevances")
    return _ranked(row, passages, relevances)


def ranked_objects(row: Mapping[str, object]) -> RerankRow:
    """Read `query` and `judged_passages`, which have a text and a relevance each.

    They are a list of objects, or an object of lists, as MS MARCO has them: `{"passage_text": [...], "is_selected":
    [...]}`.
    """
    column = "judged_passages"
    value = parse_cell(row[column])
    if isinstance(value, Mapping):
        keys = ("title", *TEXT_KEYS, *RELEVANCE_KEYS)
        lists = {name: part for name in keys if isinstance(part := value.get(name), list)}
        if len(counts := {len(part) for part in lists.values()}) > 1:
            raise RowError(
                "relevances do not fit", f"the lists of the passages have {min(counts)} to {max(counts)} values"
            )
        value = [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]
    passages, relevances = [], []
    for one in value if isinstance(value, list) else []:
        passage = one if isinstance(one, Mapping) else {}
        text = next((name for name in TEXT_KEYS if name in passage), None)
        relevance = next((name for name in RELEVANCE_KEYS if name in passage), None)
        if text is None or relevance is None:
            fix = (
                f"a passage must be an object with one of {', '.join(TEXT_KEYS)} and one of {', '.join(RELEVANCE_KEYS)}"
            )
            raise RowError("no relevance", f"{fix}; or give the relevances in a column")
        passages.append(passage_text({**passage, "text": passage[text]}))
        relevances.append(passage[relevance])
    return _ranked(row, passages, relevances)


def ranked_positive(row: Mapping[str, object]) -> RerankRow:
    """Read `query` and its relevant `passage` (or a list of them), whose negatives are mined (`data.negatives`)."""
    graded = next((name for name in ("relevance", "label", "score") if row.get(name) is not None), None)
    if graded is not None:
        raise RowError("graded passage", f"only some rows have a '{graded}'; give it to all rows of the file")
    listed = next((name for name in ("relevances", "labels", "scores") if row.get(name) is not None), None)
    if listed is not None:
        raise RowError("graded passages", f"the row has '{listed}'; map its list of passages: columns.passages")
    right = _passages_of(row, "passage")
    return _ranked(row, right, [1] * len(right))


def ranked_negatives(row: Mapping[str, object]) -> RerankRow:
    """Read `query`, its relevant `passage` (or a list of them), and `negatives`, which are irrelevant."""
    right, wrong = _passages_of(row, "passage"), _passages_of(row, "negatives")
    return _ranked(row, [*right, *wrong], [1] * len(right) + [0] * len(wrong))


def _list_of(row: Mapping[str, object], column: str) -> list[object]:
    value = parse_cell(row[column])
    return value if isinstance(value, list) else [] if value is None else [value]


def _passages_of(row: Mapping[str, object], column: str) -> list[str]:
    return [passage_text(passage, column) for passage in _list_of(row, column)]


def _ranked(row: Mapping[str, object], passages: Sequence[str], relevances: Sequence[object]) -> RerankRow:
    if not passages:
        raise RowError("empty content", "no passages")
    passages_by_text: dict[str, tuple[str, float]] = {}
    for passage, relevance in zip(passages, map(_relevance, relevances), strict=True):
        if (first := passages_by_text.setdefault(text_key(passage), (passage, relevance))[1]) != relevance:
            what = f"{passage[:60]!r} has the relevances {first:g} and {relevance:g}"
            raise RowError("a passage with two relevances", what)
    texts, numbers = zip(*passages_by_text.values(), strict=True)
    return {"query": nonempty_text(row, "query"), "passages": [*texts], "relevances": [*numbers]}


def _relevance(value: object) -> float:
    thumb = THUMBS.get(value.strip().lower()) if isinstance(value, str) else None
    try:
        written = isinstance(value, str) and "," in value
        number = float(read_number(value) if written else value if thumb is None else thumb)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        what = f"'relevance' is {value!r}" if isinstance(value, str) else f"'relevance' is {json_kind(value)}"
        raise RowError("no relevance", f"{what}; it must be a number from 0, or true or false") from None
    if not 0 <= number <= LARGEST_NUMBER:
        raise RowError("no relevance", f"'relevance' is {shortened(value)}; 0 is irrelevant, and more is better")
    return number


def write_ranking(passages: Sequence[str], scores: Sequence[float]) -> str:
    """Write a line per passage, best first: score and beginning."""
    lines = [" ".join(passage.split()) for passage in passages]
    short = [line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…" for line in lines]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    return "\n".join(f"{scores[i]:.3f}  {short[i]}" for i in best)


def given_passages(text: str | None) -> list[str]:
    """Return passages from one text: a JSON list, or one text per line."""
    parsed = parse_cell(text)
    if isinstance(parsed, list):
        return [*map(_given_passage, parsed)]
    return [line for line in str(text or "").splitlines() if line.strip()]


def _given_passage(value: object) -> str:
    """Return a passage as `passage_text` does; other values are written as JSON."""
    passage = value if isinstance(value, Mapping) else {}
    text = next((text for name in TEXT_KEYS if isinstance(text := passage.get(name), str) and text.strip()), None)
    if text is not None:
        return passage_text({**passage, "text": text})
    return value if isinstance(value, str) else json.dumps(value)


def near_ranking(row: Row) -> NearText:
    """Return the passages; query and relevances must be equal."""
    return NearText(" ".join(row["passages"]), plain_form(row["query"]), str(row["relevances"]))


def ranking_questions(row: Row) -> Iterator[QuestionAnswer]:
    """Yield a question per passage, which belongs to it."""
    for passage, relevance in zip(row["passages"], row["relevances"], strict=True):
        yield {"query": [row["query"], passage]}, {"relevances": [relevance]}


def near_retrieval(row: Row) -> NearText:
    """Return the passages for an equal query, two texts with an equal score, or a text of an equal class."""
    if row["score"] is not None:
        return NearText(" ".join([row["query"], *row["passages"]]), "", str(row["score"]))
    if row["passages"]:
        return NearText(" ".join(row["passages"]), plain_form(row["query"]))
    return NearText(row["query"], "", str(row["label"]))


def query_input(row: Row) -> RowInput:
    """Return the query, which the passages answer."""
    return RowInput(row["query"], str, lambda: join_plain(row["passages"]))


def retrieval_input(row: Row) -> RowInput:
    """Return the query, or texts with a score or class."""
    if row["passages"] and row["score"] is None:
        return query_input(row)
    return RowInput(near_retrieval(row).text, str, lambda: near_retrieval(row).answer, True)
