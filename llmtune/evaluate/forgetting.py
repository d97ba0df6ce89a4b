"""Forgetting: whether what the base model knew of general text and common knowledge is still there after tuning.

Shapes: U paragraphs of all texts, Q questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmtune.evaluate.inference import count, progress
from llmtune.evaluate.metric import Measure, columns, compare, measure_right, ratio
from llmtune.evaluate.metrics import exponential_ratio
from llmtune.evaluate.multiple_choice import Question, pick, plant, read_quiz
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.perplexity import Passages, make_passages, read_texts, score_passages
from llmtune.evaluate.shared_prefix import Tree, score_trees
from llmtune.evaluate.suite_runner import Inquiry, Scored, Setting
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for
from llmtune.model import compute_context, resolve_dtype
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.records import Study, StudyTable
from llmtune.report.number_format import score

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
class Said:
    """What one model made of the texts and questions."""

    nats: Floats
    """[U]"""
    likelihoods: tuple[tuple[float, ...], ...]
    """[Q] log-likelihood of each choice, nats."""


class Material:
    """Texts and questions as one model's tokens, made when the first model is there to say how far it can read."""

    def __init__(self, setting: Setting) -> None:
        section = setting.recipe.evaluate.forgetting
        assert section is not None
        self.setting = setting
        self.texts = read_texts(section.texts)
        self.questions = read_quiz(section.questions)
        self.trees = plant(self.questions, setting.processor)
        self.passages: Passages | None = None
        self.too_long = 0
        """Questions that the model's context does not hold; they are left out."""

    def fit(self, context: int | None) -> Passages:
        """Lay windows over the texts, and leave out questions that are longer than a model's context."""
        if self.passages is None:
            self.passages = make_passages(self.texts, self.setting.processor, context)
            limit = context or 1 << 60
            kept = [i for i, tree in enumerate(self.trees) if longest_branch(tree) <= limit]
            self.too_long = len(self.trees) - len(kept)
            self.questions = tuple(self.questions[i] for i in kept)
            self.trees = [self.trees[i] for i in kept]
        return self.passages

    def ask(self, name: str, model: torch.nn.Module) -> Said:
        """Put texts and questions to one model; sets it to evaluation mode."""
        model.eval()
        setting, passages = self.setting, self.fit(context_length(unwrap(model).config))
        device, dtype = setting.device, resolve_dtype(setting.recipe.model.dtype, setting.device)
        with torch.inference_mode(), compute_context(dtype, device), progress(setting.console) as bars:
            advance = count(bars, f"{name}: general text", len(passages.windows))
            nats = score_passages(model, passages, device=device, advance=advance)
            advance = count(bars, f"{name}: general questions", len(self.trees))
            budget = budget_for(device, TOKEN_BUDGET)
            likelihoods = score_trees(model, self.trees, device=device, budget=budget, advance=advance)
        return Said(nats, tuple(map(tuple, likelihoods)))


def make_forgetting(setting: Setting) -> Inquiry:
    """Return the study that `evaluate.forgetting` asks for.

    Raises DataError for texts and questions that cannot be read.
    """
    material = Material(setting)
    return Inquiry("forgetting", material.ask, partial(compare_answers, material))


def check_forgetting(recipe: Recipe) -> None:
    """Read what the study reads. Raises DataError where that cannot be done."""
    section = recipe.evaluate.forgetting
    if section is not None:
        read_texts(section.texts)
        read_quiz(section.questions)


def compare_answers(material: Material, base: Said | None, tuned: Said, scored: Scored) -> Study:
    """Turn what both models said into scores, differences and tables."""
    passages, questions, seed = material.passages, material.questions, material.setting.recipe.seed
    assert passages is not None, "the tuned model was asked"
    measures = {
        side: measure_said(said, passages, questions, material.too_long)
        for side, said in (("base", base), ("tuned", tuned))
        if said is not None
    }
    before, after = measures.get("base", {}), measures["tuned"]
    tables = [by_text(passages, base, tuned), by_topic(questions, base, tuned), lost_questions(questions, base, tuned)]
    return Study(
        title="Forgetting",
        base={metric: found.value for metric, found in before.items()},
        tuned={metric: found.value for metric, found in after.items()},
        difference={metric: compare(before[metric], found, seed) for metric, found in after.items() if before},
        meanings={metric: MEANINGS[metric] for metric in after},
        better={metric: BETTER[metric] for metric in after},
        signatures={metric: found.signature for metric, found in after.items()},
        limits=LIMITS.format(amount=amount(passages, questions)),
        tables=tuple(table for table in tables if table is not None),
    )


