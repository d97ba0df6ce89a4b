"""Decisions about single answers: fit them on validation rows, measure them on test rows, and apply them.

Shapes: N rows, U choices (one per row, or one per word of a row), K labels.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from llmtune.display.number_format import count
from llmtune.evaluate.calibration import RECORD as CALIBRATION_RECORD
from llmtune.evaluate.calibration import Chosen, log_probabilities, read_rules, save_calibration
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, measure_means, measure_shares, ratio_of_counted
from llmtune.evaluate.paired_statistics import share_bounds
from llmtune.evaluate.selective_prediction import (
    fit_sets,
    highest_bound,
    least_rows,
    prove_risk,
    read_sets,
    risk_curve,
    rows_to_prove,
)
from llmtune.recipe.class_names import join_labels
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.training_rule import count_checkpoints
from llmtune.records import Json, Rows
from llmtune.store.atomic_files import hash_folder, read_json, write_json
from llmtune.store.run_folder import CERTIFICATE, EXPORT_FOLDERS, RunFolder
from llmtune.store.score_records import Decided, Decision, Evaluation

RECORD = "decision.json"
DECIDE, ASK = "decide", "ask"


def rate_rows(chosen: Chosen) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the confidence of each row's answer [N], and whether the answer is wrong.

    The confidence is the probability of the answer at temperature 1: of the likeliest label, of all yes-or-no answers,
    or of the tags of all words, as if they were independent.
    """
    rows, row_U = np.unique(chosen.rows, return_inverse=True)
    logits_UK, right_UK = chosen.logits_UK, chosen.right_UK
    if chosen.many:
        logs_U, wrong_U = log_probabilities(np.abs(logits_UK), many=True).sum(1), ((logits_UK > 0) != right_UK).any(1)
    else:
        logs_U = log_probabilities(logits_UK, many=False).max(1)
        wrong_U = ~right_UK[np.arange(len(right_UK)), logits_UK.argmax(1)]
    return np.exp(np.bincount(row_U, logs_U)), np.bincount(row_U, wrong_U, len(rows)) > 0


def score_scope(chosen: Chosen) -> Floats:
    """Return a score per row that is low for unusual inputs [N].

    It is the negative energy of the logits: Liu, Wang, Owens and Li, "Energy-based Out-of-distribution Detection",
    2020; of yes-or-no questions their joint energy: Wang, Liu, Bocchieri and Li, "Can Multi-label Classification
    Networks Know What They Don't Know?", 2021. For the choices of a chat, it is the log-likelihood that the answer is
    any of them.
    """
    if chosen.many:
        return np.asarray(np.logaddexp(0, chosen.logits_UK).sum(1))
    return np.asarray(np.logaddexp.reduce(chosen.logits_UK, axis=1))


def fit_decision(section: EvaluateSection, validation: Chosen | None, checkpoints: int) -> Decision | str:
    """Fit the recipe's decisions on validation rows; or return why there are none.

    If training chose from several checkpoints by the same rows, each checkpoint gets an equal part of the error that
    `evaluate.decide.confidence` leaves. The guarantee then holds for whichever was chosen (Bonferroni).
    """
    if validation is None:
        return "no validation row has a choice"
    rows = len(set(validation.rows))
    record = Decision(validation.labels, validation.many, rows, checkpoints, outside=validation.outside)
    if section.decide is not None:
        confidence = divide_error(section.decide.confidence, checkpoints)
        threshold = prove_risk(*rate_rows(validation), section.decide.risk, confidence)
        record = replace(record, threshold=replace(threshold, confidence=section.decide.confidence))
    if section.sets is not None:
        coverage, per_class = section.sets.coverage, section.sets.per_class
        missed = 0 if per_class else record.outside
        bounds = fit_sets(validation.probabilities(), validation.right_UK, coverage, missed, per_class=per_class)
        free = tuple(label for label, bound in zip(validation.labels, bounds, strict=True) if bound == 0)
        record = replace(record, set_bounds=bounds, coverage=coverage, per_class=per_class, free_labels=free)
    if section.out_of_scope is not None:
        lowest = highest_bound(score_scope(validation), np.ones(rows), rows, section.out_of_scope)
        lowest_score = lowest if math.isfinite(lowest) else None
        record = replace(record, lowest_score=lowest_score, false_alarms=section.out_of_scope)
    return record


