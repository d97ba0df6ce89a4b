"""Questions with a few answers to choose from, read from files and answered by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from llmtune.data.completion_encoding import prompt_ids
from llmtune.errors import Problem
from llmtune.evaluate.shared_prefix import Tree, make_tree
from llmtune.evaluate.suite_files import OWN_FILES, read_sources, read_utf8
from llmtune.recipe.eval_suites_section import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "Question: {question}\nAnswer:"
"""As lm-eval puts ARC and its like; what follows is a space and the answer."""
FIX = 'Write a line like {"question": "What do cows eat?", "choices": ["grass", "stones"], "answer": 0}.'


def not_blank(text: str) -> str:
    """Refuse a text of white space alone."""
    if not text.strip():
        raise ValueError("there is no text")
    return text


class Question(BaseModel):
    """One question, and which of its choices is right."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    question: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    choices: Annotated[tuple[Annotated[str, AfterValidator(not_blank)], ...], Field(min_length=2, max_length=26)]
    answer: int | str
    """Its number from 0, or the choice itself."""
    topic: str = ""

    @model_validator(mode="after")
    def check(self) -> Question:
        """Refuse choices that are equal, and an answer that is none of them."""
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are equal")
        known = self.answer in self.choices if isinstance(self.answer, str) else 0 <= self.answer < len(self.choices)
        if not known:
            raise ValueError(f"'answer' is {self.answer!r}; name a choice, or its number from 0 on")
        return self

    @property
    def right(self) -> int:
        """The number of the right choice."""
        return self.choices.index(self.answer) if isinstance(self.answer, str) else self.answer


def read_questions(sources: Sequence[str]) -> tuple[Question, ...]:
    """Read JSON lines files of `question`, `choices`, `answer` and `topic`; `own` are those that come with llmtune.

    Paths are absolute. Raises DataError for files that are missing or empty and for lines that are no questions: all
    of them at once.
    """
    return tuple(read_sources(sources, read_lines, "question", FIX))


def read_lines(source: str) -> list[Question | Problem]:
    """Read the questions of one file, and what is wrong with its other lines."""
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
    """Join a question, without a chat template, with each of its choices behind a space."""
    prompt = PROMPT.format(question=question.question)
    start = max(1, len(prompt_ids(prompt, processor)))
    texts = [prompt_ids(f"{prompt} {choice}", processor) for choice in question.choices]
    return make_tree(texts, [start] * len(texts))


def pick(scores: Sequence[float], question: Question, *, by_length: bool) -> int:
    """Return the number of the likeliest choice, the first of equals; `by_length` divides by its characters."""
    sizes = [len(choice) if by_length else 1 for choice in question.choices]
    values = [score / size for score, size in zip(scores, sizes, strict=True)]
    return values.index(max(values))
