"""What a server offers under one name: a model with one of its adapters at work, and how it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from llmtune.evaluate.generation import answer_ends, decode_answer
from llmtune.model.memory_plan import context_length
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


@dataclass(eq=False)
class Served:
    """A model under a name; those that share `model` differ in their adapter."""

    name: str
    model: PreTrainedModel
    processor: PreTrainedTokenizerBase
    recipe: Recipe
    task: AnyTask
    adapter: str | None = None
    """The adapter's name in the PEFT model; None: the base with all of them switched off, or a model without any."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        self.stops = set(answer_ends(self.model, self.processor, self.recipe))
        self.context = context_length(self._inner.config)
        """Tokens that the model's positions reach; None where it does not say."""
        self.vocabulary = int(self._inner.get_input_embeddings().weight.shape[0]) if self.writes else 0

    @property
    def device(self) -> str:
        """Where the model lies."""
        return str(self.model.device)

    @property
    def writes(self) -> bool:
        """Whether an answer is written token by token behind its prompt; else `task.predict` gives it."""
        return self.task.continues_text

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Switch the model to this adapter within the block."""
        if not isinstance(self.model, PeftModel):
            yield
        elif self.adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            if self.model.active_adapter != self.adapter:
                self.model.set_adapter(self.adapter, inference_mode=True)
            yield

    def decode(self, ids: Sequence[int]) -> str:
        """Turn the ids of an answer into its text, without what ends it."""
        return decode_answer(ids, self.stops, self.processor)

    @property
    def _inner(self) -> Any:
        inner: torch.nn.Module = self.model
        return inner.get_base_model() if isinstance(inner, PeftModel) else inner
