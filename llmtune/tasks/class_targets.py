"""Labels of classify as targets: of the model's head, and of TF-IDF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.data.classify_rows import ClassifyRow, Label
from llmtune.data.example import Example
from llmtune.data.written_numbers import read_number
from llmtune.evaluate.classification_metrics import true_classes
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.regression import Fitted, Targets, fit_features, fit_tfidf
from llmtune.recipe.task_sections import ClassifySection
from llmtune.tasks.class_labels import UNKNOWN_LABEL, names_of


@dataclass(frozen=True)
class ClassExample(Example):
    """A text with its classes, or its number."""

    class_ids: Sequence[int] = ()
    """The class of the text, as a one-element list."""
    values: Sequence[float] = ()
    """1 or 0 for each class, if a text may have several; or a single number."""
    weights: Sequence[float] = ()
    """The example's weight in the loss, as a one-element list."""


def class_target(label: Label | None, section: ClassifySection) -> dict[str, Any] | str:
    """Return an example's target columns, or the reason why it has none."""
    if section.kind == "regression":
        value = read_number(label)
        return f"no number: the label is {label!r}" if value is None else {"values": [float(value)]}
    labels = section.labels or ()
    named = names_of(label) if label is not None else []
    wrong = next((name for name in named if name not in labels), None)
    if wrong is not None:
        return f"{UNKNOWN_LABEL}: {wrong!r} is none of {', '.join(labels[:20])}"
    if section.kind == "multi":
        return {"values": [float(name in named) for name in labels]}
    if len(named) != 1:
        return f"{len(named)} labels, but classify.kind: single allows one"
    weights = section.class_weights
    weight = {"weights": [float(weights.get(named[0], 1.0))]} if isinstance(weights, dict) else {}
    return {"class_ids": [labels.index(named[0])], **weight}


def as_target(label: Label, kind: str) -> Label:
    """Return a label in the form of its kind: a number, a list of class names, or one name."""
    if kind == "regression":
        number = read_number(label)
        assert number is not None, "class_target() refuses rows without a number"
        return float(number)
    return names_of(label) if kind == "multi" else names_of(label)[0]


def fit_labels(
    train: Sequence[ClassifyRow],
    prompts: Sequence[ClassifyRow],
    section: ClassifySection,
    features: Sequence[Floats] | None = None,
) -> Fitted | str:
    """Fit on training rows and predict the prompts' labels; the reason instead if nothing can be fitted.

    The features are TF-IDF, or those given of training rows and then prompts. A text and its pair count as one text.
    Rows whose labels were left out of training are left out here too.
    """
    assert section.kind != "auto"
    kind = section.kind
    kept = [i for i, row in enumerate(train) if not isinstance(class_target(row["label"], section), str)]
    usable = [train[i] for i in kept]
    targets = [as_target(row["label"], kind) for row in usable if row["label"] is not None]
    if not usable:
        return "no training row has a label"
    if kind == "regression":
        wanted: Targets = np.array(targets, dtype=np.float64)
    else:
        true_NK = true_classes(kind, targets, section.labels or ())
        wanted = true_NK.argmax(1) if kind == "single" else true_NK
    if features is not None:
        train_NF, new_AF = np.stack([features[i] for i in kept]), np.stack(features[len(train) :])
        return fit_features(kind, train_NF, wanted, len(section.labels or ()), new_AF, "the base's features")
    texts, prompt_texts = (
        ["\n".join([row["text"], row.get("pair") or ""]) for row in rows] for rows in (usable, prompts)
    )
    return fit_tfidf(kind, texts, wanted, len(section.labels or ()), prompt_texts)
