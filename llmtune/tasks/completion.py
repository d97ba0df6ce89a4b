"""Task completion: go on from a prompt, or from nothing, without a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.data.encode import encode_completion, prompt_ids
from llmtune.records import Row, Task
from llmtune.tasks.chat import collate, loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its completion, and the completion."""
    return {**row, "completion": ""}, row["completion"]


def render(row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the token ids to generate a completion from."""
    return prompt_ids(row["prompt"], processor)


COMPLETION = Task(
    name="completion",
    auto_class="AutoModelForCausalLM",
    peft_task_type="CAUSAL_LM",
    encode=encode_completion,
    collate=collate,
    loss=loss,
    prompt=prompt,
    render=render,
)
