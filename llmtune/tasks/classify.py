"""Task classify: put a text into a class, into several, or on a scale."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data import iterate_rows
from llmtune.data.data_report import class_pieces
from llmtune.data.label_encoding import class_target, encode_classes
from llmtune.data.target_collators import classes_collator
from llmtune.errors import DataError, Problem, RecipeError
from llmtune.evaluate.classification_metrics import (
    CLASS_METRICS,
    class_table,
    confusion,
    majority_scores,
    measure_classes,
)
from llmtune.evaluate.metrics import Measure
from llmtune.evaluate.task_predictions import name_of, predict_classes
from llmtune.model.heads import check_padding, name_outputs
from llmtune.model.task_losses import classes_loss
from llmtune.recipe import TASK_FACTS, ClassifySection
from llmtune.records import SIDES, Row, Rows, Task

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

REGRESSION_METRICS = ("loss", "mse", "mae", "pearson", "spearman")
MANY_METRICS = ("loss", "accuracy", "f1_macro", "f1_micro", "auroc")
FEWEST = 2
"""Classes that there must be."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
WHOLE = re.compile(r"[+-]?\d+")


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its label, and the label as text."""
    return {**row, "label": None}, write({"label": row["label"]})


def reference(row: Row) -> Any:
    """Return the label: a name, a list of names, or a number."""
    return row["label"]


def write(said: Any) -> str:
    """Say a label, or several, or a number, as a person reads it."""
    label = said["label"]
    if isinstance(label, list):
        return ", ".join(label) or "(none)"
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a text (and its pair)."""
    return {"text": given["prompt"] or "", "pair": given.get("pair"), "label": None}


def settle(recipe: Recipe, rows: Rows, config: Any) -> Recipe:
    """Find out what kind of labels there are, their names and weights.

    Raises:
        DataError: labels of several kinds, or fewer than two classes.
        RecipeError: a metric that this kind of label does not have, weights for classes that there are none of, or a
            key of the section that has no effect on this kind.
    """
    section = recipe.classify or ClassifySection()
    labels = {side: [row["label"] for _, row in iterate_rows(rows, side)] for side in SIDES}
    every = [label for side in SIDES for label in labels[side]]
    kind = find_kind(every) if section.kind == "auto" else section.kind
    RecipeError.collect(idle_keys(section, kind))
    update: dict[str, Any] = {"kind": kind}
    if kind != "regression":
        counts = Counter(name for label in labels["train"] for name in names(label))
        found = in_order(section.labels or {name for label in every for name in names(label)}, config)
        if len(found) < FEWEST:
            fix = "Give rows of two classes at least."
            raise DataError.of(f"all rows have the label {', '.join(found) or '(none)'}", "classify.labels", fix)
        update["labels"] = tuple(found)
        if section.class_weights is not None:
            update["class_weights"] = weigh(section.class_weights, found, counts)
    settled = section.model_copy(update=update)
    evaluate = recipe.evaluate.model_copy(update={"metrics": choose_metrics(recipe.evaluate.metrics, kind)})
    return recipe.model_copy(update={"classify": settled, "evaluate": evaluate})


def idle_keys(section: ClassifySection, kind: str) -> Iterator[Problem]:
    """Find keys of the section that do nothing with this kind of label."""
    without = {"regression": ("labels", "class_weights"), "multi": ("class_weights",)}.get(kind, ())
    for name in without:
        if getattr(section, name) is not None:
            what = f"has no effect: the labels are of the kind '{kind}'"
            yield Problem(what, f"classify.{name}", "Remove it, or say with classify.kind what the labels are.")


def find_kind(labels: Sequence[Any]) -> str:
    """Tell by the labels what they are; raises DataError where they are of several kinds.

    Numbers are on a scale as soon as one has a decimal point: files leave it out of whole ones, and CSV has text alone.
    """
    kinds = {"multi" if isinstance(v, list) else "regression" if isinstance(v, float) else "single" for v in labels}
    texts = {v for v in labels if isinstance(v, str)}
    if kinds <= {"single", "regression"} and all(map(NUMBER.fullmatch, texts)):
        fractions = "regression" in kinds or any("." in text for text in texts)
        kinds = {"regression" if fractions else "single"} if kinds else kinds
    if len(kinds) > 1:
        what = f"the labels are of several kinds: {' and '.join(sorted(kinds))}"
        raise DataError.of(what, "classify.kind", "Say which with classify.kind, or mend the rows.")
    return kinds.pop() if kinds else "single"


def names(label: Any) -> list[str]:
    """Return the names of classes in a label."""
    return list(label) if isinstance(label, list) else [str(label)]


def as_target(label: Any, kind: str) -> Any:
    """Return a label as its kind has it: a number, the names of several classes, or one name."""
    return float(label) if kind == "regression" else names(label) if kind == "multi" else names(label)[0]


def in_order(found: Sequence[str] | set[str], config: Any) -> list[str]:
    """Return names in the order that a recipe states; those found in rows in that of the model's own, if it has them.

    Else they are sorted: whole numbers by their size.
    """
    if not isinstance(found, set):
        return list(found)
    own = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    if len(own) == len(found) and set(own) == found:
        return own
    return sorted(found, key=lambda name: (int(name), name)) if all(map(WHOLE.fullmatch, found)) else sorted(found)


