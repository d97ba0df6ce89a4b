"""Forgetting: whether tuning made the model worse at general text and common knowledge.

Shapes: S scored tokens of a batch, U paragraphs of all texts, Q questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from llmtune.data.collators import collate_padded
from llmtune.data.completion_encoding import prompt_ids
from llmtune.data.example import Example
from llmtune.data.tokenization import encode_texts, start_ids
from llmtune.display.number_format import DASH, count, score
from llmtune.errors import Problem
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, PairedMeasures, columns, measure_right, ratio
from llmtune.evaluate.results import flipped_rows
from llmtune.evaluate.shared_prefix import Tree, make_tree, score_trees
from llmtune.evaluate.slices import rows_by
from llmtune.evaluate.suites.eval_suite import OWN_FILES, Bar, EvalSuite, read_sources, read_utf8
from llmtune.evaluate.text_metrics import exponential_ratio
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, over_processes, run_in_batches
from llmtune.model.causal_lm_loss import causal_loss, move_to
from llmtune.recipe.eval_suites_section import OWN
from llmtune.recipe.schema import Recipe
from llmtune.records import Advance
from llmtune.store.score_records import StudyTable

PROMPT = "Question: {question}\nAnswer:"
"""The format of lm-eval's ARC tasks; a space and the answer follow."""
FIX = 'Write a line like {"question": "What do cows eat?", "choices": ["grass", "stones"], "answer": 0}.'
SHOWN_QUESTIONS = 12
"""Questions that the base got right and the tuned model wrong, listed one by one."""
LIMITS = (
    "These numbers show whether general language and common knowledge got worse, within the resolution of {amount}. "
    "The intervals apply to other text and questions of this kind. No change does not prove that nothing was lost: "
    "other languages, code, long contexts, instructions and safety are not tested. The base model may have memorized "
    "the text, so a score alone says little; the difference is what counts. Text and questions are used "
    "plain, without a chat template. A chat-tuned model may have changed more, or less, within its template."
)


@dataclass(frozen=True)
class Likelihoods:
    """One model's likelihoods of the texts and choices."""

    nats: Floats
    """[U]"""
    choices: list[list[float]]
    """[Q] log-likelihood of each choice, nats."""


