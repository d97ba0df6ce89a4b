"""Swap words for groups in the user's test rows: a fair model's answer does not change with the group."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from llmtune.data.row_kind import kind_of_row, write_prompt
from llmtune.errors import DataError, Problem
from llmtune.evaluate.eval_inputs import EvalContext, EvalInputs
from llmtune.evaluate.inference import predict
from llmtune.evaluate.metric import Measure, PairedMeasures, measure_right
from llmtune.evaluate.shared_prefix import choice_trees
from llmtune.evaluate.slices import name_values
from llmtune.evaluate.suites.eval_suite import OWN_FILES, EvalSuite, read_sources, read_utf8
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.recipe.eval_suites_section import OWN
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import FEWEST_ROWS, Row
from llmtune.store.score_records import StudyTable

FIX = "Write two different words per line: woman,man"
MOVED = 0.1
"""In standard deviations of the reference numbers: a prediction that moves by more has changed."""
METRIC = "swap_changes"
NO_ANSWERS = "no test row has a prompt, a mask or a pair whose answer could change"
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
LIMITS = (
    "Swaps cover only words for groups, not names or hints. Answers that change rightly count too. Borderline "
    "answers change with any word, whatever it means."
)
SwapAnswers = dict[int, tuple[object, object]]
"""By index of the evaluated row, its answers to the original and the swapped row."""


@dataclass(frozen=True)
class Swaps:
    """Pairs of words; a word with several partners is ambiguous in that direction."""

    partners: Mapping[str, Sequence[str]]
    """By lowercase word."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Regex for the words as complete words, longest first."""
        words = sorted(self.partners, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)

    def is_ambiguous(self, word: str) -> bool:
        """Whether a word has several partners."""
        return len(self.partners[word.lower()]) > 1

    def swap(self, text: str) -> str:
        """Replace each word by its partner; ambiguous ones stay."""

        def partner(match: re.Match[str]) -> str:
            return match[0] if self.is_ambiguous(match[0]) else in_case_of(match[0], self.partners[match[0].lower()][0])

        return self.pattern.sub(partner, text)

    def is_swapped(self, before: str, after: str) -> bool:
        """Whether `after` is `before` with every word swapped; an ambiguous word may become any of its partners."""
        parts, end = [], 0
        for match in self.pattern.finditer(before):
            partners = [re.escape(in_case_of(match[0], one)) for one in self.partners[match[0].lower()]]
            parts.append(re.escape(before[end : match.start()]) + f"(?:{'|'.join(partners)})")
            end = match.end()
        return re.fullmatch("".join(parts) + re.escape(before[end:]), after) is not None

    def swap_row(self, row: Row) -> tuple[Row, list[str]]:
        """Return a row with the words swapped in all its inputs, and the words."""
        words: list[str] = []

        def swap(value: object) -> object:
            if isinstance(value, str):
                words.extend(self.pattern.findall(value))
                return self.swap(value)
            if isinstance(value, list):
                return [swap(part) for part in value]
            if isinstance(value, dict) and "text" in value:
                return {**value, "text": swap(value["text"])}
            return value

        return kind_of_row(row).map_texts(row, swap), words


