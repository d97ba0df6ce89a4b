"""Task chat: answer the conversation so far, in the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data.collate import choose_collate
from llmtune.data.encode import encode_chat
from llmtune.data.template import render_prompt
from llmtune.model import causal_loss
from llmtune.records import Example, Loss, Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


def loss(model: PreTrainedModel, batch: dict[str, Any], by_row: bool = False) -> Loss:
    """Return the summed cross entropy of the supervised tokens, and their count."""
    return causal_loss(model, batch, by_row)


def collate(examples: Sequence[Example], packed: bool, pad_id: int | None) -> dict[str, Any]:
    """Return the tensors of one micro-batch; `llmtune.data.collate` has the legend."""
    return choose_collate(packed)(examples, pad_id)


def prompt(row: Row) -> tuple[Row, str]:
    """Split a row at its last trained answer: the conversation before it, and the answer as text.

    Where no answer may be trained on (`train: false` on all), the last one is taken.
    """
    messages = row["messages"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return row, ""
    last = [i for i in answers if messages[i].get("train", True)] or answers
    return {**row, "messages": messages[: last[-1]]}, messages[last[-1]].get("content") or ""


def render(row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the token ids to generate an answer from."""
    return render_prompt(row["messages"], processor, recipe, tools=row.get("tools"))


CHAT = Task(
    name="chat",
    auto_class="AutoModelForCausalLM",
    peft_task_type="CAUSAL_LM",
    encode=encode_chat,
    collate=collate,
    loss=loss,
    prompt=prompt,
    render=render,
)
