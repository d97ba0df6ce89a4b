"""Task classify: assign a text to a class, to several classes, or to a point on a scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from llmtune.data.classify_rows import ClassifyRow, Label, format_label
from llmtune.data.collators import encoder_batch
from llmtune.data.example import Example
from llmtune.data.long_texts import tokenize_columns
from llmtune.data.overlong import Lost, too_long
from llmtune.data.row_store import iterate_rows
from llmtune.data.task_interface import Encoded, HeadStart
from llmtune.data.tokenization import Segment, decode_shortened
from llmtune.evaluate.classification_metrics import (
    CLASS_METRICS,
    class_table,
    confusion,
    majority_scores,
    measure_classes,
    true_classes,
)
from llmtune.evaluate.evaluated_task import EvalPrediction, LearnedClasses, LoadedModel, SimplePredictions
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.regression import Fitted, logits_of
from llmtune.evaluate.token_batches import run_encoder
from llmtune.model.causal_lm_loss import model_inputs
from llmtune.model.config import name_outputs
from llmtune.model.device import in_own_dtype
from llmtune.model.mean_layer import add_mean_layer
from llmtune.model.teacher_loss import class_losses, yes_no_losses
from llmtune.recipe.model_kind import CLASSES
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import ClassifySection
from llmtune.records import SPLITS, AdaptedModel, Batch, Loss, Rows
from llmtune.tasks.base import Endpoint, ReadingTask, loss_of_rows
from llmtune.tasks.class_labels import (
    AS_NUMBERS,
    check_label_kinds,
    choose_label_metrics,
    names_of,
    sort_names,
    weigh_classes,
)
from llmtune.tasks.class_targets import ClassExample, as_target, class_target, fit_labels
from llmtune.tasks.frozen_base import read_features, start_at_regression

PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""By kind of label, transformers' name for the problem type."""
OUTPUT_KINDS = {"multi": "yes-no", "regression": "number"}
BASELINES = {
    "single": "the most frequent class",
    "multi": "the classes that most rows have",
    "regression": "the mean of the training rows",
}


class ClassPrediction(TypedDict):
    """A label, and the probability of each class, or the number."""

    label: Label
    scores: list[float]