def in_case_of(model: str, word: str) -> str:
    """Write `word` in the case of `model`: HE, He or he."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def read_swaps(sources: Sequence[str]) -> Swaps:
    """Read pairs of words; each source is `own` or a two-column CSV file.

    Raises DataError for files that cannot be read or used, with all bad lines.
    """
    partners: dict[str, list[str]] = {}
    for pair in read_sources(sources, read_pairs_of_words, "pair of words", FIX):
        for word, partner in (pair, pair[::-1]):
            word_partners = partners.setdefault(word.lower(), [])
            if partner.lower() not in map(str.lower, word_partners):
                word_partners.append(partner)
    return Swaps(partners)


def read_pairs_of_words(source: str) -> list[tuple[str, str] | Problem]:
    """Read the pairs of one CSV file, with a Problem for each bad line."""
    path = Path(str(OWN_FILES.joinpath("groups/swaps.csv"))) if source == OWN else Path(source)
    reader = csv.reader(io.StringIO(read_utf8(path, "Correct evaluate.fairness.swaps.")))
    items: list[tuple[str, str] | Problem] = []
    try:
        for cells in reader:
            words = [cell.strip() for cell in cells]
            if not any(words):
                continue
            if len(words) == 2 and all(words) and words[0].lower() != words[1].lower():
                items.append((words[0], words[1]))
            else:
                where = f"{path.name}:{reader.line_num}"
                items.append(Problem(f"not two different words: {', '.join(cells)!r:.60}", where, FIX))
    except csv.Error as error:
        raise DataError.of(f"not valid CSV: {error}", f"{path.name}:{reader.line_num}") from error
    return items


class SwapSuite(EvalSuite[SwapAnswers]):
    """Answer test rows as they are and with words swapped, in one batched run to minimize rounding differences."""

    key, part = "fairness", "swaps"
    metrics: ClassVar = {METRIC: ("rows whose answer changes when only the group is swapped", -1)}
    fewest_rows = FEWEST_ROWS
    inputs: EvalInputs
    """The test rows."""
    rows: dict[int, Row]
    """By index among them, the swapped versions of the rows to answer."""
    swap_context: EvalContext
    """Its rows are the original ones, then the same rows swapped."""
    how: str
    """How many rows are answered, why others are not, and how answers are compared."""

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.swaps = self.read(context.recipe)
        self.unmeasured = self.prepare()

    def prepare(self) -> str:
        """Choose and encode the rows to answer; return why nothing can be measured, or an empty text."""
        if self.context.inputs is None:
            return "not measured: no test rows"
        self.inputs = self.context.inputs
        if reason := TASK_FACTS[self.context.recipe.task].unswapped:
            return f"not measured: {reason}"
        self.rows, counts = self.swap_rows()
        if not counts:
            return f"not measured: {NO_ANSWERS}"
        self.swap_context = self.make_inputs()
        self.answers, compared = self.find_kind()
        ambiguous = f", {counts['ambiguous']} with an ambiguous one" if counts["ambiguous"] else ""
        self.how = f"{len(self.rows)} test rows ({counts['without']} without any of the words{ambiguous}): {compared}"
        return "" if self.rows else f"not measured on {self.how}"

    @classmethod
    def read(cls, recipe: Recipe) -> Swaps:
        """Read the words. Raises DataError if that fails."""
        assert recipe.evaluate.fairness is not None
        return read_swaps(recipe.evaluate.fairness.swaps)

    def swap_rows(self) -> tuple[dict[int, Row], Counter[str]]:
        """Return the test rows to answer, swapped, and how many there are of each kind."""
        context, task, recipe = self.context, self.context.task, self.context.recipe
        rows: dict[int, Row] = {}
        counts: Counter[str] = Counter()
        for i, question in enumerate(self.inputs.questions):
            if not (context.task.can_answer(question, context.processor) and write_prompt(question)):
                continue
            row, words = self.swaps.swap_row(question)
            ambiguous = any(map(self.swaps.is_ambiguous, words))
            kind = "ambiguous" if ambiguous else "swapped" if words else "without"
            counts[kind] += 1
            if kind == "swapped":
                rows[i] = row
        if TASK_FACTS[recipe.task].generates and not self.inputs.trees:
            every = list(rows)
            rows = {every[at]: rows[every[at]] for at in cut_evenly(len(every), recipe.evaluate.limit)}
        if task.rates_answers:
            rows = {
                i: row
                for i, row in rows.items()
                if not isinstance(task.encode([row], context.processor, recipe)[0], str)
            }
        return rows, counts

    def make_inputs(self) -> EvalContext:
        """Return the inputs for both versions of the rows; `rows` keeps only those whose choices fit."""
        inputs, task, processor, recipe = self.inputs, self.context.task, self.context.processor, self.context.recipe
        trees = []
        if inputs.trees:
            self.rows = {i: row for i, row in self.rows.items() if i in inputs.trees}
            grown = choice_trees([*self.rows.values()], inputs.choices, task, processor, recipe)
            swapped = {i: tree for i, tree in zip(self.rows, grown, strict=True) if tree is not None}
            self.rows = {i: self.rows[i] for i in swapped}
            trees = [*(inputs.trees[i] for i in swapped), *swapped.values()]
        questions = [*(inputs.questions[i] for i in self.rows), *self.rows.values()]
        written = [] if task.predicts or inputs.trees else questions
        both = replace(
            inputs,
            questions=tuple(questions),
            answered=tuple(range(len(questions))),
            generation_prompts={i: [task.prompt(question, processor, recipe)] for i, question in enumerate(written)},
            turns={},
            trees=dict(enumerate(trees)),
            metrics=(),
        )
        return replace(self.context, inputs=both, recipe=greedy(recipe))

    def find_kind(self) -> tuple[AnswerKind, str]:
        """Return the kind of answers, which defines when two of them differ, and a description of the comparison."""
        inputs, recipe = self.inputs, self.context.recipe
        if inputs.trees:
            compared = f"the most likely of {len(inputs.choices)} answers compared"
            return AnswerKind(self.swaps, labels=inputs.choices), compared
        if not self.context.task.predicts:
            return AnswerKind(self.swaps), "answers compared, generated greedily"
        numbers = [value for value in inputs.targets if isinstance(value, float)]
        tolerance = MOVED * statistics.pstdev(numbers) if len(numbers) == len(inputs.targets) and numbers else 0.0
        labels = recipe.classes if TASK_FACTS[recipe.task].answer_kind == "labels" else ()
        compared = f"predictions compared, numbers by {tolerance:.3g}" if tolerance else "predictions compared"
        return AnswerKind(self.swaps, tolerance, labels), compared

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Answer the rows with one model; skip those that exceed its context in either version."""
        if self.unmeasured:
            return
        predicted = predict(model, f"{name}: fairness, swaps", self.swap_context)
        choices = {i: predicted.choice(i, self.inputs.choices) for i in predicted.scores}
        answers: Mapping[int, object] = predicted.predictions or choices or predicted.texts
        pairs = ((row, at, at + len(self.rows)) for at, row in enumerate(self.rows))
        self.outputs[name] = {
            row: (answers[at], answers[swapped]) for row, at, swapped in pairs if at in answers and swapped in answers
        }
        if not self.outputs[name]:
            self.unmeasured = "not measured: prompts and answers exceed the model's context"

    def measure(self, output: SwapAnswers) -> Iterator[Measure]:
        """Measure the share of rows whose answer changes."""
        changed = [self.answers.differ(*pair) for pair in output.values()]
        yield measure_right(changed, METRIC, f"{len(output)} of {self.how}")

    def limits(self) -> str:
        """Describe what the numbers can show."""
        return LIMITS

    def tables(self, measured: PairedMeasures) -> Iterator[StudyTable]:
        """Show a few rows whose answer changes in the tuned model."""
        base, tuned = self.outputs.get("base"), self.outputs["tuned"]
        rows = [i for i, pair in tuned.items() if self.answers.differ(*pair)]
        cells = []
        for i in (rows[at] for at in cut_evenly(len(rows), self.context.recipe.evaluate.samples)):
            words = dict.fromkeys(self.swaps.swap_row(self.inputs.questions[i])[1])
            shown = name_values([self.write_answer(one) for one in tuned[i]])
            too = ["yes" if self.answers.differ(*base[i]) else "no"] if base else []
            swapped = ", ".join(f"{word} → {self.swaps.swap(word)}" for word in words)
            cells.append((self.inputs.origins[i], swapped, *shown, *too))
        heads = ("row", "swapped", "tuned: original", "tuned: swapped", *(("base changes too",) if base else ()))
        if cells:
            yield StudyTable("Examples of answers that change only with the group", heads, tuple(cells))

    def write_answer(self, answer: object) -> str:
        """Format an answer for display."""
        if isinstance(answer, Mapping) and "rejected" in answer:
            return "the chosen one" if prefers_chosen(answer) else "the rejected one"
        return answer if isinstance(answer, str) else self.context.task.format_prediction(answer)


