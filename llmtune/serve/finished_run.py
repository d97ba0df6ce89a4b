"""A finished run as an object: its scores, its gates, its model, and answers of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.results import load_evaluation
from llmtune.records import Evaluation, GateResult, ModelRef
from llmtune.serve.chat_session import ChatSession
from llmtune.serve.generate import answer as answer_request
from llmtune.serve.generate import check_request, load_session
from llmtune.session import RunContext, open_finished
from llmtune.store.run_folder import read_run, recipe_of_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


@dataclass
class FinishedRun:
    """A run that was trained. Its model is loaded when it is used for the first time, and kept.

    Example:
        ```python
        run = llmtune.load_run("runs/support-chat-1a2b3c4d")
        run.scores["tuned"]["exact_match"]
        run.generate("Where is my parcel?")
        ```
    """

    folder: Path
    offline: bool = False
    _sessions: dict[bool, ChatSession] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        read_run(self.folder).require_trained()

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return recipe_of_run(read_run(self.folder)).recipe

    @cached_property
    def report(self) -> dict[str, Any]:
        """What report.json holds."""
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text("utf-8"))
        return report

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """Scores, differences with their intervals, samples; None where the run was not evaluated."""
        return load_evaluation(self.folder / "evaluation")

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The scores of `base` and `tuned` model by the names that gates use; empty where there are none."""
        found = self.evaluation
        return {model: found.by_name(model) if found else {} for model in ("base", "tuned")}

    @property
    def gates(self) -> tuple[GateResult, ...]:
        """What became of each gate of the recipe."""
        found = self.evaluation
        return tuple(check_gates(self.recipe.evaluate.gates, found)) if found else ()

    def generate(
        self,
        prompt: str | None = None,
        *,
        system: str | None = None,
        context: str | None = None,
        pair: str | None = None,
        audio: str | Path | None = None,
        answer: str | None = None,
        base: bool = False,
        max_new_tokens: int | None = None,
    ) -> str:
        """Answer once with the tuned model, as `llmtune generate` does; each task takes what it asks for.

        Args:
            prompt: a message, a question, or the text to go on from or to work on.
            system: a system message before everything else (chat).
            context: the text that holds the answer (qa).
            pair: the second text of a pair (classify).
            audio: a recording (speech).
            answer: the answer to score (preference, reward).
            base: use the base model without the adapter.
            max_new_tokens: overrules the recipe's generation section.

        Raises:
            RecipeError: something is not given, or given and not used by this task.
            DataError: what is given cannot be used.
        """
        request = {"prompt": prompt, "system": system, "context": context, "pair": pair, "answer": answer}
        request["audio"] = None if audio is None else str(audio)
        check_request(*self._opened, request, base=base, max_new_tokens=max_new_tokens)
        session = self._session(base)
        if max_new_tokens is not None:
            longer = session.recipe.generation.model_copy(update={"max_new_tokens": max_new_tokens})
            recipe = session.recipe.model_copy(update={"generation": longer})
            session = ChatSession(session.model, session.processor, recipe, session.task)
        return str(answer_request(session, request)["text"])

    def model(self, *, base: bool = False) -> PreTrainedModel:
        """Return the tuned model with its adapter, or the base, in evaluation mode on the best device."""
        return self._session(base).model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer (of speech: the processor) with the chat template of the run."""
        return self._session(base=False).processor

    @cached_property
    def _opened(self) -> tuple[RunContext, ModelRef]:
        return open_finished(self.folder, Console(stderr=True, quiet=True), self.offline)

    def _session(self, base: bool) -> ChatSession:
        if base not in self._sessions:
            context, model_ref = self._opened
            self._sessions[base] = load_session(context, model_ref, context.console, base=base, max_new_tokens=None)
        return self._sessions[base]
