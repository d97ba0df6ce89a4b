"""Labels of classify, found out from the rows: their kind, their names in order, their weights, their metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from transformers import PretrainedConfig

from llmtune.data.task_rows import Label
from llmtune.errors import DataError, Problem, RecipeError
from llmtune.evaluate.classification_metrics import CLASS_METRICS
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.task_sections import ClassifySection

UNKNOWN_LABEL = "label unknown"
"""How the reason begins for a row whose label is none of those there are."""
REGRESSION_METRICS = ("loss", "mse", "mae", "pearson", "spearman")
MULTI_METRICS = ("loss", "accuracy", "f1_macro", "f1_micro", "auroc")
AS_NUMBERS = "classify.kind: regression (chosen: labels have a decimal point). Set classify.kind: single for classes."
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
WHOLE = re.compile(r"[+-]?\d+")


def idle_keys(section: ClassifySection, kind: str) -> Iterator[Problem]:
    """Find keys of the section that do nothing with this kind of label."""
    idle = {"regression": ("labels", "class_weights"), "multi": ("class_weights",)}.get(kind, ())
    for name in idle:
        if getattr(section, name) is not None:
            what = f"has no effect: the labels are of the kind '{kind}'"
            yield Problem(what, f"classify.{name}", "Remove it, or state with classify.kind what the labels are.")


def infer_kind(labels: Sequence[Label]) -> str:
    """Return the kind of labels; raises DataError where they are of several kinds.

    Numbers are on a scale as soon as one has a decimal point: files leave it out of whole ones, and CSV has text alone.
    0.0 and 1.0 alone are two classes, which a table writes so if a row of it has no label.
    """
    kinds = {"multi" if isinstance(v, list) else "regression" if isinstance(v, float) else "single" for v in labels}
    texts = {v for v in labels if isinstance(v, str)}
    if kinds <= {"single", "regression"} and all(map(NUMBER.fullmatch, texts)):
        fractions = "regression" in kinds or any("." in text for text in texts)
        kinds = {"regression" if fractions and not _are_two_classes(labels) else "single"} if kinds else kinds
    if len(kinds) > 1:
        what = f"the labels are of several kinds: {' and '.join(sorted(kinds))}"
        raise DataError.of(what, "classify.kind", "State which with classify.kind, or fix the rows.")
    return kinds.pop() if kinds else "single"


def _are_two_classes(labels: Sequence[Label]) -> bool:
    """Whether numbers are 0 and 1, each written in one way."""
    names = {name for label in labels for name in names_of(label)}
    return len(names) == 2 and {float(name) for name in names} == {0.0, 1.0}


def names_of(label: Label) -> list[str]:
    """Return the names of classes in a label; that of a number is the number as it is shown."""
    return list(label) if isinstance(label, list) else [f"{label:.4g}" if isinstance(label, float) else label]


def sort_names(names: set[str], config: PretrainedConfig) -> list[str]:
    """Return names of classes in the order of the model's own, if it has them; else sorted, whole numbers by size."""
    own = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    if len(own) == len(names) and set(own) == names:
        return own
    return sorted(names, key=lambda name: (int(name), name)) if all(map(WHOLE.fullmatch, names)) else sorted(names)


def weigh_classes(section: ClassifySection, names: Sequence[str], counts: Counter[str]) -> dict[str, float]:
    """Return a weight a class; `balanced` is n / (classes x rows of the class), as scikit-learn has it."""
    weights = section.class_weights
    if isinstance(weights, dict):
        unknown = [name for name in weights if name not in names]
        what = "classify.class_weights weighs {}, which no row has"
        RecipeError.collect(Problem(what.format(repr(name)), "classify.class_weights") for name in unknown)
        return dict(weights)
    total = sum(counts[name] for name in names)
    return {name: total / (len(names) * counts[name]) for name in names if counts[name]}


def choose_label_metrics(stated: Sequence[str], kind: str) -> tuple[str, ...]:
    """Return the metrics; the task's own choice gives way to that for this kind of label.

    Raises RecipeError for a metric that the kind does not have.
    """
    own = TASK_FACTS["classify"].default_metrics
    if tuple(stated) in ((), own):
        return {"regression": REGRESSION_METRICS, "multi": MULTI_METRICS}.get(kind, own)
    known = ("loss", *CLASS_METRICS[kind])  # type: ignore[index]
    fix = f"Metrics of these labels: {', '.join(known)}."
    what = f"the labels are of the kind '{kind}', which has no {{}}"
    RecipeError.collect(Problem(what.format(name), "evaluate.metrics", fix) for name in stated if name not in known)
    return tuple(stated)
