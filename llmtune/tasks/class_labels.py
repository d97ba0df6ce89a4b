"""Labels of classify, inferred from the rows: their kind, names in order, weights and metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from llmtune.data.classify_rows import Label, class_doubts
from llmtune.data.rejected_rows import too_many_bad
from llmtune.errors import DataError, Problem, RecipeError, nearest
from llmtune.recipe.evaluate_section import is_own_metric
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import CALIBRATION, TASK_FACTS
from llmtune.recipe.task_sections import ClassifySection

if TYPE_CHECKING:  # `recipes check` imports this module, and no library of models
    from transformers import PretrainedConfig

FEWEST = 2
"""Fewest classes."""
SHOWN = 5
"""Unknown labels in a message."""
UNKNOWN_LABEL = "label unknown"
"""Prefix of the reason for a row with an unknown label."""
REGRESSION_METRICS = ("loss", "mse", "mae", "pearson", "spearman")
MULTI_METRICS = ("loss", "accuracy", "f1_macro", "f1_micro", "auroc")
AS_NUMBERS = "classify.kind: regression (chosen: labels have a decimal point). Set classify.kind: single for classes."
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
WHOLE = re.compile(r"[+-]?\d+")


def check_label_kinds(recipe: Recipe, labels: Sequence[Label]) -> str:
    """Return the kind of all labels of a data set.

    Raises:
        DataError: labels of several kinds, fewer than two classes, or labels that are probably misread.
        RecipeError: a metric that this kind of label does not support, or a key that has no effect on it.
    """
    section = recipe.classify or ClassifySection()
    kind = infer_kind(labels) if section.kind == "auto" else section.kind
    RecipeError.collect(idle_keys(section, kind, recipe.evaluate.decisions))
    if kind != "regression":
        if section.labels is None:
            doubts = class_doubts(labels, section.kind)
            DataError.collect(Problem(what, "classify.labels", fix) for what, fix in doubts)
        names = section.labels or sorted({name for label in labels for name in names_of(label)})
        if len(names) < FEWEST:
            fix = "Give rows of at least two classes."
            raise DataError.of(f"all rows have the label {', '.join(names) or '(none)'}", "classify.labels", fix)
    choose_label_metrics(recipe.evaluate.metrics, kind)
    return kind


def check_stated_labels(recipe: Recipe, labels: Sequence[Label]) -> None:
    """Refuse labels that training would refuse, and rows whose labels are unknown."""
    kind = check_label_kinds(recipe, labels)
    stated = recipe.classify.labels if recipe.classify else None
    if kind == "regression" or not stated:
        return
    unknown = Counter(name for label in labels for name in names_of(label) if name not in stated)
    lost = sum(not {*names_of(label)} <= {*stated} for label in labels)
    if lost / len(labels) > recipe.data.max_dropped:
        problem = too_many_bad(f"{lost:,} of {len(labels):,} rows", lost / len(labels), recipe.data.max_dropped)
        names = ", ".join(f"{name!r} ({count:,} rows)" for name, count in unknown.most_common(SHOWN))
        hint = "".join(nearest(name, stated) for name, _ in unknown.most_common(1))
        raise DataError(
            problem, Problem(f"labels that classify.labels does not list: {names}", "classify.labels", hint)
        )


def number_metrics(labels: Sequence[Label]) -> tuple[str, ...] | None:
    """Return the metrics for labels that are numbers on a scale; None otherwise, to keep the task's metrics."""
    with suppress(DataError):  # labels of several kinds
        if infer_kind(labels) == "regression":
            return REGRESSION_METRICS
    return None


