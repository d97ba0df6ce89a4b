"""Forgetting: whether what the base model knew of general text and common knowledge is still there after tuning.

Shapes: U paragraphs of all texts, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.inference import add_bar, context_limit, inference_on
from llmtune.evaluate.metric import Measure, PairedMeasures, columns, measure_right, ratio
from llmtune.evaluate.multiple_choice import pick, question_tree, read_questions
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.perplexity import Passages, make_passages, read_texts, score_passages
from llmtune.evaluate.results import flipped_rows
from llmtune.evaluate.shared_prefix import score_trees
from llmtune.evaluate.slices import rows_by
from llmtune.evaluate.suite import EvalSuite
from llmtune.evaluate.text_metrics import exponential_ratio
from llmtune.records import Study, StudyTable
from llmtune.report.number_format import DASH, count, score

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

BETTER = {"perplexity": -1, "bits_per_byte": -1, "accuracy": 1, "accuracy_norm": 1}
MEANINGS = {
    "perplexity": "of general text",
    "bits_per_byte": "of general text",
    "accuracy": "general questions: the right answer is the likeliest",
    "accuracy_norm": "the same, likelihoods by length",
}
SHOWN_QUESTIONS = 12
"""Questions that the base got right and the tuned model wrong, listed one by one."""
LIMITS = (
    "These numbers say whether general language and common knowledge got worse, as far as {amount} can tell. Their "
    "intervals are about other text and questions of this kind. That nothing moved does not show that nothing was "
    "forgotten: other languages, code, long contexts, instructions and safety are not asked. The base model may know "
    "the text by heart, so a score by itself says little, and the difference is what counts. Text and questions stand "
    "plain, without a chat template: a model that was tuned to chat may have moved more, or less, in its own form."
)


@dataclass(frozen=True)
class Likelihoods:
    """What one model makes of the texts and questions."""

    nats: Floats
    """[U]"""
    choices: list[list[float]]
    """[Q] log-likelihood of each choice, nats."""


class ForgettingSuite(EvalSuite):
    """General texts and questions, as one model's tokens once the first model shows how far it can read."""

    name = "forgetting"

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.outputs: dict[str, Likelihoods] = {}
        section = context.recipe.evaluate.forgetting
        assert section is not None
        self.texts = read_texts(section.texts)
        self.questions = read_questions(section.questions)
        self.trees = [question_tree(question, context.processor) for question in self.questions]
        self.passages: Passages | None = None
        self.too_long = 0
        """Questions that the model's context does not hold; they are left out."""

    def fit(self, limit: int) -> Passages:
        """Lay windows over the texts, and leave out questions that are longer than a model's context."""
        if self.passages is None:
            self.passages = make_passages(self.texts, self.context.processor, limit)
            kept = [i for i, tree in enumerate(self.trees) if tree.longest <= limit]
            self.too_long = len(self.trees) - len(kept)
            self.questions = tuple(self.questions[i] for i in kept)
            self.trees = [self.trees[i] for i in kept]
        return self.passages

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Read the texts and questions with one model."""
        passages, device = self.fit(context_limit(model)), self.context.device
        with inference_on(model, self.context) as bars:
            advance = add_bar(bars, f"{name}: general text", len(passages.windows))
            nats = score_passages(model, passages, device=device, advance=advance)
            advance = add_bar(bars, f"{name}: general questions", len(self.trees))
            choices = score_trees(model, self.trees, device=device, advance=advance)
        self.outputs[name] = Likelihoods(nats, choices)

    def compare(self, measures: PairedMeasures) -> Study:
        """Turn what both models made of texts and questions into scores, differences and tables."""
        base, tuned = self.outputs.get("base"), self.outputs["tuned"]
        measured = PairedMeasures({} if base is None else self.measure(base), self.measure(tuned))
        base_scores, tuned_scores = measured.scores()
        return Study(
            title="Forgetting",
            base=base_scores,
            tuned=tuned_scores,
            difference=measured.differences(self.context.recipe.seed),
            meanings={metric: MEANINGS[metric] for metric in tuned_scores},
            better={metric: BETTER[metric] for metric in tuned_scores},
            signatures={metric: one.signature for metric, one in measured.tuned.items()},
            limits=LIMITS.format(amount=self.amount()),
            tables=tuple(self.tables(measured)),
        )

    def measure(self, outputs: Likelihoods) -> dict[str, Measure]:
        """Measure one model; rows are paragraphs and questions."""
        passages, found = self.passages, list[Measure]()
        assert passages is not None
        if passages.texts:
            longest = max(len(window.ids) for window in passages.windows)
            how = f"windows of at most {longest} tokens, each token scored once; intervals over paragraphs"
            sums = columns(outputs.nats, passages.tokens)
            signature = f"exp(nats / tokens) of plain text; {how}"
            found.append(Measure("perplexity", sums, exponential_ratio, signature=signature))
            sums = columns(outputs.nats / math.log(2), passages.sizes)
            signature = f"bits by UTF-8 bytes of plain text; {how}"
            found.append(Measure("bits_per_byte", sums, ratio, signature=signature))
        if self.questions:
            how = "'Question: ...\\nAnswer:' and ' CHOICE', no chat template"
            how += f"; {self.too_long} questions longer than the model's context are left out" if self.too_long else ""
            for metric, by_length, signature in (
                ("accuracy", False, f"the choice of the highest log-likelihood, as lm-eval's acc; {how}"),
                ("accuracy_norm", True, f"log-likelihoods divided by characters, as lm-eval's acc_norm; {how}"),
            ):
                pairs = zip(outputs.choices, self.questions, strict=True)
                right = [pick(values, one, by_length=by_length) == one.right for values, one in pairs]
                found.append(measure_right(right, metric, signature))
        return {one.metric: replace(one, at=tuple(range(len(one.sums_NK)))) for one in found}

    def amount(self) -> str:
        """Write how much was read."""
        passages = self.passages
        texts = [f"{passages.sizes.sum() / 1000:.0f} kB of text"] if passages and passages.texts else []
        return " and ".join([*texts, *([f"{len(self.questions)} questions"] if self.questions else [])])

    def tables(self, measured: PairedMeasures) -> Iterator[StudyTable]:
        """Show the perplexity of each text, the right answers by topic, and the questions that got lost."""
        assert self.passages is not None
        texts = [(self.passages.texts[number].name, rows) for number, rows in rows_by(self.passages.text_of).items()]
        if len(texts) > 1:
            rows = part_rows("perplexity", texts, measured, lambda one: score(one.value))
            yield StudyTable("Perplexity of each text", ("text", "paragraphs", "base", "tuned"), rows)
        topics = list(rows_by([question.topic or "(none)" for question in self.questions]).items())
        if len(topics) > 1:
            rows = part_rows("accuracy", topics, measured, lambda one: count(one.sums_NK[:, 0].sum()))
            yield StudyTable("Questions answered right, by topic", ("topic", "questions", "base", "tuned"), rows)
        if "accuracy" not in measured.base:
            return
        _, lost = flipped_rows(measured.base["accuracy"], measured.tuned["accuracy"])
        shown = f", {SHOWN_QUESTIONS} of {len(lost)}" if len(lost) > SHOWN_QUESTIONS else ""
        if lost:
            rows = tuple(map(self.lost, lost[:SHOWN_QUESTIONS]))
            heads = ("question", "right answer", "tuned model's answer")
            yield StudyTable(f"Right before, wrong now{shown}", heads, rows)

    def lost(self, number: int) -> tuple[str, ...]:
        """Return a question, its right answer and that of the tuned model."""
        question = self.questions[number]
        answer = pick(self.outputs["tuned"].choices[number], question, by_length=False)
        return question.question, question.choices[question.right], question.choices[answer]


def check_forgetting(recipe: Recipe) -> None:
    """Read what the suite reads. Raises DataError where that cannot be done."""
    section = recipe.evaluate.forgetting
    if section is not None:
        read_texts(section.texts)
        read_questions(section.questions)


def part_rows(
    metric: str, parts: Sequence[tuple[str, set[int]]], measures: PairedMeasures, write: Callable[[Measure], str]
) -> tuple[tuple[str, ...], ...]:
    """Return name, size and both models' scores of each part of a metric's rows."""
    models = (measures.base.get(metric), measures.tuned.get(metric))
    return tuple(
        (name, count(len(rows)), *(DASH if one is None else write(one.subset(rows)) for one in models))
        for name, rows in parts
    )
