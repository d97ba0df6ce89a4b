"""The interface that data, model and training use for a task, with defaults; the tasks are in `llmtune.tasks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from llmtune.data.example import AnyExample, Collate, Example
from llmtune.data.tokenization import Segment, highlight
from llmtune.recipe.model_kind import ModelKind
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import AdaptedModel, Batch, Loss, Rows

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe.schema import Recipe

Encoded: TypeAlias = list[Example] | str
"""The examples of a row, or the reason why it has none."""
EncodeRows: TypeAlias = "Callable[[Sequence[Any], PreTrainedTokenizerBase, Recipe], list[Encoded]]"


class StepCosts(NamedTuple):
    """Costs of training examples in tokens, in one process."""

    longest: int
    """Of one example."""
    step: int
    """Of all examples of a step."""
    epoch: int | None
    """Of all examples; None before they are encoded."""


class HeadStart(NamedTuple):
    """What a new head starts at instead of random weights."""

    note: str
    warning: str = ""
    """Why this base may be a wrong choice for the rows."""


class TaskInterface:
    """Defines how rows become examples, batches and a loss, and how the model is loaded."""

    name: str
    model_kind: ModelKind
    """The kind of model that the task trains."""
    example_type: type[Example] = Example
    """The columns of its encoded rows."""
    rates_answers: bool = False
    """Whether rows come with answers that a prediction rates."""

    @property
    def packs(self) -> bool:
        """Return whether rows may be packed end to end in one micro-batch, if the model separates them."""
        return self.model_kind.packs and TASK_FACTS[self.name].packs

    @property
    def predicts_tokens(self) -> bool:
        """Return whether the loss is token prediction over the vocabulary."""
        return self.model_kind.predicts_tokens and not self.rates_answers

    def encode(self, rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the examples of each row, or the reason why it has none."""
        raise NotImplementedError

    def row_encoder(self) -> EncodeRows:
        """Return `encode` as a worker process gets it; a function of `llmtune.data` spares it the import of torch."""
        return self.encode

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return the function that makes micro-batches; `packs` as in `SelectedModel`.

        Without `packs`, a decoder's rows are packed if the recipe says so; other rows are padded.
        """
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Return the summed loss and its count; PEFT or DDP may have wrapped the model."""
        raise NotImplementedError

    def start_head(
        self, adapted: AdaptedModel, examples: Sequence[AnyExample], recipe: Recipe, *, whole: bool
    ) -> HeadStart | None:
        """Initialise a new head in place, from its training examples; return what it starts at, None if at random.

        The model can be run only if it is `whole`: not about to be sharded.
        """
        return None

    def guessing_loss(self, config: PretrainedConfig, examples: Iterable[AnyExample], recipe: Recipe) -> float:
        """Estimate the loss of guessing without looking at the input; training should get below it."""
        return math.log(config.get_text_config().vocab_size) if self.predicts_tokens else 1.0

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the task can use a model with this configuration, beyond its class."""
        return True

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Set in place the configuration that determines the head's size."""

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Refuse a model that would fail later; called after loading."""

    def check_examples(
        self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe, examples: Iterable[AnyExample]
    ) -> Iterator[tuple[int, str]]:
        """Yield the number of each example that a loaded model would read wrongly, and why; called before training."""
        return iter(())

    def needs_float32(self, recipe: Recipe) -> bool:
        """Whether rounding costs accuracy: an encoder's frozen weights are float32 in training, and a single output."""
        return False

    def needs_reference_model(self, recipe: Recipe) -> bool:
        """Whether training needs a frozen copy of the original model as reference."""
        return False

    def sampled_batch(self, recipe: Recipe, costs: StepCosts, device: str, column_bytes: int) -> tuple[int, int]:
        """Return rows and length in tokens of the largest batch of answers that training samples; 0 rows without.

        A token takes `column_bytes` in the KV cache.
        """
        return 0, costs.longest

    def highlighted_text(
        self, example: AnyExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Return pieces of text, each with whether it is supervised, for display."""
        return highlight(example.input_ids, example.spans, processor)

    def save_files(self, folder: Path, config: PretrainedConfig, recipe: Recipe) -> None:
        """Write the task's own files next to a saved model or adapter, whose configuration is `config`."""

    def infer_section(self, recipe: Recipe, rows: Rows | None) -> Recipe:
        """Return the recipe with settings that the rows decide, and that decide the variant; None: no rows yet."""
        return recipe

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Return the recipe completed with values inferred from the rows, such as class names."""
        return recipe

    def note_labels(self, stated: Recipe, inferred: Recipe) -> str | None:
        """Return what to tell the user about a choice of `infer_labels`, if anything."""
        return None

    def score_untuned(self, rows: Sequence[Any], *loaded: Any) -> tuple[str, float] | None:
        """Return the metric that ranks untuned models on rows, and its value; None: bits per byte ranks them.

        `loaded` are the model, its processor, the recipe and the device.
        """
        return None

    def answer_limit(self, recipe: Recipe) -> tuple[str, int] | None:
        """Return the recipe key that limits the tokens of an answer within a text, and its value; None without one."""
        return None

    def answer_size(self, example: AnyExample) -> int:
        """Return the tokens of an example's answer; for tasks with `answer_limit`."""
        raise NotImplementedError

    def class_counts(self, rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
        """Return, by label, the number of rows (or entities) per split; empty for a task without labels."""
        return {}
