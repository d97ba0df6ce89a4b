"""Score baselines without fine-tuning on the test rows: what tuning must beat to be worth its cost."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from llmtune.data.examples import ExampleReader
from llmtune.data.pictures import without_pictures
from llmtune.data.row_kind import write_prompt
from llmtune.data.row_store import read_rows
from llmtune.display.console import spinner
from llmtune.errors import RecipeError
from llmtune.evaluate.bm25 import BM25_NOTE
from llmtune.evaluate.eval_inputs import EvalContext, EvalInputs
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.inference import Answers, add_bar, compute_metrics, inference_on
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, paired_difference
from llmtune.evaluate.per_row_scores import PerRowScores
from llmtune.evaluate.regression import MOST_TEXTS, fit_tfidf, logits_of
from llmtune.evaluate.results import BaseAnswers, save_base
from llmtune.evaluate.token_batches import cut_evenly, over_processes
from llmtune.recipe.gate_grammar import SIMPLE_BASELINES
from llmtune.recipe.task_facts import CUT_METRIC, TASK_FACTS
from llmtune.recipe.task_variant import at_ten
from llmtune.records import Examples, Row, Rows
from llmtune.store.score_records import Evaluation, SimpleBaseline

SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”」』）]*|\n|$)", re.DOTALL)
LEAD = 3


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
        known = evaluation.simple_baselines | ({self.name: self.record} if self.record else {})
        noted = replace(evaluation, simple_baselines=known, signatures=signatures)
        return noted, replace(scores, simple={**scores.simple, self.name: self.measures})


@dataclass
class SimpleScorer:
    """Scores the task's simple baselines on the test rows."""

    context: EvalContext
    rows: Rows
    examples: Examples
    caches: Mapping[str, BaseAnswers]
    """By name: the answers of an earlier evaluation, if any. New ones are saved in the context's folder."""
    features: list[Floats] | str = ""
    """The base's features of the training rows, then of the prompts; the reason if it has none."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the recipe's metrics that the baselines have; none without baselines for these rows."""
        inputs, task, facts = self.context.inputs, self.context.task, TASK_FACTS[self.context.recipe.task]
        chooses = facts.simple_baselines[:1] == ("tfidf",)
        if inputs is None or (chooses and not task.predicts and not inputs.trees):
            return ()
        return tuple(metric for metric in inputs.metrics if at_ten(metric) in facts.baseline_metrics)

    @property
    def needs_base(self) -> bool:
        """Return whether `read_base` must be called before the tuned model is loaded: it may change the base."""
        names = TASK_FACTS[self.context.recipe.task].simple_baselines
        return "frozen" in names and bool(self.metrics) and self.caches["frozen"].answers is None

    def read_base(self, model: torch.nn.Module) -> None:
        """Read the base's features; all processes must call this."""
        context, inputs = self.context, self.context.inputs
        assert inputs is not None
        rows = [*self.training_rows(), *(inputs.questions[i] for i in inputs.answered)]
        try:
            with inference_on(model, context) as bars:
                advance = add_bar(bars, "frozen: texts", len(rows))
                loaded = LoadedModel(model, context.processor, context.recipe, context.device, advance)
                self.features = over_processes(model, rows, partial(context.task.frozen_features, loaded=loaded))
        except RecipeError as error:
            self.features = error.problems[0].what

    def score(self, tuned: Mapping[str, Measure]) -> Iterator[SimpleScores]:
        """Yield the scores of each baseline, compared with the tuned model's measures; only for a run with a folder.

        They learn from the training rows that the model was trained on, and from nothing else. A task, or the recipe's
        metrics, may have no such baseline.
        """
        names = TASK_FACTS[self.context.recipe.task].simple_baselines
        for name in names if self.context.folder is not None and self.metrics else ():
            one = self.score_one(name, tuned)
            if one is not None:
                yield one

    def score_one(self, name: str, tuned: Mapping[str, Measure]) -> SimpleScores | None:
        """Return one baseline's scores; None without measures."""
        context, recipe, task, inputs = self.context, self.context.recipe, self.context.task, self.context.inputs
        assert inputs is not None
        assert context.folder is not None
        metrics, cache, began = self.metrics, self.caches[name], time.monotonic()
        answers, note = cache.answers, cache.note
        if TASK_FACTS[recipe.task].searches:
            with spinner(context.console, f"ranking by {SIMPLE_BASELINES[name]}"):
                words = {one: task.measure_words(one, inputs.targets, inputs.corpus, recipe) for one in metrics}
            measures = {metric: one.in_clusters(inputs.clusters) for metric, one in words.items() if one is not None}
            note = BM25_NOTE
        else:
            if answers is None:
                with spinner(context.console, f"fitting {SIMPLE_BASELINES[name]}"):
                    answered = self.answer(name, inputs)
                if isinstance(answered, str):
                    return SimpleScores(name, None, {}, f"not measured: {answered}")
                answers, note = answered
            save_base(context.folder, answers, cache.inputs, name_file(name), note)
            section = recipe.evaluate.model_copy(update={"metrics": metrics})  # without metrics of the user's own
            reduced = recipe.model_copy(update={"evaluate": section})
            scored = replace(context, inputs=replace(inputs, metrics=metrics), recipe=reduced)
            measures = compute_metrics(scored, answers, answers)
            measures.pop(CUT_METRIC, None)
        if not measures:
            return None
        seconds = f"{time.monotonic() - began:.1f} s"
        source = "reusing its answers from an earlier evaluation" if cache.answers else seconds
        context.console.print(f"{name}: {note} ({source})", highlight=False, markup=False)
        return SimpleScores(name, self.compare(name, measures, tuned, note), measures, note)

    def compare(
        self, name: str, measures: Mapping[str, Measure], tuned: Mapping[str, Measure], note: str
    ) -> SimpleBaseline:
        """Return a baseline's scores on the rows that the tuned model answered too, and the differences."""
        title, recipe = SIMPLE_BASELINES[name], self.context.recipe
        if self.context.task.output_kind(recipe) == "number":
            title = title.replace("logistic", "ridge")
        pairs = {metric: on_shared_rows(one, tuned[metric]) for metric, one in measures.items() if metric in tuned}
        return SimpleBaseline(
            name=name,
            title=title,
            scores={metric: before.value for metric, (before, _) in pairs.items()},
            difference={metric: paired_difference(*pair, recipe.seed) for metric, pair in pairs.items()},
            tuned={metric: after.value for metric, (_, after) in pairs.items()},
            note=note,
        )

    def training_rows(self) -> list[Row]:
        """Return the rows that were learned, of many some that are spread evenly."""
        numbers = np.unique(ExampleReader(self.examples, "train").rows)
        return read_rows(self.rows, "train", numbers[[*cut_evenly(len(numbers), MOST_TEXTS)]].tolist())

    def answer(self, name: str, inputs: EvalInputs) -> tuple[Answers, str] | str:
        """Return the baseline's answers, with a note on how it was fitted; the reason if it cannot be fitted."""
        context = self.context
        if name == "lead3":
            texts = {i: lead(inputs.questions[i]["document"]) for i in inputs.answered}
            return Answers(None, texts, {}), f"{SIMPLE_BASELINES[name]} of each document"
        train = self.training_rows()
        if inputs.trees:
            return choose_simply(context, inputs, train)
        prompts, task = [inputs.questions[i] for i in inputs.answered], context.task
        if name != "frozen":
            predicted = task.predict_simply(train, prompts, context.recipe)
        elif isinstance(self.features, str):
            return self.features
        else:
            predicted = task.predict_frozen(train, prompts, self.features, context.recipe)
        if isinstance(predicted, str):
            return predicted
        predictions = dict(zip(inputs.answered, predicted.predictions, strict=True))
        texts = {i: task.format_prediction(one) for i, one in predictions.items()}
        logits = dict(zip(inputs.answered, predicted.logits, strict=False))
        return Answers(None, texts, {}, predictions, logits=logits), predicted.note


def name_file(name: str) -> str:
    """Return the name of the file with a simple baseline's answers."""
    return f"{name}.json"


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