def weigh(wanted: Any, labels: Sequence[str], counts: Counter[str]) -> dict[str, float]:
    """Return a weight a class; `balanced` is n / (classes x rows of the class), as scikit-learn has it."""
    if wanted != "balanced":
        unknown = [name for name in wanted if name not in labels]
        what = "classify.class_weights weighs {}, which no row has"
        RecipeError.collect(Problem(what.format(repr(name)), "classify.class_weights") for name in unknown)
        return dict(wanted)
    total = sum(counts[name] for name in labels)
    return {name: total / (len(labels) * counts[name]) for name in labels if counts[name]}


def choose_metrics(wanted: Sequence[str], kind: str) -> tuple[str, ...]:
    """Return the metrics; the task's own choice gives way to that for this kind of label.

    Raises RecipeError for a metric that the kind does not have.
    """
    own = TASK_FACTS["classify"].default_metrics
    if tuple(wanted) in ((), own):
        return {"regression": REGRESSION_METRICS, "multi": MANY_METRICS}.get(kind, own)
    known = ("loss", *CLASS_METRICS[kind])  # type: ignore[index]
    fix = f"Metrics of these labels: {', '.join(known)}."
    what = f"the labels are of the kind '{kind}', which has no {{}}"
    RecipeError.collect(Problem(what.format(name), "evaluate.metrics", fix) for name in wanted if name not in known)
    return tuple(wanted)


def count_classes(rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
    """Count the rows of each class on each side; of numbers there is nothing to count."""
    if recipe.classify is None or recipe.classify.kind == "regression":
        return {}
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(SIDES, 0) for name in recipe.classify.labels or ()}
    for side in SIDES:
        for _, row in iterate_rows(rows, side):
            for name in names(row["label"]):
                if name in counts:
                    counts[name][side] += 1
    return counts


def shape_config(config: Any, recipe: Recipe) -> None:
    """Tell the model how many classes there are, and their names."""
    section = recipe.classify or ClassifySection()
    number = section.kind == "regression"
    kinds = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
    name_outputs(config, ("value",) if number else section.labels or (), kinds.get(section.kind))


def measure(
    metric: str, said: Sequence[Any], wanted: Sequence[Any], recipe: Recipe, base: Sequence[Any] | None = None
) -> Measure | None:
    """Measure predicted classes, or numbers."""
    section = recipe.classify
    assert section is not None
    if section.kind == "auto" or metric not in CLASS_METRICS[section.kind]:
        return None
    right = [as_target(label, section.kind) for label in wanted]
    return measure_classes(metric, section.kind, scores_of(said), right, section.labels or ())


def scores_of(said: Sequence[Any]) -> Any:
    """Return predicted scores as [N, K]."""
    return np.array([one["scores"] for one in said], dtype=np.float64)


def baseline(learned: Sequence[Any], questions: Sequence[Row], recipe: Recipe) -> tuple[str, list[Any]]:
    """Say the most frequent class of the training rows every time, or their mean."""
    section = recipe.classify
    assert section is not None
    assert section.kind != "auto"
    labels = section.labels or ()
    targets = [label for label in learned if not isinstance(class_target(label, recipe), str)]  # others were left out
    scores = majority_scores(
        [as_target(label, section.kind) for label in targets], section.kind, labels, len(questions)
    )
    name = {
        "single": "the most frequent class",
        "multi": "the classes that most rows have",
        "regression": "the mean of the training rows",
    }[section.kind]
    return name, [{"label": name_of(row, section.kind, labels), "scores": row.tolist()} for row in scores]


def details(said: Sequence[Any], wanted: Sequence[Any], recipe: Recipe) -> dict[str, Any]:
    """Return the table of classes, and for one label a row the confusion matrix."""
    section = recipe.classify
    assert section is not None
    if section.kind == "regression" or section.kind == "auto":
        return {}
    labels, scores = section.labels or (), scores_of(said)
    wanted = [as_target(label, section.kind) for label in wanted]
    found: dict[str, Any] = {"classes": class_table(section.kind, scores, wanted, labels)}
    if section.kind == "single":
        found["confusion"] = {"labels": list(labels), "counts": confusion(scores, wanted, labels)}
    return found


def is_one_part(config: Any) -> bool:
    """Whether a model is an encoder or a decoder alone: the head of one of both wants an end token in each text."""
    return not getattr(config, "is_encoder_decoder", False)


CLASSIFY = Task(
    name="classify",
    auto_class="AutoModelForSequenceClassification",
    peft_task_type="SEQ_CLS",
    encode=encode_classes,
    collator=classes_collator,
    loss=classes_loss,
    prompt=prompt,
    predict=predict_classes,
    measure=measure,
    reference=reference,
    write=write,
    baseline=baseline,
    details=details,
    count_classes=count_classes,
    ask=ask,
    asks={"prompt": True, "pair": False},
    settle=settle,
    shape_config=shape_config,
    pieces=class_pieces,
    check=check_padding,
    fits=is_one_part,
    packs=True,
    by_token=False,
    headed=True,
)
FORMS = (CLASSIFY,)
