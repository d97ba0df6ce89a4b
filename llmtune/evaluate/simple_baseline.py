"""Score a baseline without a language model on the test rows: what tuning must beat to be worth its cost."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from llmtune.data.examples import ExampleReader
from llmtune.data.pictures import without_pictures
from llmtune.data.row_kind import write_prompt
from llmtune.data.row_store import read_rows
from llmtune.display.console import spinner
from llmtune.evaluate.bm25 import BM25_NOTE
from llmtune.evaluate.eval_inputs import EvalContext, EvalInputs
from llmtune.evaluate.inference import Answers, compute_metrics
from llmtune.evaluate.metric import Measure, paired_difference
from llmtune.evaluate.per_row_scores import PerRowScores
from llmtune.evaluate.results import SIMPLE, BaseAnswers, save_base
from llmtune.evaluate.tfidf import MOST_TEXTS, fit_tfidf, logits_of
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.recipe.gate_grammar import SIMPLE_BASELINES
from llmtune.recipe.task_facts import CUT_METRIC, TASK_FACTS, at_ten
from llmtune.records import Examples, Row, Rows
from llmtune.store.score_records import Evaluation, SimpleBaseline

SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”」』）]*|\n|$)", re.DOTALL)
LEAD = 3
RIDGE = "TF-IDF with ridge regression"


@dataclass(frozen=True)
class SimpleScores:
    """The scores of a simple baseline."""

    name: str
    record: SimpleBaseline | None
    """None if it could not be fitted."""
    measures: Mapping[str, Measure]
    note: str
    """What was fitted, or why nothing was."""

    def add_to(self, evaluation: Evaluation, scores: PerRowScores) -> tuple[Evaluation, PerRowScores]:
        """Return an evaluation and its scores by row with those of the baseline."""
        signatures = evaluation.signatures | {self.name: self.note}
        noted = replace(evaluation, simple_baseline=self.record, signatures=signatures)
        return noted, replace(scores, simple=self.measures)


def score_simple_baseline(
    context: EvalContext, rows: Rows, examples: Examples, cache: BaseAnswers, tuned: Mapping[str, Measure]
) -> SimpleScores | None:
    """Score the task's simple baseline on the rows of `context`, and compare it with the tuned model's measures.

    It learns from the training rows that the model was trained on, and from nothing else. `cache` has the answers of an
    earlier evaluation, if any; new ones are saved in the context's folder. None if the task, or the recipe's metrics,
    have no such baseline.
    """
    inputs, recipe, task = context.inputs, context.recipe, context.task
    facts = TASK_FACTS[recipe.task]
    name = facts.simple_baseline
    if inputs is None or not name:
        return None
    metrics = tuple(metric for metric in inputs.metrics if at_ten(metric) in facts.baseline_metrics)
    if not metrics or (name == "tfidf" and not task.predicts and not inputs.trees):
        return None
    began, answers = time.monotonic(), cache.answers
    if facts.searches:
        with spinner(context.console, f"ranking by {SIMPLE_BASELINES[name]}"):
            by_words = {metric: task.measure_words(metric, inputs.targets, inputs.corpus, recipe) for metric in metrics}
        measures = {metric: one.in_clusters(inputs.clusters) for metric, one in by_words.items() if one is not None}
        note = BM25_NOTE
    else:
        with spinner(context.console, f"fitting {SIMPLE_BASELINES[name]}"):
            answered = (answers, cache.note) if answers is not None else answer_simply(context, inputs, rows, examples)
        if isinstance(answered, str):
            return SimpleScores(name, None, {}, f"not measured: {answered}")
        answers, note = answered
        if context.folder is not None:
            save_base(context.folder, answers, cache.inputs, SIMPLE, note)
        section = recipe.evaluate.model_copy(update={"metrics": metrics})  # without metrics of the user's own
        reduced = recipe.model_copy(update={"evaluate": section})
        scored = replace(context, inputs=replace(inputs, metrics=metrics), recipe=reduced)
        measures = compute_metrics(scored, answers, answers)
        measures.pop(CUT_METRIC, None)
    if not measures:
        return None
    source = "reusing its answers from an earlier evaluation" if cache.answers else f"{time.monotonic() - began:.1f} s"
    context.console.print(f"{name}: {note} ({source})", highlight=False, markup=False)
    title = RIDGE if name == "tfidf" and task.output_kind(recipe) == "number" else SIMPLE_BASELINES[name]
    pairs = {metric: on_shared_rows(one, tuned[metric]) for metric, one in measures.items() if metric in tuned}
    record = SimpleBaseline(
        name=name,
        title=title,
        scores={metric: before.value for metric, (before, _) in pairs.items()},
        difference={metric: paired_difference(*pair, recipe.seed) for metric, pair in pairs.items()},
        tuned={metric: after.value for metric, (_, after) in pairs.items()},
        note=note,
    )
    return SimpleScores(name, record, measures, note)


def answer_simply(
    context: EvalContext, inputs: EvalInputs, rows: Rows, examples: Examples
) -> tuple[Answers, str] | str:
    """Return the baseline's answers, with a note on how it was fitted; the reason instead if it cannot be fitted."""
    if TASK_FACTS[context.recipe.task].simple_baseline == "lead3":
        texts = {i: lead(inputs.questions[i]["document"]) for i in inputs.answered}
        return Answers(None, texts, {}), f"{SIMPLE_BASELINES['lead3']} of each document"
    numbers = np.unique(ExampleReader(examples, "train").rows)
    train = read_rows(rows, "train", numbers[[*cut_evenly(len(numbers), MOST_TEXTS)]].tolist())
    if inputs.trees:
        return choose_simply(context, inputs, train)
    prompts = [inputs.questions[i] for i in inputs.answered]
    predicted = context.task.predict_simply(train, prompts, context.recipe)
    if isinstance(predicted, str):
        return predicted
    predictions = dict(zip(inputs.answered, predicted.predictions, strict=True))
    texts = {i: context.task.format_prediction(one) for i, one in predictions.items()}
    logits = dict(zip(inputs.answered, predicted.logits, strict=False))
    return Answers(None, texts, {}, predictions, logits=logits), predicted.note