def idle_keys(section: ClassifySection, kind: str, decisions: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each key of the section, or of `decisions`, that has no effect on this kind of label."""
    idle = {"regression": ("labels", "class_weights", "rename"), "multi": ("class_weights",)}.get(kind, ())
    what = f"has no effect: the labels are of the kind '{kind}'"
    for name in idle:
        if getattr(section, name) is not None:
            yield Problem(what, f"classify.{name}", "Remove it, or set classify.kind to the kind of your labels.")
    for name in decisions if kind == "regression" else ():
        yield Problem(what, f"evaluate.{name}", "Remove it, or set classify.kind to the kind of your labels.")


def infer_kind(labels: Sequence[Label]) -> str:
    """Return the kind of labels. Raises DataError if they are of several kinds.

    One decimal point makes all numbers a scale: files omit it from integers, and CSV contains only text. The values 0.0
    and 1.0 alone are two classes: tables write them this way if a row has no label.
    """
    kinds = {"multi" if isinstance(v, list) else "regression" if isinstance(v, float) else "single" for v in labels}
    texts = {v for v in labels if isinstance(v, str)}
    if kinds <= {"single", "regression"} and all(map(NUMBER.fullmatch, texts)):
        fractions = "regression" in kinds or any("." in text for text in texts)
        kinds = {"regression" if fractions and not _are_two_classes(labels) else "single"} if kinds else kinds
    if len(kinds) > 1:
        what = f"the labels are of several kinds: {' and '.join(sorted(kinds))}"
        raise DataError.of(what, "classify.kind", "Set classify.kind, or fix the rows.")
    return kinds.pop() if kinds else "single"


def _are_two_classes(labels: Sequence[Label]) -> bool:
    """Whether numbers are only 0 and 1, each with one spelling."""
    names = {name for label in labels for name in names_of(label)}
    return len(names) == 2 and {float(name) for name in names} == {0.0, 1.0}


def names_of(label: Label) -> list[str]:
    """Return the class names in a label; the number 3.0 is the class 3: tables turn whole numbers into decimals."""
    if isinstance(label, list):
        return list(label)
    if isinstance(label, float):
        return [str(int(label)) if label.is_integer() else str(label)]
    return [label]


def sort_names(names: set[str], config: PretrainedConfig) -> list[str]:
    """Return class names in the model's order, if it has these names; else sorted, integers by size."""
    model_names = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    if len(model_names) == len(names) and set(model_names) == names:
        return model_names
    return sorted(names, key=lambda name: (int(name), name)) if all(map(WHOLE.fullmatch, names)) else sorted(names)


def weigh_classes(section: ClassifySection, names: Sequence[str], counts: Counter[str]) -> dict[str, float]:
    """Return a weight per class; `balanced` is n / (classes x rows of the class), as in scikit-learn."""
    weights = section.class_weights
    if isinstance(weights, dict):
        unknown = [name for name in weights if name not in names]
        what = "classify.class_weights has a weight for {}, which no row has"
        RecipeError.collect(Problem(what.format(repr(name)), "classify.class_weights") for name in unknown)
        return dict(weights)
    total = sum(counts[name] for name in names)
    return {name: total / (len(names) * counts[name]) for name in names if counts[name]}


def choose_label_metrics(stated: Sequence[str], kind: str) -> tuple[str, ...]:
    """Return the metrics; the task's default metric is replaced by the one for this kind of label.

    Raises RecipeError for a metric that does not exist for the kind.
    """
    from llmtune.evaluate.classification_metrics import CLASS_METRICS  # late: imports numpy

    defaults = TASK_FACTS["classify"].default_metrics
    if tuple(stated) in ((), defaults):
        return {"regression": REGRESSION_METRICS, "multi": MULTI_METRICS}.get(kind, defaults)
    of_choices = () if kind == "regression" else CALIBRATION
    allowed = ("loss", *CLASS_METRICS[kind], *of_choices)  # type: ignore[index]
    fix = f"Metrics of these labels: {', '.join(allowed)}."
    what = f"the labels are of the kind '{kind}', which does not support {{}}"
    RecipeError.collect(
        Problem(what.format(name), "evaluate.metrics", fix)
        for name in stated
        if name not in allowed and not is_own_metric(name)
    )
    return tuple(stated)
