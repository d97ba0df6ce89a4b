"""Task completion: go on from a prompt, or from nothing, without a chat template; or fill in what is masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmtune.data.chat_rows import CompletionRow
from llmtune.data.collators import causal_collator
from llmtune.data.completion_encoding import encode_completion, prompt_ids
from llmtune.data.label_encoding import encode_masked
from llmtune.data.target_collators import masked_collator
from llmtune.data.task_interface import Encoded
from llmtune.evaluate.task_predictions import fill_masks
from llmtune.model import causal_loss
from llmtune.records import Advance, Batch, Collate, Loss
from llmtune.tasks.base import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


class Completion(Task[CompletionRow, str]):
    """A decoder that goes on from a text."""

    name = "completion"
    auto_class = "AutoModelForCausalLM"
    peft_task_type: str | None = "CAUSAL_LM"
    packs = True
    predicts = False
    continues_text = True
    free_prompt = True

    def matches(self, recipe: Recipe) -> bool:
        """Whether the next token is predicted."""
        return not is_masked(recipe)

    def make_row(self, given: Mapping[str, str | None]) -> CompletionRow:
        """Return the row of a text to go on from."""
        return {"prompt": given["prompt"] or "", "completion": ""}

    def split_answer(self, row: CompletionRow) -> tuple[CompletionRow, str]:
        """Return the row without its completion, and the completion."""
        return {**row, "completion": ""}, row["completion"]

    def encode(
        self, rows: Sequence[CompletionRow], processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Encoded]:
        """Return the examples of each text."""
        return encode_completion(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what packs rows, or pads them."""
        return causal_collator(processor, recipe, packs)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the tokens that are learned."""
        return causal_loss(model, batch, by_row)

    def prompt_ids(self, row: CompletionRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to generate a completion from."""
        return prompt_ids(row["prompt"], processor)


class MaskedCompletion(Completion):
    """An encoder that fills in masked tokens."""

    auto_class = "AutoModelForMaskedLM"
    peft_task_type = None
    predicts = True
    continues_text = False
    free_prompt = False

    def matches(self, recipe: Recipe) -> bool:
        """Whether masked tokens are predicted."""
        return is_masked(recipe)

    def split_answer(self, row: CompletionRow) -> tuple[CompletionRow, str]:
        """Return the row itself: a text has no answer of its own."""
        return row, ""

    def encode(
        self, rows: Sequence[CompletionRow], processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Encoded]:
        """Return examples of plain text, of which a share of the tokens is hidden when a batch is made."""
        return encode_masked(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what hides tokens, and packs rows or pads them."""
        return masked_collator(processor, recipe, bool(packs))

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[CompletionRow],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[str]:
        """Return each text with its masks filled in."""
        return fill_masks(model, rows, processor, recipe, device=device, advance=advance)


def is_masked(recipe: Recipe) -> bool:
    """Whether masked tokens are predicted."""
    return recipe.completion is not None and recipe.completion.objective == "masked"


VARIANTS = (Completion(), MaskedCompletion())
