"""A conversation with a model: the ids it was trained on, an answer piece by piece, and what is remembered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from llmtune.errors import RecipeError
from llmtune.records import Row
from llmtune.serve.answer_stream import Delta
from llmtune.serve.served_model import ServedModel

if TYPE_CHECKING:
    from rich.console import Console


class ChatSession:
    """Answers prompts with one model, and remembers the conversation where it is asked to.

    Ids are made by `task.prompt_ids`, as in training and evaluation, and generation follows `recipe.generation`. With
    `do_sample` the random draws start from the recipe's seed and the number of messages before the answer: the same
    conversation goes the same way again.
    """

    def __init__(self, served: ServedModel, console: Console | None = None) -> None:
        self.served, self.recipe, self.task, self.console = served, served.recipe, served.task, console
        self.history: list[dict[str, str]] = []
        self.forgotten = 0
        """Messages at the start of the history that have no room in the model's context."""

    def reset(self) -> None:
        """Forget the conversation."""
        self.history, self.forgotten = [], 0

    def answer(self, prompt: str, *, system: str | None = None, keep: bool = False) -> Iterator[Delta]:
        """Yield the answer to `prompt` in pieces; their contents joined are what evaluation would have got.

        Args:
            prompt: the user's message; in task completion the text to continue.
            system: a system message before everything else (chat alone).
            keep: go on from the history, and remember prompt and answer once it is complete (chat alone).

        Raises:
            RecipeError: the task has no conversations, or the prompt has no room in the model's context.
            DataError: the chat template does not take these messages.
        """
        if not self.task.is_conversational:
            if keep or system:
                what = "this run continues a text (task completion): it holds no conversation"
                raise RecipeError.of(what, fix="Use: llmtune generate RUN --prompt TEXT")
            yield from self._generate(self._fit([{"prompt": prompt, "completion": ""}]), 0)
            return
        head = [{"role": "system", "content": system}] if system else []
        messages = [*(self.history if keep else []), {"role": "user", "content": prompt}]
        questions = [at for at, message in enumerate(messages) if message["role"] == "user"]
        ids = self._fit([{"messages": [*head, *messages[at:]]} for at in questions])
        pieces = []
        for piece in self._generate(ids, len(messages)):
            pieces.append(piece)
            yield piece
        if keep:
            answer = {"role": "assistant", "content": "".join(piece.content for piece in pieces)}
            thoughts = "".join(piece.reasoning for piece in pieces)
            self.history = [*messages, answer | ({"reasoning": thoughts} if thoughts else {})]

    def _fit(self, rows: list[Row]) -> list[int]:
        """Return the ids of the first row that leaves room for an answer; each next row remembers one question less."""
        room, new = self.served.context, self.recipe.generation.max_new_tokens
        ids: list[int] = []
        for row in rows:
            ids = self.task.prompt_ids(row, self.served.processor, self.recipe)
            if room is None or len(ids) + new <= room:
                forgotten = len(rows[0].get("messages", ())) - len(row.get("messages", ()))
                if forgotten > self.forgotten and self.console is not None:
                    text = f"[dim]The model's context is full: the first {forgotten} messages are left out.[/]"
                    self.console.print(text)
                self.forgotten = forgotten
                return ids
        what = f"the prompt has {len(ids)} tokens and the answer may have {new}, but the model's context holds {room}"
        fix = "Shorten the prompt, or lower the number of new tokens."
        raise RecipeError.of(what, "generation.max_new_tokens", fix)

    def _generate(self, prompt: list[int], turn: int) -> Iterator[Delta]:
        """Generate in a second thread and yield what becomes certain; closing the iterator ends the thread."""
        queue: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                self.served.generate(prompt, self.recipe, self.recipe.seed + turn, queue.put, cancelled.is_set)
                queue.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for text
                queue.put(error)

        stream = self.served.stream(prompt, chat=True)
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (new := queue.get()) is not None:
                if isinstance(new, BaseException):
                    raise new
                if piece := stream.add(new):
                    yield piece
            if rest := stream.close():
                yield rest
        finally:
            cancelled.set()
            worker.join()