class ForgettingSuite(EvalSuite[Likelihoods]):
    """General texts and questions; the context of the first model sets the window size."""

    key = "forgetting"
    metrics: ClassVar = {
        "perplexity": ("of general text", -1),
        "bits_per_byte": ("of general text", -1),
        "accuracy": ("general questions: the right answer is the most likely", 1),
        "accuracy_norm": ("the same, likelihoods normalized by length", 1),
    }
    decoder_input = "the likelihood of general text and of answers to general questions"

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.texts, self.questions = self.read(context.recipe)
        self.passages: Passages
        self.trees = [question_tree(question, context.processor) for question in self.questions]
        self.too_long = 0
        """Number of questions skipped because they exceed the model's context."""

    @classmethod
    def read(cls, recipe: Recipe) -> tuple[tuple[GeneralText, ...], list[Question]]:
        """Read texts and questions. Raises DataError if a source is bad."""
        section = recipe.evaluate.forgetting
        assert section is not None
        return read_texts(section.texts), read_questions(section.questions)

    def fit(self, limit: int) -> None:
        """Cut the texts into windows, and skip questions longer than the context."""
        self.passages = make_passages(self.texts, self.context.processor, limit)
        kept = [i for i, tree in enumerate(self.trees) if tree.longest <= limit]
        self.too_long = len(self.trees) - len(kept)
        self.questions, self.trees = [self.questions[i] for i in kept], [self.trees[i] for i in kept]

    def ask(self, model: torch.nn.Module, bar: Bar) -> Likelihoods:
        """Read the texts and questions with one model."""
        device = self.context.device
        nats = score_passages(model, self.passages, device, bar("general text", len(self.passages.windows)))
        advance = bar("general questions", len(self.trees))
        return Likelihoods(nats, score_trees(model, self.trees, device=device, advance=advance))

    def measure(self, output: Likelihoods) -> Iterator[Measure]:
        """Measure one model; rows are paragraphs and questions."""
        passages = self.passages
        if self.texts:
            longest = max(len(window.input_ids) for window in passages.windows)
            how = f"windows of at most {longest} tokens, each token scored once; intervals over paragraphs"
            sums = columns(output.nats, passages.tokens)
            signature = f"exp(nats / tokens) of plain text; {how}"
            yield Measure("perplexity", sums, exponential_ratio, signature=signature)
            sums = columns(output.nats / math.log(2), passages.sizes)
            yield Measure("bits_per_byte", sums, ratio, signature=f"bits by UTF-8 bytes of plain text; {how}")
        if self.questions:
            how = "'Question: ...\\nAnswer:' and ' CHOICE', no chat template"
            how += f"; {self.too_long} questions skipped: longer than the model's context" if self.too_long else ""
            for metric, by_length, signature in (
                ("accuracy", False, f"the choice with the highest log-likelihood, as lm-eval's acc; {how}"),
                ("accuracy_norm", True, f"log-likelihoods divided by characters, as lm-eval's acc_norm; {how}"),
            ):
                pairs = zip(self.questions, output.choices, strict=True)
                right = [one.pick(values, by_length=by_length) == one.right for one, values in pairs]
                yield measure_right(right, metric, signature)

    def limits(self) -> str:
        """Describe what the numbers can show, and how much was read."""
        parts = [f"{self.passages.sizes.sum() / 1000:.0f} kB of text"] if self.texts else []
        parts += [f"{len(self.questions)} questions"] if self.questions else []
        return LIMITS.format(amount=" and ".join(parts))

    def tables(self, measured: PairedMeasures) -> Iterator[StudyTable]:
        """Show the perplexity of each text, the right answers by topic, and the questions now answered wrong."""
        texts = [(self.texts[number].name, rows) for number, rows in rows_by(self.passages.text_of).items()]
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
        pairs = [(self.questions[number], self.outputs["tuned"].choices[number]) for number in lost[:SHOWN_QUESTIONS]]
        rows = tuple((one.question, one.choices[one.right], one.choices[one.pick(values)]) for one, values in pairs)
        if lost:
            heads = ("question", "right answer", "tuned model's answer")
            yield StudyTable(f"Right before, wrong now{shown}", heads, rows)


def part_rows(
    metric: str, parts: Sequence[tuple[str, set[int]]], measures: PairedMeasures, write: Callable[[Measure], str]
) -> tuple[tuple[str, ...], ...]:
    """Return name, size and both models' scores of each part of a metric's rows."""
    models = (measures.base.get(metric), measures.tuned.get(metric))
    return tuple(
        (name, count(len(rows)), *(DASH if one is None else write(one.subset(rows)) for one in models))
        for name, rows in parts
    )


# Questions


def not_blank(text: str) -> str:
    """Refuse a blank text."""
    if not text.strip():
        raise ValueError("empty text")
    return text