def amount(passages: Passages, questions: Sequence[Question]) -> str:
    """Say how much was asked."""
    parts = [f"{passages.sizes.sum() / 1000:.0f} kB of text"] if passages.texts else []
    return " and ".join([*parts, *([f"{len(questions)} questions"] if questions else [])])


def longest_branch(tree: Tree) -> int:
    """Return how many tokens the longest of a question's choices has, with the question."""
    return len(tree.prefix) + max(map(len, tree.branches))


def measure_said(
    said: Said, passages: Passages, questions: Sequence[Question], too_long: int = 0
) -> dict[str, Measure]:
    """Measure what one model said; rows are paragraphs and questions."""
    found: dict[str, Measure] = {}
    if passages.texts:
        read = (
            f"windows of at most {max(len(window.ids) for window in passages.windows)} tokens, each token scored once"
        )
        told = f"exp(nats / tokens) of plain text; {read}; intervals over paragraphs"
        sums = columns(said.nats, passages.tokens)
        found["perplexity"] = Measure("perplexity", sums, exponential_ratio, signature=told)
        told = f"bits by UTF-8 bytes of plain text; {read}; intervals over paragraphs"
        sums = columns(said.nats / math.log(2), passages.sizes)
        found["bits_per_byte"] = Measure("bits_per_byte", sums, ratio, signature=told)
    if questions:
        form = "'Question: ...\\nAnswer:' and ' CHOICE', no chat template"
        form += f"; {too_long} questions longer than the model's context are left out" if too_long else ""
        for metric, by_length, told in (
            ("accuracy", False, f"the choice of the highest log-likelihood, as lm-eval's acc; {form}"),
            ("accuracy_norm", True, f"log-likelihoods divided by characters, as lm-eval's acc_norm; {form}"),
        ):
            found[metric] = measure_right(right(said, questions, by_length=by_length), metric, told)
    return found


def right(said: Said, questions: Sequence[Question], *, by_length: bool = False) -> list[bool]:
    """Say of each question [Q] whether its right answer was picked."""
    return [
        pick(values, question, by_length=by_length) == question.answer
        for values, question in zip(said.likelihoods, questions, strict=True)
    ]


def by_text(passages: Passages, base: Said | None, tuned: Said) -> StudyTable | None:
    """Give the perplexity of each text, where there are several."""
    if len(passages.texts) < 2:
        return None
    text_of = np.asarray(passages.text_of)

    def perplexity(said: Said | None, place: int) -> str:
        if said is None:
            return score(None)
        inside = text_of == place
        with np.errstate(over="ignore"):
            return score(float(np.exp(said.nats[inside].sum() / passages.tokens[inside].sum())))

    rows = tuple(
        (text.name, f"{len(text.paragraphs):,}", perplexity(base, place), perplexity(tuned, place))
        for place, text in enumerate(passages.texts)
    )
    return StudyTable("Perplexity of each text", ("text", "paragraphs", "base", "tuned"), rows)


def by_topic(questions: Sequence[Question], base: Said | None, tuned: Said) -> StudyTable | None:
    """Count the right answers by topic, where the questions have topics."""
    totals = Counter(question.topic for question in questions)
    if len(totals) < 2:
        return None
    sides = [count_right(questions, said) for said in (base, tuned)]
    rows = tuple(
        (topic or "(none)", f"{total:,}", *(score(None) if side is None else f"{side[topic]:,}" for side in sides))
        for topic, total in totals.items()
    )
    return StudyTable("Questions answered right, by topic", ("topic", "questions", "base", "tuned"), rows)


def count_right(questions: Sequence[Question], said: Said | None) -> Mapping[str, int] | None:
    """Count the right answers of one model by topic."""
    if said is None:
        return None
    return Counter(question.topic for question, hit in zip(questions, right(said, questions), strict=True) if hit)


def lost_questions(questions: Sequence[Question], base: Said | None, tuned: Said) -> StudyTable | None:
    """List questions that the base got right and the tuned model wrong."""
    if base is None:
        return None
    sides = zip(questions, tuned.likelihoods, right(base, questions), right(tuned, questions), strict=True)
    lost = [
        (question.text, question.choices[question.answer], question.choices[pick(values, question, by_length=False)])
        for question, values, before, after in sides
        if before and not after
    ]
    if not lost:
        return None
    shown = f", {SHOWN_QUESTIONS} of {len(lost)}" if len(lost) > SHOWN_QUESTIONS else ""
    heads = ("question", "right answer", "tuned model's answer")
    return StudyTable(f"Right before, wrong now{shown}", heads, tuple(lost[:SHOWN_QUESTIONS]))
