"""One model on the evaluation's inputs: losses of the references, predictions, likelihoods of the choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmtune.evaluate.eval_inputs import EvalContext, EvalInputs
from llmtune.evaluate.evaluated_task import EvaluatedTask, LoadedModel
from llmtune.evaluate.generation import generate_texts
from llmtune.evaluate.metric import Measure, measure_right
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.shared_prefix import most_likely, score_trees
from llmtune.evaluate.text_metrics import CHOICE_METRIC, TEXT_MEASURES, TOKEN_METRICS, measure_tokens
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, move_to, run_in_batches
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.memory_plan import context_length
from llmtune.records import Advance, Collate


@dataclass(frozen=True)
class TokenSums:
    """Sums over the supervised tokens of each of N rows."""

    nats: Floats
    correct: Floats
    tokens: Floats
    target_bytes: Floats


@dataclass(frozen=True)
class Answers:
    """What one model answered; keys are indexes into the evaluated rows."""

    sums: TokenSums | None
    texts: dict[int, str]
    """Answers as a person reads them."""
    scores: dict[int, list[float]]
    """Log-likelihood of each choice, nats."""
    predictions: dict[int, object] = field(default_factory=dict)
    """Answers as the task has them; of tasks whose answers are texts those are in `texts`."""

    def choice(self, row: int, choices: Sequence[str]) -> str:
        """Return the likeliest choice of a row, or an empty text where none was scored."""
        return most_likely(self.scores[row], choices) if row in self.scores else ""


def predict(model: torch.nn.Module, name: str, context: EvalContext, packs: bool | None = None) -> Answers:
    """Run one model on the inputs; sets it to evaluation mode.

    `packs` says whether rows stand end to end while losses are taken, as `SelectedModel` does.
    """
    inputs, task, recipe, device = context.inputs, context.task, context.recipe, context.device
    assert inputs is not None
    limit = context_limit(model)
    new_tokens = recipe.generation.max_new_tokens
    prompts = {i: ids for i, ids in inputs.prompt_ids.items() if len(ids) + new_tokens <= limit}
    trees = {i: tree for i, tree in inputs.trees.items() if tree.longest <= limit}
    with inference_on(model, context) as bars:
        sums = None
        if task.has_row_loss and any(metric in TOKEN_METRICS for metric in inputs.metrics):
            collate = task.collator(context.processor, recipe, packs)
            advance = add_bar(bars, f"{name}: loss", len(inputs.reader))
            sums = score_tokens(model, inputs, task, collate, device, advance, bool(packs))
        scores: list[list[float]] = []
        if trees:
            advance = add_bar(bars, f"{name}: choices", len(trees))
            scores = score_trees(model, list(trees.values()), device=device, advance=advance)
        if task.predicts:
            advance = add_bar(bars, f"{name}: answers", len(inputs.answered))
            rows = [inputs.questions[i] for i in inputs.answered]
            values = task.predict(rows, LoadedModel(model, context.processor, recipe, device, advance)) if rows else []
            predictions = dict(zip(inputs.answered, values, strict=True))
            return Answers(
                sums, {i: task.format_prediction(value) for i, value in predictions.items()}, {}, predictions
            )
        texts: list[str] = []
        if prompts:
            advance = add_bar(bars, f"{name}: answers", len(prompts))
            texts = generate_texts(
                model, list(prompts.values()), context.processor, recipe, device=device, advance=advance
            )
    return Answers(sums, dict(zip(prompts, texts, strict=True)), dict(zip(trees, scores, strict=True)))


def score_tokens(
    model: torch.nn.Module,
    inputs: EvalInputs,
    task: EvaluatedTask,
    collate: Collate,
    device: str,
    advance: Advance = lambda rows: None,
    packed: bool = False,
) -> TokenSums:
    """Add up loss and first choices over the supervised tokens of each row; examples of a split row count together.

    `packed` says that `collate` puts examples end to end, so that a batch costs the sum of their lengths.
    """
    reader = inputs.reader
    nats, correct = np.zeros(len(reader)), np.zeros(len(reader))

    def work(batch: list[int]) -> None:
        loss = task.loss(model, move_to(device, collate([reader[i] for i in batch], 0)), True)
        assert loss.row_sums is not None
        assert loss.row_correct is not None
        nats[batch] = loss.row_sums.double().cpu().numpy()
        correct[batch] = loss.row_correct.double().cpu().numpy()
        advance(len(batch))

    run_in_batches([int(n) for n in reader.lengths], budget_for(device, TOKEN_BUDGET), work, packed=packed)
    row_of = np.searchsorted(np.asarray(inputs.rows), np.asarray(reader.rows))

    def by_row(values: Floats) -> Floats:
        sums = np.bincount(row_of, weights=values, minlength=len(inputs.rows))
        return sums.astype(np.float64)

    supervised = np.asarray(reader.supervised, dtype=np.float64)
    target_bytes = np.asarray([reader[i].target_bytes for i in range(len(reader))], dtype=np.float64)
    return TokenSums(*map(by_row, (nats, correct, supervised, target_bytes)))


def measure(context: EvalContext, answers: Answers, base: Answers) -> dict[str, Measure]:
    """Turn answers into the metrics of the inputs; one without rows, or that means nothing here, is left out."""
    inputs, task = context.inputs, context.task
    assert inputs is not None
    measures: dict[str, Measure] = {}
    for metric in inputs.metrics:
        one = measure_by_task(metric, context, answers, base)
        if one is None and metric in TOKEN_METRICS:
            one = measure_sums(metric, context, answers.sums)
        elif one is None and not task.predicts:
            one = measure_answers(metric, inputs, answers)
        if one is not None and len(one.sums_NK):
            assert len(one.at) == len(one.sums_NK)
            measures[metric] = one
    return measures


def measure_by_task(metric: str, context: EvalContext, answers: Answers, base: Answers) -> Measure | None:
    """Return a metric as the task itself measures it; None where it leaves that to what is common."""
    inputs, task = context.inputs, context.task
    assert inputs is not None
    values: dict[int, object] = answers.predictions or {**answers.texts}
    if not values:
        return None
    others: dict[int, object] = base.predictions or {**base.texts}
    measured = task.compute_metric(
        metric,
        list(values.values()),
        [inputs.targets[i] for i in values],
        context.recipe,
        base=[others[i] for i in values] if all(i in others for i in values) else None,
    )
    return None if measured is None else replace(measured, at=tuple(values))


def measure_sums(metric: str, context: EvalContext, sums: TokenSums | None) -> Measure | None:
    """Return a metric of the supervised tokens; None where there are no sums for it."""
    if sums is None or (metric == "bits_per_byte" and not sums.target_bytes.any()):
        return None
    measured = measure_tokens(metric, sums.nats, sums.correct, sums.tokens, sums.target_bytes)
    if not context.task.predicts_tokens:
        measured = replace(measured, signature=task_signature(metric, context))
    return replace(measured, at=tuple(range(len(sums.nats))))


def measure_answers(metric: str, inputs: EvalInputs, answers: Answers) -> Measure:
    """Return a metric of the likeliest choices, or of generated texts."""
    if metric == CHOICE_METRIC:
        right = [answers.choice(i, inputs.choices) == inputs.references[i] for i in answers.scores]
        measured = measure_right(right, metric, "share of rows whose reference answer is the likeliest choice")
        return replace(measured, at=tuple(answers.scores))
    references = [inputs.references[i] for i in answers.texts]
    return replace(TEXT_MEASURES[metric](list(answers.texts.values()), references), at=tuple(answers.texts))


def task_signature(metric: str, context: EvalContext) -> str:
    """Describe what the loss of a task that does not guess tokens is a mean over."""
    if metric != "loss":
        return f"{metric} of what is predicted"
    classify = context.recipe.classify
    weighted = ", weighed by class_weights" if classify is not None and classify.class_weights is not None else ""
    return f"mean of the {context.task.name} loss over {context.task.loss_unit}{weighted}"


def context_limit(model: torch.nn.Module) -> int:
    """Return how many positions a model reads at most; a very large number where it names none."""
    return context_length(unwrap(model).config) or 1 << 60


@contextmanager
def inference_on(model: torch.nn.Module, context: EvalContext) -> Iterator[Progress]:
    """Set a model to evaluation mode, compute in the recipe's number format, and show progress bars."""
    model.eval()
    dtype = resolve_dtype(context.recipe.model.dtype, context.device)
    with torch.inference_mode(), compute_context(dtype, context.device), progress_bars(context.console) as bars:
        yield bars


def progress_bars(console: Console) -> Progress:
    """Return the progress bars of one model."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def add_bar(bars: Progress, name: str, total: int) -> Callable[[int], None]:
    """Add a bar and return what moves it."""
    bar = bars.add_task(name, total=total)
    return lambda rows: bars.advance(bar, rows)
