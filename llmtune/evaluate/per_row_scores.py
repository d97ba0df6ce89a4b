"""Every row's contribution to every score on disk (`measures.npz`), for later row-by-row comparison of runs.

Shapes: N rows of a metric, K sums per row, P evaluated rows.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from llmtune.data.row_store import iterate_ids
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.calibration import ece_formula
from llmtune.evaluate.classification_metrics import (
    BINARY,
    ENTITY_FORMULAS,
    RANKINGS,
    f1_macro_formula,
    f1_weighted_formula,
    matthews_formula,
)
from llmtune.evaluate.intervals import Formula
from llmtune.evaluate.metric import (
    BOUNDS,
    Measure,
    PairedMeasures,
    difference_of_ratios,
    ratio,
    ratio_of_counted,
    rows_by_squares,
)
from llmtune.evaluate.text_metrics import bleu_formula, chrf_formula, error_rate, exponential_ratio, ter_formula
from llmtune.records import Rows
from llmtune.store.atomic_files import explained

MEASURES = "measures.npz"
VERSION = 1
UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Errors that numpy, zipfile and json raise for damaged files."""
FORMULAS: dict[str, Formula] = {
    "ratio": ratio,
    "exponential_ratio": exponential_ratio,
    "bleu": bleu_formula,
    "chrf": chrf_formula,
    "ter": ter_formula,
    "f1_macro": f1_macro_formula,
    "f1_weighted": f1_weighted_formula,
    "matthews": matthews_formula,
    **{f"entity_{name}": formula for name, formula in ENTITY_FORMULAS.items()},
    "error_rate": error_rate,
    "apart": difference_of_ratios,
    "ece": ece_formula,
    "rows_by_squares": rows_by_squares,
    "ratio_of_counted": ratio_of_counted,
}
"""Formulas by their names on disk."""


class Description(TypedDict):
    """How to compute a metric from its sums, as stored on disk."""

    formula: str
    right_wrong: bool
    signature: str
    ends: NotRequired[str | None]
    """Name of the function for the range's end rows; absent in earlier versions."""


@dataclass(frozen=True)
class PerRowScores(PairedMeasures):
    """Measures of one run; `at` of a measure are indexes into `rows`."""

    rows: tuple[str, ...] = ()
    """[P] names of the test rows: a content hash and a number among equal rows, independent of position."""
    clusters: tuple[int, ...] = ()
    """[P] equal for rows that belong together; empty if no rows do."""
    simple: Mapping[str, Mapping[str, Measure]] = field(default_factory=dict)
    """The measures of each simple baseline."""

    def with_rows(self, others: PerRowScores) -> PerRowScores:
        """Return the tuned model's scores on the rows of both; a metric missing from `others` keeps its own rows.

        Clusters are dropped: their numbers differ between runs, and a comparison uses those of the other run.
        """
        tuned = dict(self.tuned)
        for metric, more in others.tuned.items():
            measure = tuned.get(metric)
            if measure is not None and _kind_of(measure) == _kind_of(more):
                at = (*measure.at, *(len(self.rows) + row for row in more.at))
                sums_NK, names = np.concatenate([measure.sums_NK, more.sums_NK]), (*measure.names, *more.names)
                tuned[metric] = replace(measure, sums_NK=sums_NK, at=at, clusters=(), names=names)
        return PerRowScores({}, tuned, (*self.rows, *others.rows))

    def without_metrics(self, metrics: Collection[str]) -> PerRowScores:
        """Return the scores without some metrics of the tuned model."""
        return replace(self, tuned={name: one for name, one in self.tuned.items() if name not in metrics})

    def without_rows(self, ids: Collection[str]) -> PerRowScores:
        """Return the tuned model's scores without the rows with these ids; metrics without other rows are dropped."""
        if not ids:
            return self
        kept = [at for at, name in enumerate(self.rows) if name.rpartition("-")[0] not in ids]
        place = {at: number for number, at in enumerate(kept)}
        parts = {metric: one.subset(place) for metric, one in self.tuned.items()}
        tuned = {name: replace(one, at=tuple(place[at] for at in one.at)) for name, one in parts.items() if one.at}
        clusters = tuple(self.clusters[at] for at in kept) if self.clusters else ()
        return PerRowScores({}, tuned, tuple(self.rows[at] for at in kept), clusters)


def _kind_of(measure: Measure) -> tuple[str, int, bool]:
    """Return what two measures of the same metric must have in common to be joined."""
    return measure.signature, measure.sums_NK.shape[1], bool(measure.names)


