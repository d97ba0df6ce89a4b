"""A finished run as an object: its scores, gates, model, answers and conversations."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.calibration import run_calibration
from llmtune.evaluate.decision import describe_answer, run_decision
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.generation import generate_completions
from llmtune.evaluate.suites.own_metrics import label_scores
from llmtune.model.config import why_headless
from llmtune.plan import RunContext, open_finished
from llmtune.recipe.arguments import check_arguments
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Prompt, Row
from llmtune.run_models import Models
from llmtune.serve.answer_stream import Delta
from llmtune.serve.served_model import ServedModel
from llmtune.store.process_environment import prepare_environment
from llmtune.store.process_state import as_in_new_process
from llmtune.store.report_record import require_report
from llmtune.store.run_folder import read_run, recipe_of_run
from llmtune.store.score_records import Evaluation, GateResult
from llmtune.tasks.base import AnyTask, option_of
from llmtune.vllm_models import VllmModels, check_engine

TRUNCATED = "The text is longer than the model reads. Only its first {:,} tokens were used."


Inputs = Mapping[str, str | None]
"""Inputs of a task, by the names of `Task.inputs`."""
Given = str | Path | Sequence[str | Path] | None
"""A value of an input in Python: passages and pictures may be several, a recording or a picture may be a path."""


class ChatSession:
    """Answer prompts with one model, and remember the conversation on request.

    Ids come from `task.prompt_ids`, as in training and evaluation, and generation follows `recipe.generation`. With
    `do_sample` the random seed is the recipe's seed plus the number of messages before the answer, so the same
    conversation gets the same answers.
    """

    def __init__(self, served: ServedModel, console: Console | None = None) -> None:
        self.served, self.recipe, self.task, self.console = served, served.recipe, served.task, console
        self.history: list[Row] = []
        self.forgotten = 0
        """Messages at the start of the history that no longer fit the model's context."""

    def reset(self) -> None:
        """Forget the conversation."""
        self.history, self.forgotten = [], 0

    def answer(
        self, prompt: str, *, system: str | None = None, image: Given = None, keep: bool = False
    ) -> Iterator[Delta]:
        """Yield the answer to `prompt` in pieces; joined, they are the answer that evaluation would get.

        Args:
            prompt: the user's message; in task completion the text to continue.
            system: a system message before everything else (chat only).
            image: a picture, or several, before the message or at each `<image>` in it (a run with pictures only).
            keep: continue the history, and remember prompt and answer once it is complete (chat only).

        Raises:
            RecipeError: the task has no conversations, or the prompt does not fit the model's context.
            DataError: the chat template refuses these messages.
        """
        if not self.task.is_conversational:
            if keep or system:
                what = "this run continues text (task completion) and cannot chat"
                raise RecipeError.of(what, fix="Use: llmtune generate RUN --prompt TEXT")
            yield from self._generate(self._fit([{"prompt": prompt, "completion": ""}]), 0)
            return
        head = [{"role": "system", "content": system}] if system else []
        messages = [*(self.history if keep else []), *self.read_question(prompt, image)]
        questions = [at for at, message in enumerate(messages) if message["role"] == "user"]
        fitting = self._fit([{"messages": [*head, *messages[at:]]} for at in questions])
        answer = Delta()
        for piece in self._generate(fitting, len(messages)):
            answer += piece
            yield piece
        if keep:
            thoughts = {"reasoning": answer.reasoning} if answer.reasoning else {}
            self.history = [*messages, {"role": "assistant", "content": answer.content, **thoughts}]

    def read_question(self, prompt: str, image: Given = None) -> list[Row]:
        """Return the user's message; raises DataError or RecipeError for pictures that cannot be read."""
        inputs = _name_inputs({"prompt": prompt, "image": image})
        _check_inputs(self.task, inputs)
        return cast(list[Row], self.task.make_row(inputs)["messages"])

    def _fit(self, conversations: list[Row]) -> Prompt:
        """Return the first prompt that leaves room for an answer; each further conversation drops a question."""
        room, new = self.served.context, self.recipe.generation.max_new_tokens
        prompt = Prompt([])
        for conversation in conversations:
            prompt = self.task.prompt(conversation, self.served.processor, self.recipe)
            if room is None or len(prompt) + new <= room:
                forgotten = len(conversations[0].get("messages", ())) - len(conversation.get("messages", ()))
                if forgotten > self.forgotten and self.console is not None:
                    text = f"[dim]The model's context is full. Dropped the first {forgotten} messages.[/]"
                    self.console.print(text)
                self.forgotten = forgotten
                return prompt
        needs = f"the prompt has {len(prompt)} tokens and the answer may have {new}"
        what = f"{needs}, but the model's context holds {room}"
        fix = "Shorten the prompt, or lower the number of new tokens."
        raise RecipeError.of(what, "generation.max_new_tokens", fix)

    def _generate(self, prompt: Prompt, turn: int) -> Iterator[Delta]:
        """Generate in a second thread and yield final pieces; closing the iterator ends the thread."""
        queue: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        cancelled = threading.Event()
        settings = self.served.request_settings({}, self.recipe.generation.max_new_tokens)

        def work() -> None:
            try:
                self.served.generate(prompt, settings, self.recipe.seed + turn, queue.put, cancelled.is_set)
                queue.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for text
                queue.put(error)

        stream = self.served.stream(prompt.ids, chat=True)
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


