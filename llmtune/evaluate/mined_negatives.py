"""The queries and passages that are searched for negatives, and what was found for each query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmtune.recipe.data_section import NegativesSection
from llmtune.records import Json


@dataclass(frozen=True)
class Pairs:
    """The different queries (Q) of a split to mine for, and all passages that are searched for them."""

    queries: list[str]
    origins: list[str]
    """[Q] where each query's first row is from."""
    passages: list[str]
    right: list[list[int]]
    """[Q] right passages."""
    wrong: list[list[int]]
    """[Q] passages that the rows name as irrelevant."""
    itself: list[int | None]
    """[Q] the passage equal to the query, if any."""


@dataclass(frozen=True)
class Mined:
    """The negatives of each query, the nearest first, and what was skipped."""

    negatives: list[list[int]]
    skipped: int
    """Passages that were too near."""
    nearest: tuple[int, int, int, float, float] | None
    """The query with the nearest skipped passage, that passage, its own passage, and the scores of both."""


def mining_facts(mined: Mapping[str, tuple[Pairs, Mined]], section: NegativesSection) -> Json:
    """Return how much was searched and found over all splits, and the nearest skipped passage of a training query."""
    counts = [len(nearest) for _, result in mined.values() for nearest in result.negatives]
    pairs, result = mined["train"]
    facts: Json = {
        "searched": {split: len(pairs.passages) for split, (pairs, _) in mined.items()},
        "queries": len(counts),
        "negatives": sum(counts),
        "skipped": sum(result.skipped for _, result in mined.values()),
        "short": sum(one < section.mine for one in counts),
        "without": counts.count(0),
        "example": None,
    }
    if result.nearest is not None:
        query, passage, right, score, right_score = result.nearest
        facts["example"] = {
            "query": pairs.queries[query],
            "passage": pairs.passages[right],
            "negative": pairs.passages[passage],
            "origin": pairs.origins[query],
            "passage_score": right_score,
            "negative_score": score,
        }
    return facts
