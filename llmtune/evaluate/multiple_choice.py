"""Questions with a few answers to choose from, read from files and answered by likelihood."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.chat_encoding import prompt_ids
from llmtune.errors import DataError, Problem
from llmtune.evaluate.shared_prefix import Tree, grow_tree
from llmtune.recipe.eval_suites_section import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = "Question: {question}\nAnswer:"
"""As lm-eval puts ARC and its like; what follows is a space and the answer."""
KEYS = ("question", "choices", "answer", "topic")
MOST_CHOICES = 26
FIX = 'Write a line like {"question": "What do cows eat?", "choices": ["grass", "stones"], "answer": 0}.'


@dataclass(frozen=True)
class Question:
    """One question, and which of its choices is right."""

    text: str
    choices: tuple[str, ...]
    answer: int
    topic: str = ""


def read_quiz(places: Sequence[str]) -> tuple[Question, ...]:
    """Read JSON lines files of `question`, `choices`, `answer` (a number from 0, or the choice itself) and `topic`.

    `own` are the questions that come with llmtune; paths are absolute.

    Raises DataError for files that are missing or empty and for lines that are no questions: all of them at once.
    """
    found: list[Question] = []
    problems: list[Problem] = []
    for place in places:
        before = len(found) + len(problems)
        try:
            text = read_own() if place == OWN else Path(place).read_bytes().decode("utf-8-sig")
        except OSError as error:
            problems.append(Problem(f"cannot be read: {error.strerror}", place, "Name a JSON lines file."))
            continue
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            problems.append(Problem("is no UTF-8", f"{place}:{line}", "Name a JSON lines file in UTF-8."))
            continue
        for number, written in enumerate(text.splitlines(), start=1):
            if written.strip():
                question = read_question(written)
                if isinstance(question, str):
                    problems.append(Problem(question, f"{place}:{number}", FIX))
                else:
                    found.append(question)
        if len(found) + len(problems) == before:
            problems.append(Problem("there is no question in it", place, FIX))
    DataError.collect(problems)
    return tuple(found)


def read_own() -> str:
    """Return the questions that come with llmtune, as their file has them."""
    return (resources.files("llmtune.evaluate") / "general" / "questions.jsonl").read_text("utf-8")


def read_question(line: str) -> Question | str:
    """Read one line, or say what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"is not valid JSON: {error}"
    if not isinstance(row, dict):
        return f"holds a {type(row).__name__} where an object is expected"
    if wrong := next(find_faults(row), None):
        return wrong
    choices = tuple(row["choices"])
    answer = row["answer"]
    return Question(
        row["question"].strip(),
        choices,
        choices.index(answer) if isinstance(answer, str) else answer,
        row.get("topic", ""),
    )


def find_faults(row: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a question, the first of which is told."""
    choices, answer = row.get("choices"), row.get("answer")
    if unknown := [key for key in row if key not in KEYS]:
        yield f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}"
    if not is_text(row.get("question")):
        yield "'question' is no text"
    if not isinstance(choices, list) or not all(map(is_text, choices)):
        yield "'choices' is no list of texts"
        return
    if not 2 <= len(choices) <= MOST_CHOICES:
        yield f"there are {len(choices)} choices, and 2 to {MOST_CHOICES} are needed"
    if len(set(choices)) < len(choices):
        yield "a choice stands there twice"
    if isinstance(answer, str) and answer not in choices:
        yield f"'answer' is {answer!r}, which is none of the choices"
    elif not isinstance(answer, str) and (
        not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices)
    ):
        yield f"'answer' is {answer!r}, and a number from 0 to {len(choices) - 1} or a choice is needed"
    if not isinstance(row.get("topic", ""), str):
        yield "'topic' is no text"


def is_text(value: Any) -> bool:
    """Whether a value is text that says something."""
    return isinstance(value, str) and bool(value.strip())


def plant(questions: Sequence[Question], processor: PreTrainedTokenizerBase) -> list[Tree]:
    """Grow the tree of each question: it, and behind a space each of its choices; without a chat template."""
    trees = []
    for question in questions:
        prompt = FORM.format(question=question.text)
        begin = max(1, len(prompt_ids(prompt, processor)))
        texts = [prompt_ids(f"{prompt} {choice}", processor) for choice in question.choices]
        trees.append(grow_tree(texts, [begin] * len(texts)))
    return trees


def pick(scores: Sequence[float], question: Question, *, by_length: bool) -> int:
    """Return the number of the likeliest choice, the first of equals; `by_length` divides by its characters."""
    sizes = [len(choice) if by_length else 1 for choice in question.choices]
    values = [score / size for score, size in zip(scores, sizes, strict=True)]
    return values.index(max(values))