def baseline_text(question: Row) -> str:
    """Return the text of a prompt, without the names of pictures."""
    return write_prompt(without_pictures(question))


def choose_simply(context: EvalContext, inputs: EvalInputs, train: Sequence[Row]) -> tuple[Answers, str] | str:
    """Predict which of `evaluate.choices` answers a prompt, from the training rows that one of them answers."""
    numbers = {choice: number for number, choice in enumerate(inputs.choices)}
    pairs = [context.task.split_answer(row) for row in train]
    usable = [(baseline_text(question), numbers[answer]) for question, answer in pairs if answer in numbers]
    if not usable:
        return "no training row is answered with one of evaluate.choices"
    texts, targets = zip(*usable, strict=True)
    queries = [baseline_text(inputs.questions[i]) for i in inputs.trees]
    fitted = fit_tfidf("single", texts, np.array(targets), len(inputs.choices), queries)
    if isinstance(fitted, str):
        return fitted
    scores = logits_of(fitted.scores_AK, many=False).tolist()
    return Answers(None, {}, dict(zip(inputs.trees, scores, strict=True))), fitted.note


def lead(document: str) -> str:
    """Return the first three sentences of a text."""
    sentences = (sentence.strip() for sentence in SENTENCE.findall(document))
    return " ".join(islice(filter(None, sentences), LEAD))


def on_shared_rows(first: Measure, second: Measure) -> tuple[Measure, Measure]:
    """Return two measures on the rows that both have: a model answers no prompt that exceeds its context."""
    shared = {*first.at} & {*second.at}
    return first.subset(shared), second.subset(shared)
