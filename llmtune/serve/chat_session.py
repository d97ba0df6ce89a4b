"""A conversation with a model: the ids it was trained on, an answer piece by piece, and what is remembered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llmtune.errors import RecipeError
from llmtune.evaluate.generation import decode_answer, generation_settings, only_these_settings
from llmtune.records import Row
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the bytes of a character that lacks its rest; there are up to three of them."""


class ChatSession:
    """Answers prompts with one model, and remembers what was said where it is asked to.

    Ids are made by `task.prompt_ids`, as in training and evaluation, and generation follows `recipe.generation`. With
    `do_sample` the random draws start from the recipe's seed and the number of messages before the answer: the same
    conversation goes the same way again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        task: AnyTask,
        console: Console | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.recipe = recipe
        self.task = task
        self.console = console
        self.history: list[dict[str, Any]] = []
        self.forgotten = 0
        """Messages at the start of the history that have no room in the model's context."""

    def reset(self) -> None:
        """Forget the conversation."""
        self.history = []
        self.forgotten = 0

    def answer(self, prompt: str, *, system: str | None = None, keep: bool = False) -> Iterator[str]:
        """Yield the answer to `prompt` in pieces of text; joined they are what evaluation would have got.

        Args:
            prompt: what the user says; in task completion the text to go on from.
            system: a system message before everything else (chat alone).
            keep: go on from the history, and remember prompt and answer once it is complete (chat alone).

        Raises:
            RecipeError: the task has no conversations, or the prompt has no room in the model's context.
            DataError: the chat template does not take these messages.
        """
        if not self.task.is_conversational:
            if keep or system:
                what = "this run goes on from a text (task completion): it knows no conversation"
                raise RecipeError.of(what, fix="Use: llmtune generate RUN --prompt TEXT")
            yield from self._generate(self._fit([{"prompt": prompt, "completion": ""}]), 0)
            return
        head = [{"role": "system", "content": system}] if system else []
        said = [*(self.history if keep else []), {"role": "user", "content": prompt}]
        questions = [at for at, message in enumerate(said) if message["role"] == "user"]
        ids = self._fit([{"messages": [*head, *said[at:]]} for at in questions])
        pieces = []
        for piece in self._generate(ids, len(said)):
            pieces.append(piece)
            yield piece
        if keep:
            self.history = [*said, {"role": "assistant", "content": "".join(pieces)}]

    def _fit(self, rows: list[Row]) -> list[int]:
        """Return the ids of the first row that leaves room for an answer; each next row remembers one question less."""
        room = context_length(self.model)
        new = self.recipe.generation.max_new_tokens
        ids: list[int] = []
        for row in rows:
            ids = self.task.prompt_ids(row, self.processor, self.recipe)
            if room is None or len(ids) + new <= room:
                self._note_forgotten(len(rows[0].get("messages", ())) - len(row.get("messages", ())))
                return ids
        what = f"the prompt has {len(ids)} tokens and the answer may have {new}, but the model's context holds {room}"
        raise RecipeError.of(
            what, "generation.max_new_tokens", "Shorten the prompt, or lower the number of new tokens."
        )

    def _note_forgotten(self, messages: int) -> None:
        if messages > self.forgotten and self.console is not None:
            self.console.print(f"[dim]The model's context is full: the first {messages} messages are left out.[/]")
        self.forgotten = messages

    def _generate(self, ids: list[int], turn: int) -> Iterator[str]:
        """Generate in a second thread and yield text as it becomes certain; closing the iterator ends the thread."""
        settings = generation_settings(self.model, self.processor, self.recipe)
        stops = {int(token) for token in settings.eos_token_id or ()}
        stream = _Stream()
        worker = threading.Thread(target=self._work, args=(ids, turn, settings, stream), daemon=True)
        worker.start()
        try:
            yield from stream.texts(lambda new: decode_answer(new, stops, self.processor))
        finally:
            stream.cancelled.set()
            worker.join()

    def _work(self, ids: list[int], turn: int, settings: Any, stream: _Stream) -> None:
        device = self.model.device
        ids_BT = torch.tensor([ids], device=device)
        beams = settings.num_beams > 1  # they have no text to show before their end
        try:
            with torch.random.fork_rng(), only_these_settings(self.model):
                torch.manual_seed(self.recipe.seed + turn)
                out_BT = cast(Any, self.model).generate(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    generation_config=settings,
                    streamer=None if beams else stream,
                    stopping_criteria=StoppingCriteriaList([_Cancel(stream.cancelled)]),
                )
            if beams:
                stream.queue.put(out_BT[0, len(ids) :].tolist())
                stream.end()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for text
            stream.queue.put(error)


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Hands new token ids from the thread that generates to the one that reads."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self.cancelled = threading.Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take what `generate` hands over: first the prompt, then a token at a time."""
        if self.prompt_seen:
            self.queue.put(value.reshape(-1).tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """Mark the end of the answer."""
        self.queue.put(None)

    def texts(self, decode: Any) -> Iterator[str]:
        """Yield what each new token adds to the decoded text; a character that is not complete waits for its rest."""
        ids: list[int] = []
        told = text = ""
        while (new := self.queue.get()) is not None:
            if isinstance(new, BaseException):
                raise new
            ids += new
            text = decode(ids)
            certain = text[:-3] + text[-3:].rstrip(UNFINISHED)
            if len(certain) > len(told) and certain.startswith(told):
                yield certain[len(told) :]
                told = certain
        if rest := text.removeprefix(told):
            yield rest


class _Cancel(StoppingCriteria):  # type: ignore[misc]
    """Ends generation when nobody reads any more."""

    def __init__(self, cancelled: threading.Event) -> None:
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), device=input_ids.device)


def context_length(model: torch.nn.Module) -> int | None:
    """Return how many tokens the model's positions reach, or None where its configuration does not say."""
    config = cast(Any, model).config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None
