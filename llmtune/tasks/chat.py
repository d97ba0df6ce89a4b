"""Task chat: answer a conversation, in the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_parser import ParsedAnswer, ToolTurn
from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_rows import ChatRow, Message, write_answer
from llmtune.data.chat_template import Expand, refuse_pictures, render_prompt
from llmtune.data.row_store import has_pictures
from llmtune.data.task_interface import Encoded, EncodeRows
from llmtune.recipe.model_kind import CAUSAL
from llmtune.recipe.schema import Recipe
from llmtune.records import Rows
from llmtune.tasks.base import Task


class Chat(Task[ChatRow, str]):
    """A decoder that answers conversations."""

    name = "chat"
    model_kind = CAUSAL
    optional_inputs: tuple[str, ...] = ("system",)
    free_prompt = True
    is_conversational = True

    def matches(self, recipe: Recipe) -> bool:
        """Whether questions have no pictures."""
        return not (recipe.chat and recipe.chat.images)

    def make_row(self, given: Mapping[str, str | None]) -> ChatRow:
        """Return a conversation of one question, after the system message if given."""
        return {"messages": question_messages(given)}

    def split_answer(self, row: ChatRow) -> tuple[ChatRow, str]:
        """Split a row at its last trained answer: the conversation before it, and the answer as text, calls included.

        If no answer is trained (`train: false` on all), split at the last answer.
        """
        messages, answers = row["messages"], answers_of(row)
        if not answers:
            return row, ""
        last = messages[answers[-1]]
        text = write_answer(last.get("content") or "", last.get("tool_calls", ()))
        return {**row, "messages": messages[: answers[-1]]}, text

    def take_answer(self, row: ChatRow, answer: ParsedAnswer) -> ChatRow:
        """Return the row with a generated last answer, which is the only one that is trained."""
        question: ChatRow = self.split_answer(row)[0]
        before: list[Message] = [
            {**one, "train": False} if one["role"] == "assistant" else one for one in question["messages"]
        ]
        written: Message = {"role": "assistant", "content": answer.text}
        if answer.reasoning is not None:
            written["reasoning"] = answer.reasoning
        if answer.tool_calls:  # Mistral's templates require ids
            written["tool_calls"] = [{**call, "id": f"call{i:05}"} for i, call in enumerate(answer.tool_calls)]
        return {**question, "messages": [*before, written]}

    def infer_section(self, recipe: Recipe, rows: Rows | None) -> Recipe:
        """Set `chat.images` if the recipe does not: whether the rows have pictures."""
        if rows is None or (recipe.chat and recipe.chat.images is not None):
            return recipe
        return recipe.with_section(images=has_pictures(rows))

    def tool_turns(self, row: ChatRow, recipe: Recipe) -> list[ToolTurn]:
        """Return all trained answers (with `train_on: last`, the last one), each with the recorded history."""
        if not row.get("tools"):
            return []
        messages, answers = row["messages"], answers_of(row)
        if recipe.data.train_on == "last":
            answers = answers[-1:]
        return [
            ToolTurn({**row, "messages": messages[:i]}, messages[i].get("tool_calls", ())) for i in answers if i > 0
        ]

    def encode(self, rows: Sequence[ChatRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the examples of each conversation."""
        return encode_chat(rows, processor, recipe, self.expander(processor, recipe))

    def row_encoder(self) -> EncodeRows:
        """Return a function that workers import without torch; a subclass may encode in another way."""
        return encode_chat if type(self) is Chat else self.encode

    def prompt_ids(self, row: ChatRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids of the rendered conversation, ready for the next answer."""
        reasoning, expand = row.get("train_reasoning"), self.expander(processor, recipe)
        return render_prompt(row["messages"], processor, recipe, row.get("tools"), reasoning, expand)

    def expander(self, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Expand:
        """Return the function that writes the tokens of pictures; this one refuses them."""
        return refuse_pictures


def answers_of(row: ChatRow) -> list[int]:
    """Return the indices of trained answers; of all answers if none is trained."""
    messages = row["messages"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [i for i in answers if messages[i].get("train", True)] or answers


def question_messages(given: Mapping[str, str | None]) -> list[Message]:
    """Return the messages of a prompt, after the system message if given."""
    head: list[Message] = [{"role": "system", "content": system}] if (system := given.get("system")) else []
    return [*head, {"role": "user", "content": given["prompt"] or ""}]


VARIANTS = (Chat(),)
