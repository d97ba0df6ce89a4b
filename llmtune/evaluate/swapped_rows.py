"""The user's own test rows with the words for groups swapped: whether the answer changes when only the group does."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtune.errors import DataError, Problem
from llmtune.evaluate.eval_inputs import EvalContext, render, write_prompt
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import generate_texts
from llmtune.evaluate.inference import context_limit
from llmtune.evaluate.metric import Measure, PairedMeasures, measure_right
from llmtune.evaluate.shared_prefix import Tree, choice_trees, most_likely, score_trees
from llmtune.evaluate.slices import write_value
from llmtune.evaluate.suite_files import OWN_FILES, read_sources, read_utf8
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.recipe.eval_suites_section import OWN
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Advance, Row, StudyTable

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

FIX = "Write two different words a line: woman,man"


@dataclass(frozen=True)
class Swapped:
    """A text after the swap."""

    text: str
    words: tuple[str, ...]
    """The words that were swapped, as they stood."""
    ambiguous: tuple[str, ...]
    """Words with several partners, left as they stood."""


@dataclass(frozen=True)
class Swaps:
    """Pairs of words; one with several partners is ambiguous in that direction."""

    partners: Mapping[str, Sequence[str]]
    """By word in lower case."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds the words, the longest first, where they stand alone."""
        words = sorted(self.partners, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)

    def swap(self, text: str) -> Swapped:
        """Put each word's partner in its place."""
        words: list[str] = []
        ambiguous: list[str] = []

        def partner(match: re.Match[str]) -> str:
            partners = self.partners[match[0].lower()]
            (words if len(partners) == 1 else ambiguous).append(match[0])
            return in_case_of(match[0], partners[0]) if len(partners) == 1 else match[0]

        return Swapped(self.pattern.sub(partner, text), tuple(words), tuple(ambiguous))

    def is_swapped(self, before: str, after: str) -> bool:
        """Whether `after` is `before` with every word swapped; an ambiguous one for any of its partners."""
        parts, end = [], 0
        for match in self.pattern.finditer(before):
            partners = [re.escape(in_case_of(match[0], one)) for one in self.partners[match[0].lower()]]
            parts.append(re.escape(before[end : match.start()]) + f"(?:{'|'.join(partners)})")
            end = match.end()
        return re.fullmatch("".join(parts) + re.escape(before[end:]), after) is not None


