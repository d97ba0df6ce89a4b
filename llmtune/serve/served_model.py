"""What a server offers under one name: a model with one of its adapters active."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft import PeftModel

from llmtune.data.chat_template import Tools
from llmtune.evaluate.generation import answer_ends, answer_reader, answer_template, end_output
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.serve.answer_stream import AnswerStream
from llmtune.tasks.base import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


@dataclass(eq=False)
class ServedModel:
    """A model under a name; those that share `model` differ in their adapter."""

    name: str
    model: PreTrainedModel | PeftModel
    processor: PreTrainedTokenizerBase
    recipe: Recipe
    task: AnyTask
    adapter: str | None = None
    """The adapter's name in the PEFT model; None: the base with all of them switched off, or a model without any."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        inner = unwrap(self.model)
        self.stops = set(answer_ends(self.model, self.processor, self.recipe))
        self.template = answer_template(self.processor, self.recipe) if self.task.free_prompt else None
        self.context = context_length(inner.config)
        """Tokens that the model's positions reach; None where it does not say."""
        self.vocabulary = int(inner.get_input_embeddings().weight.shape[0]) if self.generates else 0

    @property
    def device(self) -> str:
        """Where the model lies."""
        return str(self.model.device)

    @property
    def generates(self) -> bool:
        """Whether an answer is generated token by token behind its prompt; else `task.predict` gives it."""
        return self.task.continues_text

    @contextmanager
    def activated(self) -> Iterator[None]:
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

    def read(self, ids: Sequence[int]) -> str:
        """Turn the ids of an answer into its text."""
        return answer_reader(self.processor, self.recipe)(end_output(ids, self.stops).token_ids, None).text

    def stream(
        self, prompt: Sequence[int], *, chat: bool, tools: Tools = None, stops: Sequence[str] = ()
    ) -> AnswerStream:
        """Return what takes the ids of an answer as they come; `chat` says that the template's parts are told apart."""
        return AnswerStream(self.processor, self.stops, self.template if chat else None, tools, stops, prompt)