def name_rows(ids: Sequence[str]) -> tuple[str, ...]:
    """Give rows unique names by numbering equal ones."""
    seen = Counter[str]()
    named = []
    for row in ids:
        seen[row] += 1
        named.append(f"{row}-{seen[row]}")
    return tuple(named)


def name_test_rows(rows: Rows, numbers: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the test rows with these numbers."""
    ids = list(iterate_ids(rows, "test"))
    return name_rows([ids[number] for number in numbers])


def save_measures(folder: Path, scores: PerRowScores) -> None:
    """Write `measures.npz`."""
    with explained(folder):
        (folder / MEASURES).write_bytes(pack_measures(scores))


def pack_measures(scores: PerRowScores) -> bytes:
    """Return the contents of `measures.npz`."""
    arrays: dict[str, NDArray[np.generic]] = {"rows": np.asarray(scores.rows, dtype=np.str_)}
    if scores.clusters:
        arrays["clusters"] = np.asarray(scores.clusters, dtype=np.int64)
    models = {"base": scores.base, "tuned": scores.tuned, **scores.simple}
    described: dict[str, dict[str, Description]] = {name: {} for name in models}
    for name, one_model in models.items():
        for metric, measure in one_model.items():
            described[name][metric] = describe_measure(measure)
            arrays[f"{name}/{metric}/sums"] = measure.sums_NK
            arrays[f"{name}/{metric}/at"] = np.asarray(measure.at, dtype=np.int64)
            if measure.names:
                arrays[f"{name}/{metric}/names"] = np.asarray(measure.names, dtype=np.str_)
    arrays["record"] = np.asarray(json.dumps({"version": VERSION, **described}))
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    return packed.getvalue()


def describe_measure(measure: Measure) -> Description:
    """Describe how to compute a metric from its sums: by formula name, or by ranking name for rank metrics."""
    formula = next((name for name, candidate in FORMULAS.items() if candidate is measure.formula), measure.metric)
    bounds = next((name for name, candidate in BOUNDS.items() if candidate is measure.bounds), None)
    return {"formula": formula, "right_wrong": measure.right_wrong, "signature": measure.signature, "ends": bounds}


def load_measures(folder: Path) -> PerRowScores:
    """Read `measures.npz`.

    Raises:
        EnvironmentProblem: the file is missing, damaged, or from a later version.
    """
    path = folder / MEASURES
    fix = "Rescore the run: llmtune evaluate RUN"
    try:
        return unpack_measures(path.read_bytes(), path, fix)
    except FileNotFoundError:
        raise EnvironmentProblem.of("the run has no row scores", str(path), fix) from None
    except OSError as error:
        raise EnvironmentProblem.of(f"damaged: {error}", str(path), fix) from None


def unpack_measures(packed: bytes, path: Path, fix: str) -> PerRowScores:
    """Read the output of `pack_measures`; raises EnvironmentProblem about `path` as `load_measures` does."""
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            record = json.loads(str(arrays["record"]))
            if record["version"] != VERSION:
                raise EnvironmentProblem.of(f"written by another version of llmtune ({record['version']})", str(path))
            clusters = tuple(arrays["clusters"].tolist()) if "clusters" in arrays else ()
            models = {
                name: {
                    metric: restore_measure(metric, arrays, name, one).in_clusters(clusters)
                    for metric, one in described.items()
                }
                for name, described in record.items()
                if name != "version"
            }
            base, tuned = models.pop("base"), models.pop("tuned")
            return PerRowScores(base, tuned, tuple(arrays["rows"].tolist()), clusters, models)
    except UNREADABLE as error:
        raise EnvironmentProblem.of(f"damaged: {error}", str(path), fix) from None


def restore_measure(metric: str, arrays: Mapping[str, NDArray[Any]], model: str, described: Description) -> Measure:
    """Rebuild a metric of a model from its sums and the name of its formula."""
    sums_NK, at = arrays[f"{model}/{metric}/sums"], tuple(arrays[f"{model}/{metric}/at"].tolist())
    names = tuple(arrays[key].tolist()) if (key := f"{model}/{metric}/names") in arrays else ()
    name, right_wrong, signature = described["formula"], described["right_wrong"], described["signature"]
    ranking = RANKINGS.get(BINARY if signature == BINARY else name)
    formula = FORMULAS[name] if ranking is None else None
    bounds = BOUNDS.get(described.get("ends") or "")
    return Measure(metric, sums_NK, formula, right_wrong, signature, ranking, at, bounds, names=names)
