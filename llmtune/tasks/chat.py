"""Task chat: answer the conversation so far, in the model's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_template import render_prompt
from llmtune.data.collators import causal_collator
from llmtune.model import causal_loss
from llmtune.records import Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


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
    collator=causal_collator,
    loss=causal_loss,
    prompt=prompt,
    render=render,
    packs=True,
)
FORMS = (CHAT,)