def in_case_of(model: str, word: str) -> str:
    """Write `word` in the case of `model`: HE, He or he."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def read_swaps(sources: Sequence[str]) -> Swaps:
    """Read pairs of words; each source is `own` or a CSV file of two columns.

    Raises DataError for files that cannot be read or used, with all bad lines.
    """
    partners: dict[str, list[str]] = {}
    for pair in read_sources(sources, read_pairs_of_words, "pair of words", FIX):
        for word, partner in (pair, pair[::-1]):
            known = partners.setdefault(word.lower(), [])
            if partner.lower() not in map(str.lower, known):
                known.append(partner)
    return Swaps(partners)


def read_pairs_of_words(source: str) -> list[tuple[str, str] | Problem]:
    """Read the pairs of one CSV file, and what is wrong with its other lines."""
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


TEXTS = ("prompt", "completion", "source", "document", "question", "context", "text", "pair", "chosen", "rejected")
"""Keys of a row without its answer that hold text; of a conversation it is each message."""
MOVED = 0.1
"""Of the standard deviation of the reference numbers: a prediction that moves by more has changed."""
METRIC = "swap_changes"
NO_ANSWERS = "no test row asks for an answer that could change: a prompt, a mask, the better of two"
CHANGED = {True: "yes", False: "no"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
SwapAnswers = dict[int, tuple[object, object]]
"""By index of the evaluated row, the answer to it as it stands and with the words swapped."""


@dataclass(frozen=True)
class SwappedRows:
    """Test rows with words swapped, and how answers to them are taken."""

    context: EvalContext
    swaps: Swaps
    questions: dict[int, Row]
    """By index of the evaluated row, the row without its answer, swapped."""
    words: dict[int, tuple[str, ...]]
    left_out: str
    """How many rows were not swapped, and why."""
    how: str = ""
    """What is compared: the likeliest of the choices, generated texts, or predictions."""
    trees: dict[int, tuple[Tree, Tree]] = field(default_factory=dict)
    prompts: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    tolerance: float = 0.0
    """Of predicted numbers: from where on two of them differ."""
    labels: tuple[str, ...] = ()
    """What answers are chosen from; empty where they are free."""

    @property
    def signature(self) -> str:
        """How many rows were swapped, why others were not, and what is compared."""
        return f"{len(self.questions)} test rows ({self.left_out}): {self.how}"

    def answers_of(self, model: torch.nn.Module, advance: Advance) -> SwapAnswers:
        """Answer each row as it stands and swapped, in one go: rounding then differs as little as can be."""
        context, inputs, limit = self.context, self.context.inputs, context_limit(model)
        assert inputs is not None
        processor, recipe, device, task = context.processor, context.recipe, context.device, context.task
        if task.predicts:
            rows = list(self.questions)
            both = [inputs.questions[i] for i in rows] + [self.questions[i] for i in rows]
            answers = task.predict(both, LoadedModel(model, processor, recipe, device, advance)) if both else []
        elif self.trees:
            rows = [i for i, pair in self.trees.items() if all(tree.longest <= limit for tree in pair)]
            trees = [self.trees[i][n] for n in (0, 1) for i in rows]
            scores = score_trees(model, trees, device=device, advance=advance)
            answers = [most_likely(one, inputs.choices) for one in scores]
        else:
            new = recipe.generation.max_new_tokens
            rows = [i for i, pair in self.prompts.items() if all(len(ids) + new <= limit for ids in pair)]
            prompts = [self.prompts[i][n] for n in (0, 1) for i in rows]
            answers = generate_texts(model, prompts, processor, greedy(recipe), device=device, advance=advance)
        return dict(zip(rows, zip(answers[: len(rows)], answers[len(rows) :], strict=True), strict=True))

    def has_changed(self, before: object, after: object) -> bool:
        """Whether the answer is another one. A word for a group in it is expected to be swapped as in the prompt."""
        if isinstance(before, dict) and isinstance(after, dict):
            if "rejected" in before:
                return prefers_chosen(before) != prefers_chosen(after)
            key = "label" if "label" in before else "text"
            return self.has_changed(before[key], after[key])
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
        """Return the label that is right once the words are swapped: another one only if it names a group."""
        swapped = self.swaps.swap(label).text
        return swapped if swapped in self.labels else label

    def measure(self, base: SwapAnswers | None, tuned: SwapAnswers) -> PairedMeasures:
        """Measure the share of rows whose answer changes, on the rows that both models answered."""
        rows = [i for i in tuned if base is None or i in base]

        def measure(answers: SwapAnswers) -> dict[str, Measure]:
            changed = measure_right([self.has_changed(*answers[i]) for i in rows], METRIC, self.signature)
            return {METRIC: replace(changed, at=tuple(rows))}

        return PairedMeasures({} if base is None else measure(base), measure(tuned))

    def table(self, base: SwapAnswers | None, tuned: SwapAnswers) -> list[StudyTable]:
        """Show a few rows whose answer changes in the tuned model; nothing where there are none."""
        inputs, most = self.context.inputs, self.context.recipe.evaluate.samples
        assert inputs is not None
        rows = [i for i, answers in tuned.items() if self.has_changed(*answers)]
        cells = []
        for i in (rows[at] for at in cut_evenly(len(rows), most)):
            words = ", ".join(f"{word} → {self.swaps.swap(word).text}" for word in dict.fromkeys(self.words[i]))
            answers = [write_value(write_answer(one, self.context)) for one in tuned[i]]
            too = [CHANGED[self.has_changed(*base[i])] if i in base else ""] if base else []
            cells.append((inputs.origins[i], words, *answers, *too))
        heads = ("row", "swapped", "tuned: as it stands", "tuned: swapped", *(("base changes too",) if base else ()))
        title = "Answers that change with the group alone: a few of them"
        return [StudyTable(title, heads, tuple(cells))] if cells else []


def swap_rows(context: EvalContext, swaps: Swaps) -> SwappedRows | str:
    """Swap the words in the test rows, or return why that makes no sense here."""
    inputs, task, processor, recipe = context.inputs, context.task, context.processor, context.recipe
    if inputs is None:
        return "there are no test rows"
    if reason := TASK_FACTS[recipe.task].unswapped:
        return reason
    rows: dict[int, tuple[Row, tuple[str, ...]]] = {}
    counts: Counter[str] = Counter()
    for i, question in enumerate(inputs.questions):
        if not is_answerable(question, context):
            continue
        row, words, ambiguous = swap_row(question, swaps)
        kind = "ambiguous" if ambiguous else "swapped" if words else "without"
        counts[kind] += 1
        if kind == "swapped":
            rows[i] = row, words
    if not counts:
        return NO_ANSWERS
    if TASK_FACTS[recipe.task].generates and not inputs.trees:
        every = list(rows)
        rows = {every[at]: rows[every[at]] for at in cut_evenly(len(every), recipe.evaluate.limit)}
    if task.rates_answers:
        rows = {i: one for i, one in rows.items() if not isinstance(task.encode([one[0]], processor, recipe)[0], str)}
    left_out = f"{counts['without']} without any of the words"
    left_out += f", {counts['ambiguous']} with an ambiguous one" if counts["ambiguous"] else ""
    questions = {i: row for i, (row, _) in rows.items()}
    swapped = SwappedRows(context, swaps, questions, {i: words for i, (_, words) in rows.items()}, left_out)
    if task.predicts:
        return compare_predictions(swapped, inputs.targets)
    if inputs.trees:
        return compare_choices(swapped)
    prompts = {
        i: (render(task, inputs.questions[i], processor, recipe), render(task, row, processor, recipe))
        for i, row in questions.items()
    }
    return replace(swapped, how="answers compared, generated greedily", prompts=prompts)


def compare_predictions(swapped: SwappedRows, targets: Sequence[object]) -> SwappedRows:
    """Take the answers of a task that predicts."""
    classify = swapped.context.recipe.classify
    numbers = [value for value in targets if isinstance(value, float)]
    tolerance = MOVED * statistics.pstdev(numbers) if len(numbers) == len(targets) and numbers else 0.0
    how = f"predictions compared, numbers by {tolerance:.3g}" if tolerance else "predictions compared"
    labels = tuple(classify.labels or ()) if classify else ()
    return replace(swapped, how=how, tolerance=tolerance, labels=labels)


def compare_choices(swapped: SwappedRows) -> SwappedRows:
    """Take the likeliest of the choices as the answer."""
    context, inputs = swapped.context, swapped.context.inputs
    assert inputs is not None
    rows = [i for i in swapped.questions if i in inputs.trees]
    questions = [swapped.questions[i] for i in rows]
    grown = choice_trees(questions, inputs.choices, context.task, context.processor, context.recipe)
    trees = {i: (inputs.trees[i], tree) for i, tree in zip(rows, grown, strict=True) if tree is not None}
    how = f"the likeliest of {len(inputs.choices)} answers compared"
    kept = {i: swapped.questions[i] for i in trees}
    return replace(swapped, questions=kept, how=how, trees=trees, labels=inputs.choices)


def is_answerable(question: Row, context: EvalContext) -> bool:
    """Whether a row asks anything that can be answered: a prompt, a mask, two answers to judge."""
    if context.task.rates_answers:
        return "chosen" in question
    if context.task.auto_class == "AutoModelForMaskedLM":
        return str(context.processor.mask_token) in question["prompt"] + question["completion"]
    return bool(write_prompt(question))


def swap_row(row: Row, swaps: Swaps) -> tuple[Row, tuple[str, ...], bool]:
    """Return a row with the words swapped in all that is read, which ones, and whether one of them is ambiguous."""
    words: list[str] = []
    ambiguous = False

    def swap(value: object) -> object:
        nonlocal ambiguous
        if not isinstance(value, str):
            return value
        swapped = swaps.swap(value)
        words.extend(swapped.words)
        ambiguous |= bool(swapped.ambiguous)
        return swapped.text

    def swap_content(value: object) -> object:
        if not isinstance(value, list):
            return swap(value)
        return [{**part, "text": swap(part["text"])} if "text" in part else part for part in value]

    changed: Row = {key: swap(row[key]) for key in TEXTS if key in row}
    if "messages" in row:
        changed["messages"] = [{**one, "content": swap_content(one.get("content"))} for one in row["messages"]]
    if "tokens" in row:
        changed["tokens"] = [swap(token) for token in row["tokens"]]
    return {**row, **changed}, tuple(words), ambiguous


def greedy(recipe: Recipe) -> Recipe:
    """Return the recipe with answers that are not drawn: else they change by chance."""
    plain = {"do_sample": False, **dict.fromkeys(SAMPLING)}
    return recipe.model_copy(update={"generation": recipe.generation.model_copy(update=plain)})


def prefers_chosen(scores: Mapping[str, float]) -> bool:
    """Whether the better answer of a pair is the one that a model rates higher."""
    return scores["chosen"] > scores["rejected"]


def write_answer(answer: object, context: EvalContext) -> str:
    """Write an answer as a person reads it."""
    if isinstance(answer, Mapping) and "rejected" in answer:
        return "the chosen one" if prefers_chosen(answer) else "the rejected one"
    return answer if isinstance(answer, str) else context.task.format_prediction(answer)