class Classify(ReadingTask[ClassifyRow, ClassPrediction]):
    """An encoder or decoder with a head on the complete text."""

    name = "classify"
    endpoint = Endpoint(
        "/v1/classify",
        "`label` (a name, a list of names or a number) and `scores`: a probability per class, in the order of `labels`",
    )
    model_kind = CLASSES
    example_type = ClassExample
    optional_inputs = ("pair",)

    def needs_float32(self, recipe: Recipe) -> bool:
        """Whether labels are numbers."""
        return classify_section(recipe).kind == "regression"

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Infer the kind of labels, their names and weights.

        Raises:
            DataError: labels of several kinds, or fewer than two classes.
            RecipeError: a metric that this kind of label does not support, weights for missing classes, or a key of the
                section that has no effect on this kind.
        """
        section = classify_section(recipe)
        labels = {split: [row["label"] for _, row in iterate_rows(rows, split)] for split in SPLITS}
        every = [label for split in SPLITS for label in labels[split]]
        kind = check_label_kinds(recipe, every)
        update: dict[str, object] = {"kind": kind}
        if kind != "regression":
            counts = Counter(name for label in labels["train"] for name in names_of(label))
            names = section.labels or sort_names({name for label in every for name in names_of(label)}, config)
            update["labels"] = tuple(names)
            if section.class_weights is not None:
                update["class_weights"] = weigh_classes(section, names, counts)
        evaluate = recipe.evaluate.model_copy(update={"metrics": choose_label_metrics(recipe.evaluate.metrics, kind)})
        return recipe.model_copy(update={"classify": section.model_copy(update=update), "evaluate": evaluate})

    def note_labels(self, stated: Recipe, inferred: Recipe) -> str | None:
        """Say that labels are numbers, unless the recipe does."""
        is_chosen = stated.classify is None or stated.classify.kind == "auto"
        return AS_NUMBERS if is_chosen and classify_section(inferred).kind == "regression" else None

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Give the model the number and names of classes, and a sentence encoder a layer that averages its tokens."""
        section = classify_section(recipe)
        add_mean_layer(config)
        names = ("value",) if section.kind == "regression" else section.labels or ()
        name_outputs(config, names, PROBLEM_TYPES.get(section.kind))

    def make_row(self, given: Mapping[str, str | None]) -> ClassifyRow:
        """Return the row of a text and its optional pair."""
        return {"text": given["prompt"] or "", "pair": given.get("pair"), "label": None}

    def split_answer(self, row: ClassifyRow) -> tuple[ClassifyRow, str]:
        """Return the row without its label, and the label as text."""
        return {**row, "label": None}, format_label(row["label"])

    def reference(self, row: ClassifyRow) -> Label | None:
        """Return the label: a name, a list of names, or a number."""
        return row["label"]

    def output_labels(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the names of the classes; empty for numbers."""
        section = classify_section(recipe)
        return () if section.kind == "regression" else section.labels or ()

    def right_labels(self, reference: Label) -> list[list[str]]:
        """Return the classes of a row."""
        return [names_of(reference)]

    def class_counts(self, rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
        """Count the rows of each class in each split; empty for numbers."""
        if recipe.classify is None or recipe.classify.kind == "regression":
            return {}
        counts: dict[str, dict[str, int]] = {name: dict.fromkeys(SPLITS, 0) for name in recipe.classify.labels or ()}
        for split in SPLITS:
            for _, row in iterate_rows(rows, split):
                for name in names_of(row["label"]):
                    if name in counts:
                        counts[name][split] += 1
        return counts

    def encode(self, rows: Sequence[ClassifyRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example per row: the text (and its pair) with its class number, its classes, or its value."""
        encoded: list[Encoded] = []
        for row, text in zip(rows, fitted_texts(rows, processor, recipe), strict=True):
            target = class_target(row["label"], classify_section(recipe))
            if isinstance(target, str):
                encoded.append(target)
            elif isinstance(text, str):
                encoded.append(text)
            elif not text.input_ids:
                encoded.append("the text has no tokens")
            else:
                encoded.append([ClassExample(**vars(text), **target)])
        return encoded

    def learned_classes(self, example: ClassExample) -> LearnedClasses:
        """Return the class of a text, or 0 or 1 for each class."""
        return [(None, [int(value) for value in example.values or example.class_ids])]

    def collate(
        self,
        examples: Sequence[ClassExample],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        packs: bool,
        draw: int,
    ) -> Batch:
        """Add `classes_R` [R] and optional `weights_R` [R]; or `values_RK` [R, K] for `many` classes or a number."""
        batch, _ = encoder_batch(examples, processor.pad_token_id, packs)
        kind = classify_section(recipe).kind
        if kind in ("multi", "regression"):
            values_RK = torch.tensor([list(example.values) for example in examples], dtype=torch.float32)
            return batch | {"values_RK": values_RK, "many": kind == "multi"}
        batch["classes_R"] = torch.tensor([example.class_ids[0] for example in examples])
        if any(len(example.weights) for example in examples):
            batch["weights_R"] = torch.tensor([example.weights[0] for example in examples])
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the loss over rows: cross entropy (single), mean binary cross entropy (multi), squared error (number).

        With `weights_R` each row's label is weighted in the sum, but counts once in the count.
        """
        number = "values_RK" in batch and not batch["many"]
        with in_own_dtype(model, batch["input_ids"].device.type) if number and not model.training else nullcontext():
            logits_RK = model(**model_inputs(model, batch)).logits.float()
        if "classes_R" in batch:
            losses_R = class_losses(logits_RK, batch["classes_R"], batch.get("weights_R", 1.0), batch.get("teacher"))
            correct_R = logits_RK.argmax(-1) == batch["classes_R"]
        elif logits_RK.shape[1] == batch["values_RK"].shape[1] and not number:
            targets_RK = batch["values_RK"]
            losses_R = yes_no_losses(logits_RK, targets_RK, batch.get("teacher"))
            correct_R = ((logits_RK > 0) == (targets_RK > 0.5)).all(-1)
        else:
            losses_R = (logits_RK[:, 0] - batch["values_RK"][:, 0]).square()
            correct_R = torch.zeros_like(losses_R, dtype=torch.bool)
        return loss_of_rows(losses_R, correct_R, by_row)

    def start_head(
        self, adapted: AdaptedModel, examples: Sequence[ClassExample], recipe: Recipe, *, whole: bool
    ) -> HeadStart | None:
        """Start a new head at a regression on the base's features; see `start_at_regression`."""
        section = classify_section(recipe)
        assert section.kind != "auto"
        return start_at_regression(adapted, examples, section.kind, len(section.labels or ()) or 1, recipe, whole=whole)

    def guessing_loss(self, config: PretrainedConfig, examples: Iterable[ClassExample], recipe: Recipe) -> float:
        """Return the variance of numeric labels."""
        if classify_section(recipe).kind != "regression":
            return super().guessing_loss(config, examples, recipe)
        return float(np.var([example.values[0] for example in examples]))

    def highlighted_text(
        self, example: ClassExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show a text with its class, classes or number."""
        section = classify_section(recipe)
        labels = section.labels or ()
        if example.class_ids:
            target = labels[example.class_ids[0]]
        elif section.kind == "multi":
            named = [name for name, value in zip(labels, example.values, strict=True) if value]
            target = format_label(named)
        else:
            target = format_label(float(example.values[0]))
        return [Segment(f"{decode_shortened(example.input_ids, processor)}\n", False), Segment(target, True)]

    def count_tokens(self, row: ClassifyRow, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int) -> int:
        """Return the tokens of the text with its pair, up to `limit`."""
        return len(tokenize_texts([row], processor, limit)[0].input_ids)

    def predict(self, rows: Sequence[ClassifyRow], loaded: LoadedModel) -> list[ClassPrediction]:
        """Return the label of each text, with the probabilities of classes, or the number."""
        section = classify_section(loaded.recipe)
        examples = tokenize_texts(rows, loaded.processor, loaded.recipe.data.max_length)

        def read(i: int, output: SequenceClassifierOutput, row: int) -> ClassPrediction:
            logits_K = output.logits[row].float()
            if section.kind == "regression":
                return {"label": label_of(logits_K, section), "scores": logits_K.tolist()}
            loaded.note_logits(i, [logits_K.tolist()])
            normalize = torch.sigmoid if section.kind == "multi" else partial(torch.softmax, dim=-1)
            scores_K = normalize(logits_K / loaded.temperature)
            return {"label": label_of(normalize(logits_K), section), "scores": scores_K.tolist()}

        pad_id = loaded.processor.pad_token_id
        with in_own_dtype(loaded.model, loaded.device) if section.kind == "regression" else nullcontext():
            return run_encoder(loaded.model, examples, pad_id, loaded.device, read, loaded.advance)

    def format_prediction(self, prediction: ClassPrediction) -> str:
        """Write the label."""
        return format_label(prediction["label"])

    def compute_metric(self, metric: str, output: EvalPrediction[ClassPrediction], recipe: Recipe) -> Measure | None:
        """Measure predicted classes or numbers."""
        section = classify_section(recipe)
        if section.kind == "auto" or metric not in CLASS_METRICS[section.kind]:
            return None
        targets = [as_target(label, section.kind) for label in output.references]
        return measure_classes(metric, section.kind, scores_of(output.predictions), targets, section.labels or ())

    def baseline(
        self, references: Sequence[Label], prompts: Sequence[ClassifyRow], recipe: Recipe
    ) -> tuple[str, list[ClassPrediction]]:
        """Predict the most frequent class of the training rows, or their mean, for every row."""
        section = classify_section(recipe)
        assert section.kind != "auto"
        labels = section.labels or ()
        usable = [label for label in references if not isinstance(class_target(label, section), str)]
        targets = [as_target(label, section.kind) for label in usable]  # rows with other labels were left out
        scores = majority_scores(targets, section.kind, labels, len(prompts))
        return BASELINES[section.kind], [{"label": label_of(row, section), "scores": row.tolist()} for row in scores]

    def frozen_features(self, rows: Sequence[ClassifyRow], loaded: LoadedModel) -> list[Floats]:
        """Return the base's vector of each text, and its pair, as its own pooling makes it."""
        return read_features(tokenize_texts(rows, loaded.processor, loaded.recipe.data.max_length), loaded)

    def predict_frozen(
        self,
        train: Sequence[ClassifyRow],
        prompts: Sequence[ClassifyRow],
        features: Sequence[Floats],
        recipe: Recipe,
    ) -> SimplePredictions | str:
        """Return the predictions of logistic regression on the base's features, or of ridge regression."""
        return self._as_predictions(fit_labels(train, prompts, classify_section(recipe), features), recipe)

    def predict_simply(
        self, train: Sequence[ClassifyRow], prompts: Sequence[ClassifyRow], recipe: Recipe
    ) -> SimplePredictions | str:
        """Return the predictions of TF-IDF with logistic regression, or with ridge regression for numbers."""
        return self._as_predictions(fit_labels(train, prompts, classify_section(recipe)), recipe)

    def _as_predictions(self, fitted: Fitted | str, recipe: Recipe) -> SimplePredictions | str:
        section = classify_section(recipe)
        if isinstance(fitted, str):
            return fitted
        predictions = [{"label": label_of(row, section), "scores": row.tolist()} for row in fitted.scores_AK]
        logits = [[row.tolist()] for row in logits_of(fitted.scores_AK, many=section.kind == "multi")]
        return SimplePredictions(predictions, fitted.note, logits if self.output_labels(recipe) else [])

    def as_prediction(self, reference: Label, recipe: Recipe) -> ClassPrediction | None:
        """Return the prediction that assigns all probability to the right classes; None for a number."""
        section = classify_section(recipe)
        if section.kind == "regression" or section.kind == "auto" or isinstance(class_target(reference, section), str):
            return None
        scores_1K = true_classes(section.kind, [as_target(reference, section.kind)], section.labels or ())
        return {"label": reference, "scores": scores_1K[0].astype(float).tolist()}

    def class_table(self, output: EvalPrediction[ClassPrediction], recipe: Recipe) -> dict[str, Any]:
        """Return the table of classes; with single labels, also the confusion matrix."""
        section = classify_section(recipe)
        if section.kind == "regression" or section.kind == "auto":
            return {}
        labels, scores = section.labels or (), scores_of(output.predictions)
        targets = [as_target(label, section.kind) for label in output.references]
        tables: dict[str, Any] = {"classes": class_table(section.kind, scores, targets, labels)}
        if section.kind == "single":
            tables["confusion"] = {"labels": list(labels), "counts": confusion(scores, targets, labels)}
        return tables

    def output_kind(self, recipe: Recipe) -> str:
        """Return the kind of the head's outputs."""
        return OUTPUT_KINDS.get(classify_section(recipe).kind, "choice")


def tokenize_texts(
    rows: Sequence[ClassifyRow], processor: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Example]:
    """Return the model inputs of each row's text (and its pair), cut to `max_length` tokens, row by row."""
    examples: dict[int, Example] = {}
    for paired in (False, True):
        numbers = [i for i, row in enumerate(rows) if bool(row.get("pair")) == paired]
        columns = [[rows[i]["text"] for i in numbers], *([[rows[i]["pair"] or "" for i in numbers]] if paired else [])]
        if numbers:
            for i, (ids, types) in zip(numbers, tokenize_columns(columns, processor, max_length), strict=True):
                examples[i] = Example(ids, [], 0, token_type_ids=types if any(types) else ())
    return [examples[i] for i in range(len(rows))]


def fitted_texts(
    rows: Sequence[ClassifyRow], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> Iterator[Example | str]:
    """Yield the model inputs of each row's text, cut if the recipe says so, or the reason why it has none."""
    limit = recipe.data.max_length
    for row, text in zip(rows, tokenize_texts(rows, processor), strict=True):
        if (size := len(text.input_ids)) <= limit:
            yield replace(text, counted=1)
        elif recipe.data.on_overlong != "truncate":
            yield too_long(size, limit)
        else:
            kept = tokenize_texts([row], processor, limit)[0]
            yield replace(kept, counted=1, lost=Lost(size - len(kept.input_ids)))


def label_of(scores_K: torch.Tensor | Floats, section: ClassifySection) -> Label:
    """Return the label of scores [K]: the most likely class, all above one half, or the number itself."""
    if section.kind == "regression":
        return float(scores_K[0])
    labels = section.labels or ()
    if section.kind == "multi":
        return [name for name, share in zip(labels, scores_K.tolist(), strict=True) if share > 0.5]
    return labels[int(scores_K.argmax())]


def classify_section(recipe: Recipe) -> ClassifySection:
    """Return the recipe's section, or its defaults."""
    return recipe.classify or ClassifySection()


def scores_of(predictions: Sequence[ClassPrediction]) -> Floats:
    """Return predicted scores as [N, K]."""
    return np.array([prediction["scores"] for prediction in predictions], dtype=np.float64)


VARIANTS = (Classify(),)