@dataclass
class FinishedRun:
    """A trained run. Its model is loaded at first use, and kept.

    Example:
        run = llmtune.load_run("runs/support-chat-1a2b3c4d")
        run.scores["tuned"]["exact_match"]
        run.report["verdict"]
    """

    folder: Path
    offline: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True, quiet=True), repr=False)
    engine: str = "own"
    """What generates the answers to the rows of a file: own, or vllm."""
    _loaded: dict[bool, ServedModel] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        read_run(self.folder).require_trained()

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return recipe_of_run(read_run(self.folder)).recipe

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        return require_report(self.folder)

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """Scores, differences with their intervals, samples; None if the run was not evaluated."""
        return load_evaluation(self.folder / "evaluation")

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The scores of `base` and `tuned` model by the names that gates use; empty without an evaluation."""
        evaluation = self.evaluation
        return {model: evaluation.by_name(model) if evaluation else {} for model in ("base", "tuned")}

    @property
    def gates(self) -> tuple[GateResult, ...]:
        """The result of each gate of the recipe."""
        return check_gates(self.recipe.evaluate, self.evaluation) if self.evaluation else ()

    def generate(
        self,
        prompt: str | None = None,
        *,
        system: str | None = None,
        context: str | None = None,
        pair: str | None = None,
        audio: str | Path | None = None,
        image: str | Path | Sequence[str | Path] | None = None,
        passages: Sequence[str] | None = None,
        answer: str | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        base: bool = False,
        max_new_tokens: int | None = None,
    ) -> str:
        """Answer once with the tuned model, as `llmtune generate` does. Which inputs apply depends on the task.

        Args:
            prompt: a message, a question, or the text to continue or to work on.
            system: a system message before everything else (chat).
            context: the text that holds the answer (qa).
            pair: the second text of a pair (classify).
            audio: a recording (speech).
            image: a picture or several, before the prompt or at each `<image>` in it (chat, tuned with pictures).
            passages: the passages to rank for the prompt, or to turn into vectors.
            answer: the answer to score (preference, reward).
            source_language: the language of the prompt, instead of the recipe's (translate).
            target_language: the language of the answer, instead of the recipe's (translate).
            base: use the base model without the adapter.
            max_new_tokens: overrides the recipe's generation section.

        Raises:
            RecipeError: an input is missing, or the task does not use it.
            DataError: an input cannot be used.

        Example:
            run.generate("Where is my parcel?", base=True)
        """
        check_arguments("run.generate", locals())
        inputs: dict[str, Given] = {"prompt": prompt, "system": system, "context": context, "pair": pair}
        inputs |= {"answer": answer, "source_language": source_language, "target_language": target_language}
        inputs |= {"audio": audio, "image": image, "passages": None if passages is None else [*passages]}
        return str(self.answer(inputs, base=base, max_new_tokens=max_new_tokens)["text"])

    def answer(
        self, inputs: str | Mapping[str, Given], *, base: bool = False, max_new_tokens: int | None = None
    ) -> dict[str, object]:
        """Answer once, whatever the task; the same as `generate --json`.

        Args:
            inputs: a text (speech: the path of a recording), or all inputs by the names of `generate`'s arguments.
            base: use the base model without the adapter.
            max_new_tokens: overrides the recipe's generation section.

        Returns `text`, for people, and `prediction`, in the task's format; also `reasoning` if the model wrote any, and
        `scores` if it chooses: the probability of each tag for each word, or of each of the answers that it was
        calibrated on. The prediction of classes has its own, by class name. Then `decision` (`decide` or `ask`) and its
        `confidence`, `set` and `out_of_scope`, as far as the recipe has `evaluate.decide`, `sets` and `out_of_scope`.
        `truncated` is true if only the start of a text was read.
        Raises as `generate` does.

        Example:
            run.answer("Where is my parcel?")["prediction"]
            run.answer({"prompt": "red shoes", "passages": ["Red trainers", "A blue hat"]})
        """
        check_arguments("run.answer", locals())
        inputs = _name_inputs({next(iter(self.task.inputs)): inputs} if isinstance(inputs, str) else inputs)
        served = self.load(inputs, base=base, max_new_tokens=max_new_tokens)
        task = served.task
        if task.free_prompt:
            whole = sum(_ask(served, inputs), Delta())
            thoughts = {"reasoning": whole.reasoning} if whole.reasoning else {}
            (chosen,) = served.choose([task.make_row(inputs)])
            return {"text": whole.content, "prediction": whole.content, **thoughts, **chosen}
        row = task.make_row(inputs)
        if task.predicts:
            cut = served.check_length(row)
            (predicted,) = served.predict([row])
            prediction, scores = predicted.value, predicted.scores | ({"truncated": True} if cut else {})
            if cut:
                self.console.print(TRUNCATED.format(served.recipe.data.max_length))
        else:
            recipe, processor = served.recipe, served.processor
            prompt = task.prompt(row, processor, recipe)
            (output,) = generate_completions(served.model, [prompt], processor, recipe, device=served.device)
            prediction, scores = served.read(output.token_ids), {}
        text = task.format_answer(prediction, row)
        return {"text": text, "prediction": label_scores(prediction, served.recipe), **scores}

    def stream(self, inputs: Inputs, *, base: bool = False, max_new_tokens: int | None = None) -> Iterator[str]:
        """Yield the text of `answer`, in pieces as they are generated if the task has free prompts.

        The last line has the decision, if there is one.
        """
        if not self.task.free_prompt:
            answer = self.answer(inputs, base=base, max_new_tokens=max_new_tokens)
            yield f"{answer['text']}{describe_answer(answer)}"
            return
        served = self.load(inputs, base=base, max_new_tokens=max_new_tokens)
        yield from (piece.content for piece in _ask(served, inputs) if piece.content)
        if served.decision is not None:
            (chosen,) = served.choose([served.task.make_row(inputs)])
            yield describe_answer(chosen)

    def chat(self, *, base: bool = False) -> ChatSession:
        """Begin a conversation; raises RecipeError if the task has none."""
        if not self.task.free_prompt:
            fix = "Use `llmtune generate RUN`, which answers one input."
            raise RecipeError.of(f"{self.task.name} models cannot chat", str(self.folder), fix)
        return ChatSession(self._load(base), self.console)

    def model(self, *, base: bool = False) -> PreTrainedModel:
        """Return the tuned model with its adapter, or the base, in evaluation mode on the best device.

        Example:
            model, tokenizer = run.model(), run.tokenizer
        """
        return cast("PreTrainedModel", self._load(base).model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer (of speech: the processor) with the chat template of the run."""
        return self._load(base=False).processor

    def load(self, inputs: Inputs, *, base: bool, max_new_tokens: int | None) -> ServedModel:
        """Load a model after checking that its task takes `inputs`; raises RecipeError if not."""
        plan = self._opened.plan
        _check_inputs(plan.task, inputs)
        if max_new_tokens is not None and not TASK_FACTS[plan.recipe.task].generates:
            raise RecipeError.of("this run's model does not generate text", "--max-new-tokens", "Omit it.")
        if base and (why := why_headless(plan.model_ref, plan.recipe, plan.task)):
            fix = "Omit --base: the head was made and trained by this run."
            raise RecipeError.of(why, "--base", fix)
        served = self._load(base)
        if max_new_tokens is None:
            return served
        generation = served.recipe.generation.model_copy(update={"max_new_tokens": max_new_tokens})
        return replace(served, recipe=served.recipe.model_copy(update={"generation": generation}))

    @property
    def task(self) -> AnyTask:
        """The task, in the variant that the run's model supports."""
        return self._opened.plan.task

    @cached_property
    def _opened(self) -> RunContext:
        with as_in_new_process():
            prepare_environment(network=False)
            context = open_finished(self.folder, self.console, self.offline)
            return replace(context, request=replace(context.request, engine=self.engine))

    def _load(self, base: bool) -> ServedModel:
        if base not in self._loaded:
            plan, record, rules = self._opened.plan, None, None
            if not base:
                record, rules = run_calibration(self._opened.folder), run_decision(self._opened.folder)
            check_engine(self._opened, base=base, chooses=bool(record or rules))
            models = VllmModels(self._opened) if self.engine == "vllm" else Models(self._opened)
            with as_in_new_process(), models.base() if base else models.tuned() as model:
                served = ServedModel("base" if base else "tuned", model, plan.processor, plan.recipe, plan.task)
                self._loaded[base] = replace(served, calibration=record, decision=rules)
        return self._loaded[base]


