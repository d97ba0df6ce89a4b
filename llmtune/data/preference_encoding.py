"""Rows of preferences into token ids: a prompt with the better answer and with the worse, or with one and its thumb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_template import render_prompt
from llmtune.data.completion_encoding import encode_completion, prompt_ids
from llmtune.data.overlong import Encoded
from llmtune.records import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

_ANY_LENGTH = 1 << 30


def answer_columns(loss: str) -> tuple[str, ...]:
    """Name what a canonical row must hold beside its prompt for this loss."""
    return ("answer",) if loss == "kto" else ("chosen", "rejected")


def describe_rows(loss: str) -> str:
    """Say what kind of rows a loss learns from."""
    return "single answers with a thumb" if loss == "kto" else "pairs of a chosen and a rejected answer"


def encode_preference(rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: the prompt with the chosen answer and with the rejected one, the answers supervised.

    For KTO: the prompt with its answer, and with the answer to another of these rows, which the estimate of the KL
    divergence is made of; that one is cut at `data.max_length`, so that no row is lost for what another says.
    """
    loss = recipe.preference.loss if recipe.preference else "dpo"
    columns = answer_columns(loss)
    usable = [row for row in rows if all(name in row for name in columns)]
    if loss == "kto":
        answers = [row["answer"] for row in usable]
        left = encode_answers(usable, answers, processor, recipe)
        right = _mismatched(usable, _answers_of_others(answers), processor, recipe)
    else:
        left, right = (encode_answers(usable, [row[name] for row in usable], processor, recipe) for name in columns)
    joined = iter([_join(row, one, other) for row, one, other in zip(usable, left, right, strict=True)])
    wrong = f"preference.loss: {loss} learns from {describe_rows(loss)}"
    return [next(joined) if all(name in row for name in columns) else wrong for row in rows]


def encode_answers(
    rows: Sequence[Row], answers: Sequence[str], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Encoded]:
    """Return one example a row: its prompt with one answer, which alone is supervised; or the reason why not."""
    data = recipe.data.model_copy(update={"train_on": "last", "on_overlong": "drop"})
    alone = recipe.model_copy(update={"data": data})
    written: list[Any] = [with_answer(row, answer, processor) for row, answer in zip(rows, answers, strict=True)]
    return (encode_chat if processor.chat_template else encode_completion)(written, processor, alone)


def render_preference(row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the token ids to write an answer from."""
    if processor.chat_template:
        return render_prompt(row["messages"], processor, recipe, tools=row.get("tools"))
    return prompt_ids(with_answer(row, "", processor)["prompt"], processor)


def with_answer(row: Row, answer: str, processor: PreTrainedTokenizerBase) -> Row:
    """Return a row of chat (of completion, for a model without a template) out of a prompt and an answer."""
    if processor.chat_template:
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return {"messages": [*row["messages"], {"role": "assistant", "content": answer}], **tools}
    said = "\n\n".join(str(message["content"]) for message in row["messages"])
    return {"prompt": f"{said}\n", "completion": answer}


def _answers_of_others(answers: Sequence[str]) -> list[str]:
    """Return for each answer the next one that is another, from the start again behind the end; itself if none is."""
    return [next((a for a in (*answers[i + 1 :], *answers) if a != own), own) for i, own in enumerate(answers)]


def _mismatched(
    rows: Sequence[Row], answers: Sequence[str], processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Encoded]:
    limit = recipe.data.max_length
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": _ANY_LENGTH})})
    encoded = encode_answers(rows, answers, processor, whole)
    return [part if isinstance(part, str) else [_cut(example, limit) for example in part] for part in encoded]


def _cut(example: Example, limit: int) -> Example:
    ends = [min(border, limit) for border in example.spans]
    return Example(example.input_ids[:limit], ends, example.target_bytes)


def _join(row: Row, left: Encoded, right: Encoded) -> Encoded:
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else right
    (one,), (other,) = left, right
    if "chosen" in row and list(one.input_ids) == list(other.input_ids):
        return "chosen equals rejected: both answers are the same tokens"
    return [
        Example(
            one.input_ids,
            one.spans,
            one.target_bytes,
            target_ids=other.input_ids,
            target_spans=other.spans,
            values=[1.0 if row["good"] else -1.0] if "good" in row else [],
            counted=1,
            cost=len(one.input_ids) + len(other.input_ids),
        )
    ]