class Question(BaseModel):
    """A question with its choices and the right one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    question: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    choices: Annotated[tuple[Annotated[str, AfterValidator(not_blank)], ...], Field(min_length=2, max_length=26)]
    answer: int | str
    """Its number, from 0, or the choice itself."""
    topic: str = ""

    @model_validator(mode="after")
    def check(self) -> Question:
        """Refuse equal choices, and an answer that is not one of them."""
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are equal")
        is_choice = (
            self.answer in self.choices if isinstance(self.answer, str) else 0 <= self.answer < len(self.choices)
        )
        if not is_choice:
            raise ValueError(f"'answer' is {self.answer!r}; use a choice, or its number counted from 0")
        return self

    @property
    def right(self) -> int:
        """The number of the right choice."""
        return self.choices.index(self.answer) if isinstance(self.answer, str) else self.answer

    def pick(self, scores: Sequence[float], *, by_length: bool = False) -> int:
        """Return the number of the most likely choice, the first of equals; `by_length` divides by characters."""
        sizes = [len(choice) if by_length else 1 for choice in self.choices]
        values = [score / size for score, size in zip(scores, sizes, strict=True)]
        return values.index(max(values))


def read_questions(sources: Sequence[str]) -> list[Question]:
    """Read JSON lines files of `question`, `choices`, `answer` and `topic`; `own` means the questions of llmtune.

    Paths are absolute. Raises one DataError for all missing or empty files and all bad lines.
    """
    return read_sources(sources, read_lines, "question", FIX)


def read_lines(source: str) -> list[Question | Problem]:
    """Read the questions of one file, with a Problem for each bad line."""
    name = "general/questions.jsonl"
    text = OWN_FILES.joinpath(name).read_text("utf-8") if source == OWN else read_utf8(Path(source), FIX)
    items: list[Question | Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            items.append(Question.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            what = ": ".join([".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")])
            items.append(Problem(what.removeprefix(": "), f"{source}:{number}", FIX))
    return items


def question_tree(question: Question, processor: PreTrainedTokenizerBase) -> Tree:
    """Join a question with each of its choices, separated by a space, without a chat template."""
    prompt = PROMPT.format(question=question.question)
    start = max(1, len(prompt_ids(prompt, processor)))
    texts = [prompt_ids(f"{prompt} {choice}", processor) for choice in question.choices]
    return make_tree(texts, [start] * len(texts))


# General text in windows of tokens, and the nats of each paragraph


WINDOW = 512
"""Window size in tokens, if the model's context is as large."""
LONGEST_PARAGRAPH = 2000
"""Longest paragraph in characters; a longer one is split at white space."""
BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
TEXT_FIX = "Use a plain text file in UTF-8."


@dataclass(frozen=True)
class GeneralText:
    """A text as paragraphs; joined, they give the text."""

    name: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Passages:
    """Texts as tokens of one model."""

    windows: tuple[Example, ...]
    """Tokens of one forward pass, and the span of them that is scored."""
    paragraphs: tuple[tuple[int, ...], ...]
    """Per window, the paragraph number of each scored token, counted over all texts."""
    tokens: Floats
    """[U] scored tokens."""
    sizes: Floats
    """[U] UTF-8 bytes of the scored text."""
    text_of: tuple[int, ...]
    """[U] the text each paragraph is from."""


def read_texts(sources: Sequence[str]) -> tuple[GeneralText, ...]:
    """Read text files; `own` means the texts that ship with llmtune. Paths are absolute.

    Raises one DataError for all files that are missing, empty or not UTF-8.
    """
    return tuple(read_sources(sources, read_source, "text", TEXT_FIX))


def read_source(source: str) -> list[GeneralText]:
    """Read one text file; `own` means those that ship with llmtune."""
    if source != OWN:
        text = make_text(Path(source).name, read_utf8(Path(source), TEXT_FIX))
        return [text] if text.paragraphs else []
    files = [file for file in OWN_FILES.joinpath("general").iterdir() if file.name.endswith(".txt")]
    files.sort(key=lambda file: file.name)
    return [make_text(file.name.removesuffix(".txt"), file.read_text("utf-8")) for file in files]


def make_text(name: str, text: str) -> GeneralText:
    """Cut a text into paragraphs, each with the blank lines after it."""
    text = text.replace("\r\n", "\n").strip()
    cuts = [0, *(match.end() for match in BLANK_LINES.finditer(text)), len(text)]
    blocks = [text[left:right] for left, right in pairwise(cuts) if right > left]
    return GeneralText(name, tuple(part for block in blocks for part in cut_long(block)))