def _ask(served: ServedModel, inputs: Inputs) -> Iterator[Delta]:
    return ChatSession(served).answer(
        inputs.get("prompt") or "", system=inputs.get("system"), image=inputs.get("image")
    )


def _name_inputs(inputs: Mapping[str, Given]) -> Inputs:
    """Return inputs as `llmtune generate` has them: several values of one as a JSON list."""
    return {
        name: None if value is None else str(value) if isinstance(value, str | Path) else json.dumps([*map(str, value)])
        for name, value in inputs.items()
    }


def _check_inputs(task: AnyTask, inputs: Inputs) -> None:
    """Raise RecipeError if the task misses inputs, or does not use some."""
    accepted = " and ".join(option_of(name) for name, required in task.inputs.items() if required)
    optional = ", ".join(option_of(name) for name, required in task.inputs.items() if not required)
    accepted = f"{accepted}, and optionally {optional}" if accepted and optional else accepted or optional
    problems = [
        Problem(f"task {task.name} needs it", option_of(name), f"Give {accepted}.")
        for name, required in task.inputs.items()
        if required and not (inputs.get(name) or "").strip()
    ]
    problems += [
        Problem(_why_unused(name, task), option_of(name), f"Omit it; give {accepted}.")
        for name, value in inputs.items()
        if value is not None and name not in task.inputs
    ]
    RecipeError.collect(problems)


def _why_unused(name: str, task: AnyTask) -> str:
    unread = name == "image" and task.is_conversational
    return "this run was tuned without pictures" if unread else f"task {task.name} does not use it"