def divide_error(confidence: float, checkpoints: int) -> float:
    """Return the confidence that each of several checkpoints needs."""
    return 1 - (1 - confidence) / checkpoints


def measure_decisions(record: Decision, test: Chosen) -> tuple[dict[str, Measure], tuple[tuple[float, float], ...]]:
    """Return the metrics of decisions on test rows, and their risk-coverage curve."""
    at = tuple(dict.fromkeys(test.rows))
    measures: dict[str, Measure] = {}
    confidence_N, wrong_N = rate_rows(test)
    if record.threshold is not None:
        decided_N = is_decided(record, confidence_N)
        measures["decided"] = measure_shares("decided", decided_N.tolist(), "share of rows with a decided answer")
        measures["decided_error"] = measure_errors(decided_N, wrong_N)
    if record.set_bounds:
        chosen_NK = read_sets(test.probabilities(), record.set_bounds, many=test.many)
        right_N, hits_N = test.right_UK.sum(1), (chosen_NK & test.right_UK).sum(1)
        covered_N = np.where(right_N > 0, hits_N / np.maximum(right_N, 1), float(test.many))
        measures["set_coverage"] = measure_shares(
            "set_coverage", covered_N.tolist(), "share of right labels in the set"
        )
        measures["set_size"] = measure_means("set_size", chosen_NK.sum(1).tolist(), "labels in the prediction set")
    if record.false_alarms is not None:
        alarms = is_unusual(record, test).tolist()
        measures["false_alarms"] = measure_shares("false_alarms", alarms, "share of test rows called out of scope")
    curve = risk_curve(confidence_N, wrong_N) if record.threshold is not None else ()
    return {name: replace(one, at=at) for name, one in measures.items()}, curve


def measure_errors(decided_N: NDArray[np.bool_], wrong_N: NDArray[np.bool_]) -> Measure:
    """Return the share of decided answers that are wrong.

    It has every row: two models decide different rows, and each keeps its own.
    """
    sums_N2 = np.stack([decided_N & wrong_N, decided_N], axis=1).astype(np.float64)
    signature = "share of decided answers that are wrong"
    return Measure("decided_error", sums_N2, ratio_of_counted, signature=signature, bounds=share_bounds)


def is_decided(record: Decision, confidence_N: Floats) -> NDArray[np.bool_]:
    """Return which answers are decided."""
    value = record.threshold.value if record.threshold else None
    return np.zeros(len(confidence_N), bool) if value is None else confidence_N >= value


def is_unusual(record: Decision, chosen: Chosen) -> NDArray[np.bool_]:
    """Return which rows are out of scope."""
    return score_scope(chosen) < (-math.inf if record.lowest_score is None else record.lowest_score)


def decide_answer(record: Decision, logits: Sequence[Sequence[float]]) -> Json:
    """Return the decisions about one answer, given the logits of its choices: `decision`, `set`, `out_of_scope`."""
    logits_UK = np.array([choice for choice in logits if len(choice)], dtype=np.float64).reshape(-1, len(record.labels))
    nothing_UK = np.zeros(logits_UK.shape, dtype=bool)
    chosen = Chosen(record.labels, logits_UK, nothing_UK, (0,) * len(logits_UK), record.many)
    decisions: Json = {}
    if record.threshold is not None:
        confidence_N, _ = rate_rows(chosen)
        decisions["decision"] = DECIDE if is_decided(record, confidence_N).any() else ASK
        decisions["confidence"] = float(confidence_N[0]) if len(confidence_N) else 0.0
    if record.set_bounds:
        (labels_K,) = read_sets(chosen.probabilities(), record.set_bounds, many=record.many)
        decisions["set"] = [label for label, chosen_too in zip(record.labels, labels_K, strict=True) if chosen_too]
    if record.false_alarms is not None:
        decisions["out_of_scope"] = bool(is_unusual(record, chosen)[0])
    return decisions


