"""Encodes a prompt with one of its answers, for the losses of `preference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_rows import answer_message
from llmtune.data.completion_encoding import encode_completion
from llmtune.data.example import Example
from llmtune.data.task_interface import Encoded
from llmtune.recipe.schema import Recipe
from llmtune.records import Row


def encode_answers(
    rows: Sequence[Row], answers: Sequence[str], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Encoded]:
    """Return one example per row: its prompt with one answer, supervised on the answer; or the reason why not."""
    data = recipe.data.model_copy(update={"train_on": "last", "on_overlong": "drop"})
    alone = recipe.model_copy(update={"data": data})
    written: list[Any] = [training_row(row, answer, processor) for row, answer in zip(rows, answers, strict=True)]
    return (encode_chat if processor.chat_template else encode_completion)(written, processor, alone)


def encode_whole(
    rows: Sequence[Row], answers: Sequence[str], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Encoded]:
    """Encode answers of any length, as `encode_answers` does."""
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 1 << 30})})
    return encode_answers(rows, answers, processor, whole)


def encode_mismatched(
    rows: Sequence[Row], answers: Sequence[str], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Encoded]:
    """Encode each prompt with the next differing answer, cyclically; with its own if all are equal.

    Longer examples are cut to `data.max_length`.
    """
    limit = recipe.data.max_length
    others = [
        next((a for a in (*answers[i + 1 :], *answers) if a != answer), answer) for i, answer in enumerate(answers)
    ]
    encoded = encode_whole(rows, others, processor, recipe)
    return [parts if isinstance(parts, str) else [cut_example(part, limit) for part in parts] for parts in encoded]


def cut_example(example: Example, limit: int) -> Example:
    """Return the first `limit` tokens of an example."""
    spans = [min(border, limit) for border in example.spans]
    return Example(example.input_ids[:limit], spans, example.target_bytes)


def training_row(row: Row, answer: str, processor: PreTrainedTokenizerBase) -> Row:
    """Return a chat row made of a prompt and an answer (a completion row for a model without a template)."""
    if processor.chat_template:
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return {"messages": [*row["messages"], answer_message(answer)], **tools}
    text = "\n\n".join(str(message["content"]) for message in row["messages"])
    return {"prompt": f"{text}\n", "completion": answer}
