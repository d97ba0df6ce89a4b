"""Likely label errors: rows whose label is unlikely by a model that did not see it, by confident learning (cleanlab).

A logistic regression predicts the label of each text, or the tag of each word, from the model's hidden states. It is
fitted on four fifths of the rows and predicts the others, five times. Northcutt, Jiang and Chuang, "Confident Learning:
Estimating Uncertainty in Dataset Labels", 2021. Shapes: N labels, Q questions
to a label (one per class if a row has several), D features.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from transformers.modeling_outputs import BaseModelOutput

from llmtune.data.example import Example
from llmtune.data.examples import ExampleReader
from llmtune.data.row_kind import write_prompt
from llmtune.data.row_store import iterate_groups, iterate_rows, iterate_texts
from llmtune.display.console import spinner
from llmtune.errors import RecipeError, read_origin
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.evaluated_task import EvaluatedTask, LearnedClasses
from llmtune.evaluate.inference import add_bar, inference_on
from llmtune.evaluate.source_labels import unchecked_sentence
from llmtune.evaluate.suites import Suite
from llmtune.evaluate.token_batches import over_processes, run_encoder
from llmtune.model.causal_lm_loss import unwrap
from llmtune.recipe.extras import require_extra
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import SPLITS, Advance, Examples, Rows
from llmtune.store.atomic_files import explained, write_json, write_text
from llmtune.store.report_record import LABELS_BY_SOURCE, SUSPECTS, UNCHECKED

KEY = "evaluate.suspects"
FOLDS = 5
FEW_GROUPS = 2 * FOLDS
"""With as many groups, a class is in two random folds or more but for one case in two million."""
STRENGTH, MOST_STEPS = 0.01, 1000
"""`C` and `max_iter` of the logistic regression, on standardised features."""
Features = npt.NDArray[np.float32]
ClassNumbers = npt.NDArray[np.int64]
LoadModel = Callable[[], AbstractContextManager[torch.nn.Module]]
Error = tuple[int | None, str, str, float]
"""Position of the word, given label, suggested label, probability of the given label."""


@dataclass(frozen=True)
class Suspect:
    """A label that is likely wrong."""

    file: str
    line: int | None
    """None in formats without lines."""
    row: int | None
    """Number of the row, if it is not the line."""
    split: str
    given: str
    suggested: str
    """The most likely label."""
    score: float
    """Probability of the given label by a regression that did not see it: the lower, the more suspicious."""
    text: str
    word: str | None
    """For a tag, its word."""
    position: int | None
    """For a tag, the number of its word in the row, from 0."""


@dataclass(frozen=True)
class Labelled:
    """N labels with the features of their texts or words."""

    features_ND: Features  # noqa: N815
    targets_NQ: ClassNumbers  # noqa: N815
    groups_N: ClassNumbers  # noqa: N815
    """Equal for labels that must be in one fold: the words of a row, and rows of one `data.split_by` value."""
    places: Sequence[tuple[str, int, int | None]]
    """[N] split, number of the row, and for a tag the position of its word."""


class LabelErrorSuite(Suite):
    """Labels that are likely wrong; `save_suspects` looks for them."""

    key = "suspects"

    @classmethod
    def read(cls, recipe: Recipe) -> None:
        """Refuse recipes without labels. Raises as `require_labels` does."""
        require_labels(recipe)

    @classmethod
    def try_out(cls, recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
        """Refuse recipes whose labels turned out to be numbers."""
        require_labels(recipe)


def require_labels(recipe: Recipe) -> None:
    """Raise RecipeError if a recipe has no classes or tags, as far as known, or EnvironmentProblem without cleanlab."""
    numbers = (recipe.task_section() or {}).get("kind") == "regression"
    if numbers or TASK_FACTS[recipe.task].answer_kind not in ("labels", "tags"):
        what = "the labels are numbers" if numbers else f"the task is {recipe.task}"
        raise RecipeError.of(f"{what}, and only classes and tags can be checked", KEY, "Remove it.")
    require_extra("labels", KEY)


def save_suspects(load: LoadModel, context: EvalContext, rows: Rows, examples: Examples) -> None:
    """Write the labels that are likely wrong to the context's folder, if the recipe asks for them.

    Processes share the rows. Only the first has a folder.
    """
    if context.recipe.evaluate.suspects:
        suspects, unchecked = find_suspects(load, context, rows, examples)
        if context.folder is not None:
            write_suspects(suspects, context.folder / SUSPECTS)
            write_json(context.folder / UNCHECKED, unchecked)
            write_json(context.folder / LABELS_BY_SOURCE, count_labels(rows, examples, context.task))


def count_labels(rows: Rows, examples: Examples, task: EvaluatedTask) -> dict[str, int]:
    """Return the number of labels (of tags: of words) in each source file."""
    counts = Counter[str]()
    for split in (split for split in SPLITS if examples.counts.get(split)):
        files = [read_origin(origin)[0] for origin, _ in iterate_texts(rows, split)]
        reader = ExampleReader(examples, split, task.example_type)
        for number, example in zip(reader.rows.tolist(), reader, strict=True):
            counts[files[number]] += len(task.learned_classes(example))
    return dict(counts)


def find_suspects(
    load: LoadModel, context: EvalContext, rows: Rows, examples: Examples
) -> tuple[list[Suspect], dict[str, int]]:
    """Return the labels of all splits that are likely wrong by the features of a model, the most suspicious first.

    Also returns the classes that cannot be checked (`find_errors`), with the number of their labels, and prints them.
    """
    with load() as model:
        names = [name for _, name in sorted(unwrap(model).config.id2label.items())]
        labelled = read_labels(model, context, rows, examples)
    multi = labelled.targets_NQ.shape[1] > 1
    questions = [[f"not {name}", name] for name in names] if multi else [names]
    errors_by_row, unchecked = defaultdict[tuple[str, int], list[Error]](list), dict[str, int]()
    for targets_N, classes in zip(labelled.targets_NQ.T, questions, strict=True):
        with spinner(context.console, f"suspects: {len(targets_N):,} labels"):
            errors, alone = find_errors(labelled.features_ND, targets_N, labelled.groups_N, context.recipe.seed)
        unchecked |= {classes[number]: labels for number, labels in alone.items()}
        for n, best, share in errors:
            split, row, position = labelled.places[n]
            errors_by_row[split, row].append((position, classes[targets_N[n]], classes[best], share))
    if unchecked:
        context.console.print(unchecked_sentence(unchecked), style="yellow", highlight=False, markup=False)
    return sorted(add_texts(errors_by_row, rows, context.task), key=lambda one: one.score), unchecked


def read_labels(model: torch.nn.Module, context: EvalContext, rows: Rows, examples: Examples) -> Labelled:
    """Return the labels of all splits. Features are last hidden states: of a word's first token, or a text's mean."""
    features, targets, groups, places = (
        list[Features](),
        list[list[int]](),
        list[int](),
        list[tuple[str, int, int | None]](),
    )
    backbone, pad_id, task = unwrap(model).base_model, context.processor.pad_token_id, context.task
    for split in (split for split in SPLITS if examples.counts.get(split)):
        reader, clusters = ExampleReader(examples, split, task.example_type), [*iterate_groups(rows, split)]
        encoded = [(example, task.learned_classes(example)) for example in reader]
        with inference_on(model, context) as bars:
            advance = add_bar(bars, f"suspects: {split}", len(encoded))
            work = partial(encode_states, backbone, pad_id=pad_id, device=context.device, advance=advance)
            features += over_processes(model, encoded, work)
        for number, (_, classes) in zip(reader.rows.tolist(), encoded, strict=True):
            group = clusters[number] if clusters else len(places)
            groups += [group] * len(classes)
            for word, (token, numbers) in enumerate(classes):
                targets.append(numbers)
                places.append((split, number, None if token is None else word))
    return Labelled(np.concatenate(features), np.array(targets), np.array(groups), places)


def encode_states(
    backbone: torch.nn.Module,
    encoded: Sequence[tuple[Example, LearnedClasses]],
    *,
    pad_id: int | None,
    device: str,
    advance: Advance,
) -> list[Features]:
    """Return the features of each example: [words, D], or [1, D] for a text."""

    def pool(at: int, output: BaseModelOutput, row: int) -> Features:
        example, classes = encoded[at]
        hidden_TD = output.last_hidden_state[row, : len(example.input_ids)].float()
        marked = [token for token, _ in classes if token is not None]
        pooled: Features = (hidden_TD[marked] if marked else hidden_TD.mean(0, keepdim=True)).cpu().numpy()
        return pooled

    return run_encoder(backbone, [example for example, _ in encoded], pad_id, device, pool, advance)


def find_errors(
    features_ND: Features, targets_N: ClassNumbers, groups_N: ClassNumbers, seed: int
) -> tuple[list[tuple[int, int, float]], dict[int, int]]:
    """Return the likely errors, and the classes that cannot be checked with the number of their labels.

    An error is its number, its most likely class, and the probability of the given class. A class whose labels are all
    in one fold cannot be checked: a regression without that fold never saw the class, and gives it no probability.
    """
    from cleanlab.filter import find_label_issues  # late: an extra
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kept_N, folds = divide_rows(targets_N, groups_N, seed)
    numbers, counts = np.unique(np.delete(targets_N, kept_N), return_counts=True)
    alone = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    if not folds:
        return [], alone
    classes_K, labels_N = np.unique(targets_N[kept_N], return_inverse=True)
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=MOST_STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cleanlab's, on classes with few labels
        shares_NK = cross_val_predict(regression, features_ND[kept_N], labels_N, cv=folds, method="predict_proba")
        issues = find_label_issues(labels_N, shares_NK, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [
        (int(kept_N[n]), int(classes_K[shares_NK[n].argmax()]), float(shares_NK[n, labels_N[n]]))
        for n in issues.tolist()
    ], alone


def divide_rows(
    targets_N: ClassNumbers, groups_N: ClassNumbers, seed: int
) -> tuple[ClassNumbers, list[tuple[ClassNumbers, ClassNumbers]]]:
    """Return the labels to check and their folds, as pairs of training and test rows; no folds with nothing to check.

    Each class of the labels is in two folds or more: others are left out. Folds balance the classes if some have few
    groups, which takes longer.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    kept_N, groups_N = np.arange(len(targets_N)), np.unique(groups_N, return_inverse=True)[1]
    while True:
        classes_K, labels_N = np.unique(targets_N[kept_N], return_inverse=True)
        pairs = np.unique(np.stack([labels_N, groups_N[kept_N]]), axis=1)
        groups_K = np.bincount(pairs[0], minlength=len(classes_K))
        size = min(FOLDS, int(groups_K.max(initial=0)), len(np.unique(pairs[1])))
        if len(classes_K) < 2 or size < 2:
            return kept_N[:0] if (groups_K < 2).any() and len(classes_K) > 1 else kept_N, []
        kind = StratifiedGroupKFold if groups_K.min() < FEW_GROUPS else GroupKFold
        splitter = kind(size, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class has fewer labels than folds
            folds = [*splitter.split(kept_N, labels_N, groups_N[kept_N])]
        seen_K = sum(np.bincount(labels_N[test], minlength=len(classes_K)) > 0 for _, test in folds)
        if (np.asarray(seen_K) > 1).all():
            return kept_N, folds
        kept_N = kept_N[np.asarray(seen_K)[labels_N] > 1]


def add_texts(
    errors_by_row: Mapping[tuple[str, int], Sequence[Error]], rows: Rows, task: EvaluatedTask
) -> Iterator[Suspect]:
    """Yield the errors, by split and number of their row, with place and text."""
    for split in SPLITS:
        for number, (origin, row) in enumerate(iterate_rows(rows, split)):
            place, words = read_origin(origin), task.words(row)
            for position, given, suggested, share in errors_by_row.get((split, number), ()):
                word = None if words is None or position is None else words[position]
                yield Suspect(*place, split, given, suggested, share, write_prompt(row), word, position)


def write_suspects(suspects: Sequence[Suspect], path: Path, delimiter: str = ",") -> None:
    """Write the list as JSON lines, or if the name ends with .csv as Excel opens it: with a byte order mark.

    With semicolons as the `delimiter`, scores have decimal commas.
    """
    lines, text = [asdict(one) for one in suspects], io.StringIO()
    if path.suffix == ".csv":
        text.write("\ufeff")
        writer = csv.DictWriter(text, [field.name for field in fields(Suspect)], delimiter=delimiter)
        writer.writeheader()
        comma = "," if delimiter == ";" else "."
        writer.writerows({**line, "score": str(line["score"]).replace(".", comma)} for line in lines)
    else:
        text.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with explained(path):
        write_text(path, text.getvalue())
