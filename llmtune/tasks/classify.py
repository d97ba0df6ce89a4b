"""Task classify: put a text into a class, into several, or on a scale."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np

from llmtune.data import iterate_rows
from llmtune.data.data_report import class_pieces
from llmtune.data.label_encoding import class_target, encode_classes
from llmtune.data.target_collators import classes_collator
from llmtune.data.task_interface import Encoded
from llmtune.errors import DataError, Problem, RecipeError
from llmtune.evaluate.classification_metrics import (
    CLASS_METRICS,
    class_table,
    confusion,
    majority_scores,
    measure_classes,
)
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.task_predictions import name_of, predict_classes
from llmtune.model.heads import check_padding, name_outputs
from llmtune.model.task_losses import classes_loss
from llmtune.recipe import TASK_FACTS, ClassifySection
from llmtune.records import SIDES, Advance, Batch, Collate, Example, Loss, Rows
from llmtune.tasks.base import Task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Label: TypeAlias = str | float | list[str]
REGRESSION_METRICS = ("loss", "mse", "mae", "pearson", "spearman")
MULTI_METRICS = ("loss", "accuracy", "f1_macro", "f1_micro", "auroc")
FEWEST = 2
"""Classes that there must be."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
WHOLE = re.compile(r"[+-]?\d+")
PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""By kind of label, what transformers calls it."""
OUTPUT_KINDS = {"multi": "yes-no", "regression": "number"}
BASELINES = {
    "single": "the most frequent class",
    "multi": "the classes that most rows have",
    "regression": "the mean of the training rows",
}


class ClassifyRow(TypedDict):
    """A text, or two, with a label; a prompt has none."""

    text: str
    pair: str | None
    label: Label | None


class ClassPrediction(TypedDict):
    """A label, and the probability of each class or the number."""

    label: Label
    scores: list[float]


class Classify(Task[ClassifyRow, ClassPrediction]):
    """An encoder, or a decoder, with a head on the whole text."""

    name = "classify"
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    optional_inputs = ("pair",)
    packs = True
    predicts_tokens = False
    trains_head = True

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether a model has one part: the head of one of both wants an end token in each text."""
        return not getattr(config, "is_encoder_decoder", False)

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Find out what kind of labels there are, their names and weights.

        Raises:
            DataError: labels of several kinds, or fewer than two classes.
            RecipeError: a metric that this kind of label does not have, weights for classes that there are none of, or
                a key of the section that has no effect on this kind.
        """
        section = section_of(recipe)
        labels = {side: [row["label"] for _, row in iterate_rows(rows, side)] for side in SIDES}
        every = [label for side in SIDES for label in labels[side]]
        kind = infer_kind(every) if section.kind == "auto" else section.kind
        RecipeError.collect(idle_keys(section, kind))
        update: dict[str, object] = {"kind": kind}
        if kind != "regression":
            counts = Counter(name for label in labels["train"] for name in names_of(label))
            names = section.labels or sort_names({name for label in every for name in names_of(label)}, config)
            if len(names) < FEWEST:
                fix = "Give rows of two classes at least."
                raise DataError.of(f"all rows have the label {', '.join(names) or '(none)'}", "classify.labels", fix)
            update["labels"] = tuple(names)
            if section.class_weights is not None:
                update["class_weights"] = weigh_classes(section, names, counts)
        evaluate = recipe.evaluate.model_copy(update={"metrics": choose_metrics(recipe.evaluate.metrics, kind)})
        return recipe.model_copy(update={"classify": section.model_copy(update=update), "evaluate": evaluate})

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Give the model the number of classes and their names."""
        section = section_of(recipe)
        names = ("value",) if section.kind == "regression" else section.labels or ()
        name_outputs(config, names, PROBLEM_TYPES.get(section.kind))

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Give a decoder the token that rows are padded with."""
        check_padding(model, processor, recipe)

    def make_row(self, given: Mapping[str, str | None]) -> ClassifyRow:
        """Return the row of a text (and its pair)."""
        return {"text": given["prompt"] or "", "pair": given.get("pair"), "label": None}

    def split_answer(self, row: ClassifyRow) -> tuple[ClassifyRow, str]:
        """Return the row without its label, and the label as text."""
        return {**row, "label": None}, format_label(row["label"])

    def reference(self, row: ClassifyRow) -> Label | None:
        """Return the label: a name, a list of names, or a number."""
        return row["label"]

    def class_counts(self, rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
        """Count the rows of each class in each split; of numbers there is nothing to count."""
        if recipe.classify is None or recipe.classify.kind == "regression":
            return {}
        counts: dict[str, dict[str, int]] = {name: dict.fromkeys(SIDES, 0) for name in recipe.classify.labels or ()}
        for side in SIDES:
            for _, row in iterate_rows(rows, side):
                for name in names_of(row["label"]):
                    if name in counts:
                        counts[name][side] += 1
        return counts

    def encode(self, rows: Sequence[ClassifyRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example a row: the text (and its pair) with the number of its class, its classes, or its value."""
        return encode_classes(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what packs texts, or pads them."""
        return classes_collator(processor, recipe, bool(packs))

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the loss over rows: cross entropy of one class, mean binary one of many, square of a number."""
        return classes_loss(model, batch, by_row)

    def highlighted_text(
        self, example: Example, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[tuple[str, bool]]:
        """Show a text with its class, classes or number."""
        return class_pieces(example, processor, recipe)

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[ClassifyRow],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[ClassPrediction]:
        """Return the label of each text, and probabilities by class or the number."""
        return predict_classes(model, rows, processor, recipe, device=device, advance=advance)

    def format_prediction(self, prediction: ClassPrediction) -> str:
        """Write the label."""
        return format_label(prediction["label"])

    def compute_metric(
        self,
        metric: str,
        predictions: Sequence[ClassPrediction],
        references: Sequence[Label],
        recipe: Recipe,
        base: Sequence[ClassPrediction] | None = None,
    ) -> Measure | None:
        """Measure predicted classes, or numbers."""
        section = section_of(recipe)
        if section.kind == "auto" or metric not in CLASS_METRICS[section.kind]:
            return None
        targets = [as_target(label, section.kind) for label in references]
        return measure_classes(metric, section.kind, scores_of(predictions), targets, section.labels or ())

    def baseline(
        self, references: Sequence[Label], prompts: Sequence[ClassifyRow], recipe: Recipe
    ) -> tuple[str, list[ClassPrediction]]:
        """Predict the most frequent class of the training rows every time, or their mean."""
        section = section_of(recipe)
        assert section.kind != "auto"
        labels = section.labels or ()
        usable = [label for label in references if not isinstance(class_target(label, recipe), str)]
        targets = [as_target(label, section.kind) for label in usable]  # others were left out
        scores = majority_scores(targets, section.kind, labels, len(prompts))
        predictions: list[ClassPrediction] = [
            {"label": name_of(row, section.kind, labels), "scores": row.tolist()} for row in scores
        ]
        return BASELINES[section.kind], predictions

    def class_table(
        self, predictions: Sequence[ClassPrediction], references: Sequence[Label], recipe: Recipe
    ) -> dict[str, Any]:
        """Return the table of classes, and for one label a row the confusion matrix."""
        section = section_of(recipe)
        if section.kind == "regression" or section.kind == "auto":
            return {}
        labels, scores = section.labels or (), scores_of(predictions)
        targets = [as_target(label, section.kind) for label in references]
        tables: dict[str, Any] = {"classes": class_table(section.kind, scores, targets, labels)}
        if section.kind == "single":
            tables["confusion"] = {"labels": list(labels), "counts": confusion(scores, targets, labels)}
        return tables

    def output_kind(self, recipe: Recipe) -> str:
        """Return what the head's outputs are."""
        return OUTPUT_KINDS.get(section_of(recipe).kind, "choice")


def section_of(recipe: Recipe) -> ClassifySection:
    """Return the recipe's section, or its defaults."""
    return recipe.classify or ClassifySection()


def format_label(label: Label | None) -> str:
    """Write a label, or several, or a number, as a person reads it."""
    if isinstance(label, list):
        return ", ".join(label) or "(none)"
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def idle_keys(section: ClassifySection, kind: str) -> Iterator[Problem]:
    """Find keys of the section that do nothing with this kind of label."""
    idle = {"regression": ("labels", "class_weights"), "multi": ("class_weights",)}.get(kind, ())
    for name in idle:
        if getattr(section, name) is not None:
            what = f"has no effect: the labels are of the kind '{kind}'"
            yield Problem(what, f"classify.{name}", "Remove it, or say with classify.kind what the labels are.")


def infer_kind(labels: Sequence[Label]) -> str:
    """Return the kind of labels; raises DataError where they are of several kinds.

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


def names_of(label: Label) -> list[str]:
    """Return the names of classes in a label."""
    return list(label) if isinstance(label, list) else [str(label)]


def as_target(label: Label, kind: str) -> Label:
    """Return a label as its kind has it: a number, the names of several classes, or one name."""
    if kind == "regression":
        assert not isinstance(label, list)
        return float(label)
    return names_of(label) if kind == "multi" else names_of(label)[0]


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


def choose_metrics(stated: Sequence[str], kind: str) -> tuple[str, ...]:
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


def scores_of(predictions: Sequence[ClassPrediction]) -> Floats:
    """Return predicted scores as [N, K]."""
    return np.array([prediction["scores"] for prediction in predictions], dtype=np.float64)


VARIANTS = (Classify(),)
