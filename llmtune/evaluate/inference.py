"""What one model has to say to a plan: losses of the references, generated texts, likelihoods of the choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmtune.evaluate.choice_likelihood import most_likely
from llmtune.evaluate.eval_inputs import Plan
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.generation import generate_texts
from llmtune.evaluate.metrics import (
    CHOICE_METRIC,
    TOKEN_METRICS,
    Measure,
    measure_right,
    measure_texts,
    measure_tokens,
)
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.shared_prefix import Tree, score_trees
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model import compute_context, resolve_dtype
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.records import Advance, Collate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.data.examples import ExampleReader
    from llmtune.recipe import Recipe


@dataclass(frozen=True)
class TokenSums:
    """Sums over the supervised tokens of each of N rows."""

    nats: Floats
    correct: Floats
    tokens: Floats
    target_bytes: Floats


@dataclass(frozen=True)
class Answers:
    """What one model said; keys are indexes into the rows of the plan."""

    sums: TokenSums | None
    texts: dict[int, str]
    """What it said, as a person reads it."""
    scores: dict[int, list[float]]
    """Log-likelihood of each choice, nats."""
    predictions: dict[int, Any] = field(default_factory=dict)
    """What it said, as the task has it; of tasks whose answers are texts those are in `texts`."""

    def choice(self, row: int, choices: Sequence[str]) -> str:
        """Return the likeliest choice of a row, or an empty text where none was scored."""
        return most_likely(self.scores[row], choices) if row in self.scores else ""


def answer(
    model: torch.nn.Module,
    name: str,
    plan: Plan,
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    console: Console,
    device: str,
    packs: bool | None = None,
) -> Answers:
    """Put all questions of `plan` to one model; sets it to evaluation mode.

    `packs` says whether rows stand end to end while losses are taken, as `SelectedModel` does.
    """
    model.eval()
    limit = context_length(unwrap(model).config) or 1 << 60
    prompts, trees = within(plan, limit, recipe.generation.max_new_tokens)
    dtype = resolve_dtype(recipe.model.dtype, device)
    with torch.inference_mode(), compute_context(dtype, device), progress(console) as bars:
        sums = None
        if task.has_row_loss and any(metric in TOKEN_METRICS for metric in plan.metrics):
            collate = task.collator(processor, recipe, packs)
            advance = count(bars, f"{name}: loss", len(plan.reader))
            sums = score_tokens(model, plan, task, collate, device, advance, bool(packs))
        scores: list[list[float]] = []
        if trees:
            advance = count(bars, f"{name}: choices", len(trees))
            budget = budget_for(device, TOKEN_BUDGET)
            scores = score_trees(model, list(trees.values()), device=device, budget=budget, advance=advance)
        if task.predicts:
            advance = count(bars, f"{name}: answers", len(plan.asked))
            asked = [plan.questions[i] for i in plan.asked]
            said = task.predict(model, asked, processor, recipe, device=device, advance=advance) if asked else []
            predictions = dict(zip(plan.asked, said, strict=True))
            return Answers(
                sums, {i: task.format_prediction(value) for i, value in predictions.items()}, {}, predictions
            )
        texts: list[str] = []
        if prompts:
            advance = count(bars, f"{name}: answers", len(prompts))
            texts = generate_texts(model, list(prompts.values()), processor, recipe, device=device, advance=advance)
    return Answers(sums, dict(zip(prompts, texts, strict=True)), dict(zip(trees, scores, strict=True)))


def within(plan: Plan, limit: int, new_tokens: int) -> tuple[dict[int, list[int]], dict[int, Tree]]:
    """Return the prompts and trees that fit into a model's context of `limit` positions."""
    prompts = {i: ids for i, ids in plan.prompt_ids.items() if len(ids) + new_tokens <= limit}
    trees = {i: tree for i, tree in plan.trees.items() if len(tree.prefix) + max(map(len, tree.branches)) <= limit}
    return prompts, trees


