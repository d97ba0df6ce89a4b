"""Few possible answers, compared by likelihood: a score that does not depend on how an answer is worded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llmtune.errors import DataError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.shared_prefix import Tree, make_tree
from llmtune.records import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

MOST_CHOICES = 20
LONGEST_CHOICE = 80
"""Characters of an answer that still counts as one of a few."""
ENCODED_CHARACTERS = 1_000_000
"""What is encoded at once: the tokenizer's offsets take 50 times the text."""
ROWS_A_CHOICE = 2
"""Answers that appear less often than this on average are not a list of choices."""
SIGNATURE = "the likeliest of {count} answers: sum of log-probabilities, end-of-turn included, not divided by length"


def find_choices(answers: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct answers, sorted, if they are few, short and repeated; none (and stop reading) if not."""
    found: set[str] = set()
    rows = 0
    for answer in answers:
        rows += 1
        found.add(answer)
        if len(found) > MOST_CHOICES or not answer.strip() or len(answer) > LONGEST_CHOICE:
            return ()
    return tuple(sorted(found)) if 2 <= len(found) <= rows / ROWS_A_CHOICE else ()


def check_choices(choices: Sequence[str], references: Sequence[str]) -> None:
    """Refuse a list of choices that holds none of the reference answers.

    Raises DataError.
    """
    if references and not set(choices) & set(references):
        raise DataError.of(
            f"no reference answer is one of the choices; the first reference is {references[0]!r}",
            "evaluate.choices",
            f"List the answers as they stand in the data, or set it to auto; given: {', '.join(map(repr, choices))}.",
        )


def with_answer(prompt: Row, answer: str) -> Row:
    """Put an answer to a row that has none."""
    if "messages" in prompt:
        return {**prompt, "messages": [*prompt["messages"], {"role": "assistant", "content": answer}]}
    return {**prompt, "completion": answer}


def choice_trees(
    prompts: Sequence[Row],
    choices: Sequence[str],
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> list[Tree | None]:
    """Encode each prompt with each choice as the task encodes its rows; None where one of them is too long.

    The scored tokens are those of the last supervised span: with `train_on: last`, exactly the answer.
    """
    last = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on": "last"})})
    width, longest = len(choices), max((len(str(prompt)) for prompt in prompts), default=1)
    step = max(1, ENCODED_CHARACTERS // (width * longest))
    trees: list[Tree | None] = []
    for start in range(0, len(prompts), step):
        rows = [with_answer(prompt, choice) for prompt in prompts[start : start + step] for choice in choices]
        encoded = task.encode(rows, processor, last)
        assert len(encoded) == len(rows)
        trees += [join_choices(encoded[first : first + width]) for first in range(0, len(rows), width)]
    return trees


def join_choices(encoded: Sequence[list[Example] | str]) -> Tree | None:
    """Join the encodings of one prompt with each of its choices."""
    examples: list[Example] = []
    for parts in encoded:
        if isinstance(parts, str) or not parts:
            return None
        examples.append(parts[-1])
    starts = [max(1, example.spans[-2]) for example in examples]
    texts = [example.input_ids[: example.spans[-1]] for example in examples]
    if len({text[0] for text in texts}) > 1:
        return None
    return make_tree([[int(token) for token in text] for text in texts], starts)


def most_likely(scores: Sequence[float], choices: Sequence[str]) -> str:
    """Return the choice with the highest score, the first of equals."""
    return choices[max(range(len(choices)), key=lambda i: scores[i])]
