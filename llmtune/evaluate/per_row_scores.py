"""Every row's part in every score on disk, `measures.npz`, so that runs can be compared row by row later on.

Shapes: N rows of a metric, K sums a row, P rows of the plan.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.auroc_and_correlation import BINARY, measure_auroc, measure_correlation
from llmtune.evaluate.classification_metrics import f1_macro_formula, f1_weighted_formula, matthews_formula
from llmtune.evaluate.metric import Measure, ratio
from llmtune.evaluate.metrics import exponential_ratio
from llmtune.evaluate.ner_metrics import ENTITY_FORMULAS
from llmtune.evaluate.paired_statistics import Floats, Formula
from llmtune.evaluate.preference_metrics import apart_formula
from llmtune.evaluate.text_metrics import bleu_formula, chrf_formula, ter_formula
from llmtune.evaluate.wer import error_rate
from llmtune.store.atomic_files import explained

MEASURES = "measures.npz"
VERSION = 1
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
    "apart": apart_formula,
}
"""Formulas by the names that they have on disk."""


def rebuild_auroc(seen_NK: Floats, signature: str) -> Measure:
    """Build AUROC again from scores and classes side by side."""
    half = seen_NK.shape[1] // 2
    return measure_auroc(seen_NK[:, :half], seen_NK[:, half:] > 0, binary=signature == BINARY)


RANKS: dict[str, Callable[[Floats, str], Measure]] = {
    "auroc": rebuild_auroc,
    "pearson": lambda seen_N2, signature: measure_correlation("pearson", seen_N2[:, 0], seen_N2[:, 1]),
    "spearman": lambda seen_N2, signature: measure_correlation("spearman", seen_N2[:, 0], seen_N2[:, 1]),
}
"""Metrics that no sums are enough for: made again from the numbers of each row."""


@dataclass(frozen=True)
class Measures:
    """What was measured of one run."""

    rows: tuple[str, ...]
    """[P] what each test row is known by, wherever it stands: a hash of its content, and which of its equals it is."""
    base: dict[str, Measure]
    """By metric; `at` are indexes into `rows`."""
    tuned: dict[str, Measure]


def name_rows(ids: Sequence[str]) -> tuple[str, ...]:
    """Tell equal rows apart by counting them."""
    seen: dict[str, int] = {}
    named = []
    for found in ids:
        seen[found] = seen.get(found, 0) + 1
        named.append(f"{found}-{seen[found]}")
    return tuple(named)


def save_measures(folder: Path, rows: Sequence[str], base: Mapping[str, Measure], tuned: Mapping[str, Measure]) -> None:
    """Write `measures.npz`; `rows` [P] are what `name_rows` makes of the rows of the plan."""
    arrays: dict[str, Any] = {"rows": np.asarray(rows, dtype=np.str_)}
    record: dict[str, Any] = {"version": VERSION, "base": {}, "tuned": {}}
    for side, measures in (("base", base), ("tuned", tuned)):
        for metric, found in measures.items():
            record[side][metric] = describe(found)
            arrays[f"{side}/{metric}/sums"] = found.sums_NK
            arrays[f"{side}/{metric}/at"] = np.asarray(found.at, dtype=np.int64)
    arrays["record"] = np.asarray(json.dumps(record))
    with explained(folder):
        np.savez_compressed(folder / MEASURES, **arrays)


def describe(found: Measure) -> dict[str, Any]:
    """Say how a metric is computed from its sums, by name."""
    known = found.metric if found.weighted is not None else None
    if found.weighted is None:
        known = next(name for name, formula in FORMULAS.items() if formula is found.formula)
    return {"formula": known, "right_wrong": found.right_wrong, "signature": found.signature}


def load_measures(folder: Path) -> Measures:
    """Read `measures.npz`.

    Raises:
        EnvironmentProblem: it is missing, damaged, or of a later version.
    """
    path = folder / MEASURES
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            record = json.loads(str(arrays["record"]))
            if record["version"] != VERSION:
                raise EnvironmentProblem.of(f"written by another version of llmtune ({record['version']})", str(path))
            rows = tuple(arrays["rows"].tolist())
            sides = [
                {metric: rebuild(arrays, side, metric, about) for metric, about in record[side].items()}
                for side in ("base", "tuned")
            ]
    except FileNotFoundError:
        fix = "Score the run again: llmtune evaluate RUN"
        raise EnvironmentProblem.of("the run has no scores by row", str(path), fix) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        fix = "Score the run again: llmtune evaluate RUN"
        raise EnvironmentProblem.of(f"damaged: {error}", str(path), fix) from None
    return Measures(rows, *sides)


def rebuild(arrays: Any, side: str, metric: str, about: Mapping[str, Any]) -> Measure:
    """Make one metric again from its sums."""
    sums_NK, at = arrays[f"{side}/{metric}/sums"], tuple(arrays[f"{side}/{metric}/at"].tolist())
    return make(metric, sums_NK, at, about["formula"], about["right_wrong"], about["signature"])


def make(metric: str, sums_NK: Floats, at: tuple[int, ...], formula: str, right_wrong: bool, signature: str) -> Measure:
    """Make a metric of sums and the name of its formula."""
    if formula in RANKS:
        found = RANKS[formula](sums_NK, signature)
        return Measure(metric, found.sums_NK, None, right_wrong, signature, found.weighted, at)
    return Measure(metric, sums_NK, FORMULAS[formula], right_wrong, signature, None, at)


def reorder(found: Measure, order: Sequence[int], at: tuple[int, ...]) -> Measure:
    """Return the metric with its rows in another order: `order` [N] are the places that they have now."""
    about = describe(found)
    return make(found.metric, found.sums_NK[list(order)], at, about["formula"], found.right_wrong, found.signature)