def print_need(recipe: Recipe, rows: Rows, console: Console) -> None:
    """Print how many validation rows `evaluate.decide` needs; nothing without it."""
    counts = [rows.counts.get(split, 0) for split in ("train", "validation")]
    if text := describe_need(recipe.evaluate, counts[1], count_checkpoints(recipe, counts[0])):
        console.print(text, style="yellow" if ASK in text else "", highlight=False, markup=False)


def describe_answer(answer: Mapping[str, Any]) -> str:
    """Return a line about the decision in `decide_answer`, for people; empty without one."""
    parts = [f"decision: {answer['decision']}"] if "decision" in answer else []
    parts += [f"likeliest choice: {answer['choice']}"] if "choice" in answer else []
    parts += [f"confidence: {answer['confidence']:.4f}"] if "confidence" in answer else []
    parts += [f"set: {join_labels(answer['set']) or '(empty)'}"] if "set" in answer else []
    parts += ["out of scope"] if answer.get("out_of_scope") else []
    return "\n" + "; ".join(parts) if parts else ""


def describe_need(section: EvaluateSection, rows: int, checkpoints: int) -> str:
    """Return how many validation rows `evaluate.decide` needs; empty without it."""
    if section.decide is None:
        return ""
    risk, confidence = section.decide.risk, divide_error(section.decide.confidence, checkpoints)
    least, half = least_rows(risk, confidence), rows_to_prove(risk, confidence, risk / 2)
    chosen = f" for the best of {checkpoints} checkpoints" if checkpoints > 1 else ""
    text = f"evaluate.decide: {count(least)} confident validation rows without an error prove, with confidence "
    text += f"{section.decide.confidence:g}, an error rate of at most {risk:g}{chosen}"
    text += f"; about {count(half)} do if {risk / 2:g} of them are wrong" if half is not None else ""
    text += f". The run has {count(rows)} validation rows"
    return text + (f": too few, so every answer will be `{ASK}`. Raise data.validation." if rows < least else ".")


def save_rules(evaluation: Evaluation, folder: Path, trained_sha256: str | None) -> None:
    """Write `calibration.json` and `decision.json`, as far as there are any, with the hash of the trained weights."""
    if evaluation.reliability is not None and evaluation.reliability.record is not None:
        save_calibration(replace(evaluation.reliability.record, trained_sha256=trained_sha256), folder)
    if evaluation.decided is not None and evaluation.decided.record is not None:
        save_decision(replace(evaluation.decided.record, trained_sha256=trained_sha256), folder)


def save_decision(record: Decision, folder: Path) -> None:
    """Write `decision.json`."""
    write_json(folder / RECORD, asdict(record))


def copy_rules(run: RunFolder, target: Path) -> None:
    """Copy the temperature and the decisions of a run next to the weights of an export."""
    for name in (CALIBRATION_RECORD, RECORD):
        if run.is_done("evaluate") and (source := run.path / "evaluation" / name).is_file():
            shutil.copyfile(source, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def refresh_rules(run: RunFolder, trained: Path, console: Console) -> None:
    """Copy the rules of a new evaluation into exports of the same weights; they would keep the old ones."""
    weights = hash_folder(trained)
    for file in sorted(certificate for name in EXPORT_FOLDERS for certificate in (run.path / name).rglob(CERTIFICATE)):
        out, before = file.parent, _read_rules(file.parent)
        if (read_json(file) or {}).get("trained_sha256") == weights:
            copy_rules(run, out)
            if _read_rules(out) != before:
                shown = out.relative_to(run.path).as_posix()
                console.print(f"{shown} now has this evaluation's temperature and decisions", highlight=False)


def _read_rules(folder: Path) -> list[Any]:
    return [read_json(folder / name) for name in (CALIBRATION_RECORD, RECORD)]


def run_decision(run: RunFolder) -> Decision | None:
    """Return the rules of a run's tuned model; None if its last evaluation fitted none.

    Raises EnvironmentProblem for a damaged file.
    """
    return read_rules(run.path / "evaluation" / RECORD, Decision) if run.is_done("evaluate") else None


def conclude(record: Decision | str, curve: tuple[tuple[float, float], ...] = ()) -> Decided:
    """Return the decisions as the evaluation stores them."""
    return Decided(None, record) if isinstance(record, str) else Decided(record, curve=curve)
