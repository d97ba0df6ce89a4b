"""The rankings of embed: passages for each different query, or texts with the same label for each text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtune.data.row_text import text_key
from llmtune.data.search_rows import EmbedRow
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.ranking_metrics import (
    SEARCHED,
    Prepare,
    RankedQuery,
    measure_ranking,
    name_query,
    search,
)
from llmtune.store.atomic_files import hash_value


def measure_search(
    metric: str,
    rows: Sequence[EmbedRow],
    vectors: Sequence[Mapping[str, Any]],
    corpus: Iterable[tuple[str, Any]],
    prepare: Prepare,
) -> Measure:
    """Measure the order of passages, or of texts with labels; arguments as in `rank_passages`."""
    labelled = rows[0]["label"] is not None
    queries, searched = (
        rank_labels(rows, vectors, prepare) if labelled else rank_passages(rows, vectors, corpus, prepare)
    )
    measured = measure_ranking(metric, [query for _, query in queries], [row for row, _ in queries])
    return replace(measured, signature=f"{measured.signature}; {searched}")


def rank_passages(
    rows: Sequence[EmbedRow],
    vectors: Sequence[Mapping[str, Any]],
    corpus: Iterable[tuple[str, Any]],
    prepare: Prepare,
) -> tuple[list[tuple[int, RankedQuery]], str]:
    """Rank all passages of these rows and of the corpus for each different query.

    `vectors` has what `prepare` compares, by the names of each row's texts, and `corpus` each further passage with it.
    A passage that is the query itself is neither ranked nor relevant. Returns the query's first row with its ranking,
    and a description of the passages.
    """
    passages: dict[str, Any] = {}
    relevant: defaultdict[str, set[str]] = defaultdict(set)
    first: dict[str, int] = {}
    for text, vector in corpus:
        passages.setdefault(text_key(text), vector)
    for i, (row, row_vectors) in enumerate(zip(rows, vectors, strict=True)):
        for text, vector in zip([*row["passages"], *row["negatives"]], [*row_vectors.values()][1:], strict=True):
            passages.setdefault(text_key(text), vector)
        query = text_key(str(row["query"]))
        relevant[query] |= {*map(text_key, row["passages"])}
        first.setdefault(query, i)
    place = {text: i for i, text in enumerate(passages)}
    judgments = [
        (i, {place[text] for text in relevant[query] - {query}}, place.get(query)) for query, i in first.items()
    ]
    queries = [vectors[i]["query"] for i, _, _ in judgments]
    ranked = search(queries, prepare([*passages.values()]), judgments)
    named = [name_query(query, ((text, 1.0) for text in relevant[query])) for query in first]
    return name_rankings(ranked, named), describe_passages(passages)


def rank_labels(
    rows: Sequence[EmbedRow], vectors: Sequence[Mapping[str, Any]], prepare: Prepare
) -> tuple[list[tuple[int, RankedQuery]], str]:
    """Rank the other texts for each text; those with the same label are relevant. Returns as `rank_passages` does."""
    members: defaultdict[str | None, set[int]] = defaultdict(set)
    first: dict[tuple[str, str | None], int] = {}
    for i, row in enumerate(rows):
        first.setdefault((text_key(str(row["query"])), row["label"]), i)
    for place, (_, label) in enumerate(first):
        members[label].add(place)
    judgments = [(i, members[label] - {place}, place) for place, ((_, label), i) in enumerate(first.items())]
    texts = [vectors[i]["query"] for i in first.values()]
    queries = [query for query, _ in first]
    classes = {label: hash_value(sorted(queries[i] for i in places)) for label, places in members.items()}
    named = [name_query(query, [(classes[label], 1.0)]) for query, label in first]
    ranked = search(texts, prepare(texts), judgments)
    return name_rankings(ranked, named), describe_passages(text_key(str(row["query"])) for row in rows)


def name_rankings(ranked: Iterable[tuple[int, RankedQuery]], names: Sequence[str]) -> list[tuple[int, RankedQuery]]:
    """Return rankings with the names of their queries; the searched passages are in the metric's signature."""
    return [(row, replace(query, name=name)) for (row, query), name in zip(ranked, names, strict=True)]


def describe_passages(texts: Iterable[str]) -> str:
    """Describe the passages that were searched, with a hash: scores on other passages cannot be compared."""
    different = sorted(set(texts))
    return f"{SEARCHED}{len(different):,} passages ({hash_value(different)[:8]})"
