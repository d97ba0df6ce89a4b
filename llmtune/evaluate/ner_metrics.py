"""Metrics of tagged tokens: entities that are found whole and with the right type, as seqeval counts them.

Shapes: N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmtune.evaluate.metric import Measure, columns, ratio
from llmtune.evaluate.paired_statistics import Floats

Entity = tuple[str, int, int]
"""Type, first and last token."""
Tags = Sequence[Sequence[str]]
"""IOB2 tags of the tokens of N rows."""


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of one row, read as leniently as conlleval does: an I- without its B- starts one too."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [(kind, int(first), int(last)) for kind, first, last in get_entities(list(tags))]


def measure_entities(metric: str, predicted_tags: Tags, reference_tags: Tags) -> Measure:
    """Build a metric of `ENTITY_METRICS` from two tags for each token of N rows."""
    rows = list(zip(predicted_tags, reference_tags, strict=True))
    assert all(len(predicted) == len(reference) for predicted, reference in rows)
    if metric == "accuracy":
        right = [sum(tag == wanted for tag, wanted in zip(*row, strict=True)) for row in rows]
        sums_N2 = columns(np.array(right), np.array([len(reference) for _, reference in rows]))
        return Measure(metric, sums_N2, ratio, signature="share of tokens with the right tag")
    entities = [(set(entities_of(predicted)), set(entities_of(reference))) for predicted, reference in rows]
    counts = [(len(found & expected), len(found), len(expected)) for found, expected in entities]
    sums_N3 = np.array(counts, dtype=np.float64).reshape(-1, 3)
    signature = "entities of all types together, right where type, first and last token are; 0 where there are none"
    return Measure(metric, sums_N3, ENTITY_FORMULAS[metric], signature=signature)


def precision_formula(sums: Floats) -> Floats:
    """[..., (hits, predicted, right)] -> hits by predicted [...]."""
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1), dtype=np.float64)


def recall_formula(sums: Floats) -> Floats:
    """[..., (hits, predicted, right)] -> hits by right [...]."""
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 2], 1), dtype=np.float64)


def f1_formula(sums: Floats) -> Floats:
    """[..., (hits, predicted, right)] -> harmonic mean of precision and recall [...]."""
    return np.asarray(2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1), dtype=np.float64)


ENTITY_FORMULAS = {"precision": precision_formula, "recall": recall_formula, "f1": f1_formula}
ENTITY_METRICS = (*ENTITY_FORMULAS, "accuracy")


def entity_table(predicted_tags: Tags, reference_tags: Tags) -> list[dict[str, Any]]:
    """Return `label`, `precision`, `recall`, `f1` and `support` (entities) of each type that occurs, by name."""
    hits, found, expected = Counter[str](), Counter[str](), Counter[str]()
    for predicted, reference in zip(predicted_tags, reference_tags, strict=True):
        predicted_set, reference_set = set(entities_of(predicted)), set(entities_of(reference))
        hits.update(kind for kind, _, _ in predicted_set & reference_set)
        found.update(kind for kind, _, _ in predicted_set)
        expected.update(kind for kind, _, _ in reference_set)
    table = []
    for kind in sorted(found | expected):
        sums = np.array([hits[kind], found[kind], expected[kind]], dtype=np.float64)
        scores = {metric: float(formula(sums)) for metric, formula in ENTITY_FORMULAS.items()}
        table.append({"label": kind, **scores, "support": expected[kind]})
    return table
