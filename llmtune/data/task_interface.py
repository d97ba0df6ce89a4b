"""What data, model and training know of a task, with its defaults; the tasks are in `llmtune.tasks`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from llmtune.data.example import Collate, Example
from llmtune.data.tokenization import Segment, highlight
from llmtune.records import AdaptedModel, Batch, Loss, Rows

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe.schema import Recipe

Encoded: TypeAlias = list[Example] | str
"""The examples of a row, or the reason why it has none."""


class TaskInterface:
    """How rows become examples, batches and a loss, and what loads the model."""

    name: str
    auto_class: str
    """Name of the transformers class that loads the model."""
    peft_task_type: str | None = None
    """PEFT's name for the task, which says how its plain classes load the adapter; None: `AutoPeftModel`."""
    packs: bool = False
    """Whether rows may be packed end to end in one micro-batch, where the model keeps them apart."""
    predicts_tokens: bool = True
    """Whether the loss is that of predicting tokens of the vocabulary."""
    trains_head: bool = False
    """Whether a head that the model does not bring is made new and trained whole."""
    has_step_statistics: bool = False
    """Whether the loss of a part of a step needs sums over the whole step."""

    def encode(self, rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the examples of each row, or the reason why it has none."""
        raise NotImplementedError

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what makes micro-batches; `packs` as in `SelectedModel`.

        Without `packs`, rows of a decoder are packed if the recipe says so, and others are padded.
        """
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Return the summed loss and its count, of a model that PEFT or DDP may have wrapped."""
        raise NotImplementedError

    def start_head(self, adapted: AdaptedModel, examples: Iterable[Example], recipe: Recipe) -> None:
        """Set in place where a new head starts, by the examples that it will be trained on."""

    def guessing_loss(self, config: PretrainedConfig, examples: Iterable[Example], recipe: Recipe) -> float:
        """Return about what the loss is of guessing, whatever the input: a training is to stay below."""
        return math.log(config.get_text_config().vocab_size) if self.predicts_tokens else 1.0

    def step_statistics(self, model: torch.nn.Module, batch: Batch) -> list[float]:
        """Return sums that the loss needs of a whole step before it can be taken of a part of it."""
        return []

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether a model with this configuration will do, beyond having the class."""
        return True

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Set in place what the size of the head depends on."""

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Refuse what would go wrong later; called once the model is loaded."""

    def needs_reference_model(self, recipe: Recipe) -> bool:
        """Whether training compares with the model as it was, which is kept next to what is trained."""
        return False

    def highlighted_text(self, example: Example, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Segment]:
        """Return stretches of text, and whether they are learned, for a person to see."""
        return highlight(example.input_ids, example.spans, processor)

    def class_counts(self, rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
        """Return, by label, its rows (or entities) in each split; nothing for a task without labels."""
        return {}