def score_tokens(
    model: torch.nn.Module,
    plan: Plan,
    task: EvaluatedTask,
    collate: Collate,
    device: str,
    advance: Advance = lambda rows: None,
    packed: bool = False,
) -> TokenSums:
    """Add up loss and first choices over the supervised tokens of each row; examples of a split row count together.

    `packed` says that `collate` puts examples end to end, so that a batch costs the sum of their lengths.
    """
    reader = plan.reader
    nats, correct = np.zeros(len(reader)), np.zeros(len(reader))

    def work(batch: list[int]) -> None:
        tensors = collate([reader[i] for i in batch], 0)
        loss = task.loss(model, {key: to_device(value, device) for key, value in tensors.items()}, True)
        assert loss.row_sums is not None
        assert loss.row_correct is not None
        nats[batch] = loss.row_sums.double().cpu().numpy()
        correct[batch] = loss.row_correct.double().cpu().numpy()
        advance(len(batch))

    run_in_batches([int(n) for n in reader.lengths], budget_for(device, TOKEN_BUDGET), work, packed=packed)
    return by_row(plan, nats, correct)


def by_row(plan: Plan, nats: Floats, correct: Floats) -> TokenSums:
    """Sum over the examples of each row."""
    reader = plan.reader
    place = np.searchsorted(np.asarray(plan.rows), np.asarray(reader.rows))

    def add_up(values: Any) -> Floats:
        sums = np.bincount(place, weights=np.asarray(values, dtype=np.float64), minlength=len(plan.rows))
        return sums.astype(np.float64)

    return TokenSums(add_up(nats), add_up(correct), add_up(reader.supervised), add_up(target_bytes(reader)))


def target_bytes(reader: ExampleReader) -> list[int]:
    """Return the bytes of each example's supervised text."""
    return [reader[i].target_bytes for i in range(len(reader))]


def to_device(value: Any, device: str) -> Any:
    """Move a tensor; leave numbers alone."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def measure(plan: Plan, answers: Answers, task: EvaluatedTask, recipe: Recipe, base: Answers) -> dict[str, Measure]:
    """Turn answers into the plan's metrics; one without rows, or that means nothing here, is left out."""
    measures: dict[str, Measure] = {}
    said, every = tuple(answers.predictions or answers.texts), tuple(range(len(plan.rows)))
    for metric in plan.metrics:
        own = _measure_own(metric, plan, answers, task, recipe, base)
        if own is not None:
            measures[metric] = replace(own, at=said)
        elif metric in TOKEN_METRICS:
            sums = answers.sums
            if sums is not None and (metric != "bits_per_byte" or sums.target_bytes.any()):
                found = measure_tokens(metric, sums.nats, sums.correct, sums.tokens, sums.target_bytes)
                told = found.signature if task.predicts_tokens else task_signature(metric, task, recipe)
                measures[metric] = replace(found, signature=told, at=every)
        elif task.predicts:
            continue
        elif metric == CHOICE_METRIC:
            right = [answers.choice(i, plan.choices) == plan.references[i] for i in answers.scores]
            found = measure_right(right, metric, "share of rows whose reference answer is the likeliest choice")
            measures[metric] = replace(found, at=tuple(answers.scores))
        else:
            references = [plan.references[i] for i in answers.texts]
            found = measure_texts(metric, list(answers.texts.values()), references)
            measures[metric] = replace(found, at=tuple(answers.texts))
    measures = {metric: found for metric, found in measures.items() if len(found.sums_NK)}
    assert all(len(found.at) == len(found.sums_NK) for found in measures.values())
    return measures


def _measure_own(
    metric: str, plan: Plan, answers: Answers, task: EvaluatedTask, recipe: Recipe, base: Answers
) -> Measure | None:
    """Return a metric as the task itself measures it; None where it leaves that to what is common."""
    said: dict[int, Any] = answers.predictions or answers.texts
    if not said:
        return None
    against = base.predictions or base.texts
    return task.compute_metric(
        metric,
        list(said.values()),
        [plan.targets[i] for i in said],
        recipe,
        base=[against[i] for i in said] if all(i in against for i in said) else None,
    )


def task_signature(metric: str, task: EvaluatedTask, recipe: Recipe) -> str:
    """Say what the loss of a task that does not guess tokens is a mean over."""
    if metric != "loss":
        return f"{metric} of what is predicted"
    weighted = recipe.classify is not None and recipe.classify.class_weights is not None
    return f"mean of the {task.name} loss over {task.loss_unit}{', weighed by class_weights' if weighted else ''}"


def progress(console: Console) -> Progress:
    """Return the bars of one model."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def count(bars: Progress, name: str, total: int) -> Callable[[int], None]:
    """Add a bar and return what moves it."""
    bar = bars.add_task(name, total=total)
    return lambda rows: bars.advance(bar, rows)
