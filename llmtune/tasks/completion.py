"""Task completion: go on from a prompt, or from nothing, without a chat template; or fill in what is masked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.data.chat_encoding import encode_completion, prompt_ids
from llmtune.data.collators import causal_collator
from llmtune.data.label_encoding import encode_masked
from llmtune.data.target_collators import masked_collator
from llmtune.evaluate.task_predictions import fill_masks
from llmtune.model import causal_loss
from llmtune.records import Row, Task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its completion, and the completion."""
    return {**row, "completion": ""}, row["completion"]


def render(row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the token ids to generate a completion from."""
    return prompt_ids(row["prompt"], processor)


def is_masked(recipe: Recipe) -> bool:
    """Whether masked tokens are predicted."""
    return recipe.completion is not None and recipe.completion.objective == "masked"


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a text with masks in it."""
    return {"prompt": given["prompt"] or "", "completion": ""}


COMPLETION = Task(
    name="completion",
    auto_class="AutoModelForCausalLM",
    peft_task_type="CAUSAL_LM",
    encode=encode_completion,
    collator=causal_collator,
    loss=causal_loss,
    prompt=prompt,
    render=render,
    asks={"prompt": True},
    admits=lambda recipe: not is_masked(recipe),
    packs=True,
)
MASKED = Task(
    name="completion",
    auto_class="AutoModelForMaskedLM",
    peft_task_type=None,
    encode=encode_masked,
    collator=masked_collator,
    loss=causal_loss,
    prompt=lambda row: (row, ""),
    predict=fill_masks,
    measure=lambda metric, said, wanted, recipe, base=None: None,
    ask=ask,
    asks={"prompt": True},
    admits=is_masked,
    packs=True,
)
FORMS = (COMPLETION, MASKED)