@dataclass(frozen=True)
class AnswerKind:
    """The kind of answers, which defines when two of them differ by more than the swapped words."""

    swaps: Swaps
    tolerance: float = 0.0
    """Two predicted numbers differ if they are further apart than this."""
    labels: tuple[str, ...] = ()
    """Answers to choose from; empty for free answers."""

    def differ(self, before: object, after: object) -> bool:
        """Whether the answer changed. A word for a group in it is expected to be swapped as in the prompt."""
        if isinstance(before, dict) and isinstance(after, dict):
            if "rejected" in before:
                return prefers_chosen(before) != prefers_chosen(after)
            key = "label" if "label" in before else "text"
            return self.differ(before[key], after[key])
        if isinstance(before, float) and isinstance(after, float):
            return abs(after - before) > self.tolerance
        if isinstance(before, list) and isinstance(after, list) and self.labels:
            return sorted(map(self.expected_label, before)) != sorted(after)
        if isinstance(before, str) and isinstance(after, str):
            if self.labels:
                return self.expected_label(before) != after
            return not self.swaps.is_swapped(before.strip(), after.strip())
        return before != after

    def expected_label(self, label: str) -> str:
        """Return the right label after the swap: a different one only if it names a group."""
        swapped = self.swaps.swap(label)
        return swapped if swapped in self.labels else label


def prefers_chosen(scores: Mapping[str, float]) -> bool:
    """Whether a model rates the chosen answer of a pair higher."""
    return scores["chosen"] > scores["rejected"]


def greedy(recipe: Recipe) -> Recipe:
    """Return the recipe without sampling, which changes answers randomly."""
    plain = {"do_sample": False, **dict.fromkeys(SAMPLING)}
    return recipe.model_copy(update={"generation": recipe.generation.model_copy(update=plain)})