def cut_long(block: str) -> list[str]:
    """Split an overlong paragraph at white space, or anywhere if it has none."""
    parts = []
    while len(block) > LONGEST_PARAGRAPH:
        at = block.rfind(" ", 1, LONGEST_PARAGRAPH)
        at = LONGEST_PARAGRAPH if at < 0 else at
        parts.append(block[:at])
        block = block[at:]
    return [*parts, block]


def make_passages(texts: Sequence[GeneralText], processor: PreTrainedTokenizerBase, context: int | None) -> Passages:
    """Tokenize texts and lay windows over them that score each token once.

    This follows the guide "Perplexity of fixed-length models" of transformers. A window is as long as the context, at
    most 512 tokens. The next one starts half a window later and scores only its new tokens. Windows begin with the
    start token if the tokenizer adds one to every text; otherwise a text's first token is not scored.
    """
    start = start_ids(processor)
    room = min(context or WINDOW, WINDOW) - len(start)
    windows: list[Example] = []
    paragraphs: list[tuple[int, ...]] = []
    sizes: list[int] = []
    text_of: list[int] = []
    for number, text in enumerate(texts):
        ids, paragraph_of = to_tokens(text, processor)
        begin, done = 0, 0 if start else 1
        while done < len(ids):
            end = min(len(ids), begin + room)
            window = [*start, *ids[begin:end]]
            windows.append(Example(window, (len(start) + done - begin, len(window)), 0))
            paragraphs.append(tuple(len(sizes) + paragraph for paragraph in paragraph_of[done:end]))
            begin, done = begin + max(1, room // 2), end
        sizes += [len(paragraph.encode()) for paragraph in text.paragraphs]
        if not start:
            sizes[-len(text.paragraphs)] -= len(str(processor.decode(ids[:1])).encode())
        text_of += [number] * len(text.paragraphs)
    tokens = np.bincount([one for window in paragraphs for one in window], minlength=len(sizes)).astype(np.float64)
    return Passages(tuple(windows), tuple(paragraphs), tokens, np.asarray(sizes, dtype=np.float64), tuple(text_of))


def to_tokens(text: GeneralText, processor: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of a text, and the number of the paragraph in which each begins.

    A tokenizer without offsets encodes each paragraph on its own.
    """
    if not processor.is_fast:
        apart = encode_texts(processor, text.paragraphs)["input_ids"]
        return [i for ids in apart for i in ids], [number for number, ids in enumerate(apart) for _ in ids]
    whole = encode_texts(processor, ["".join(text.paragraphs)])
    ends = np.cumsum([len(paragraph) for paragraph in text.paragraphs])
    begins = [left for left, _ in whole.encodings[0].offsets]
    paragraphs = np.minimum(np.searchsorted(ends, begins, side="right"), len(ends) - 1)
    return list(whole["input_ids"][0]), paragraphs.tolist()


def score_passages(model: torch.nn.Module, passages: Passages, device: str, advance: Advance) -> Floats:
    """Return the nats of each paragraph [U]; several processes share the windows."""
    windows, paragraphs = passages.windows, len(passages.tokens)

    def share(indexes: Sequence[int]) -> list[Floats]:
        def work(batch: list[int]) -> list[Floats]:
            chosen = [indexes[i] for i in batch]
            rows_S = torch.tensor([paragraph for i in chosen for paragraph in passages.paragraphs[i]])
            collated = collate_padded([windows[i] for i in chosen], None) | {"rows_S": rows_S, "n_rows": paragraphs}
            loss = causal_loss(model, move_to(device, collated), True)
            assert loss.row_sums is not None
            return [loss.row_sums.double().cpu().numpy(), *[np.zeros(paragraphs)] * (len(batch) - 1)]

        lengths = [len(windows[i].input_ids) for i in indexes]
        return run_in_batches(lengths, budget_for(device, TOKEN_BUDGET), work, advance)

    return np.asarray(np.sum([np.zeros(paragraphs), *over_processes(model, range(len(windows)), share)], axis=0))
