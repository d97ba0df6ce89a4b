"""Ask the model of a finished run: one answer whatever its task, or a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console

from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import answer_reader, generate
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.heads import head_is_new
from llmtune.model.processor import load_processor
from llmtune.recipe import TASK_FACTS
from llmtune.records import ModelRef
from llmtune.serve.chat_session import ChatSession
from llmtune.session import Models, RunContext, open_finished
from llmtune.tasks.base import AnyTask


def answer_once(
    run: Path,
    inputs: Mapping[str, str | None],
    console: Console,
    *,
    base: bool = False,
    max_new_tokens: int | None = None,
    offline: bool = False,
) -> dict[str, object]:
    """Let the model of a finished run answer `inputs`, whatever its task.

    Returns:
        `text`, as a person reads it, and `prediction`, as the task has it; `reasoning` where the model thought first.

    Raises:
        RecipeError: an input is missing, or not used by this task; the base has no head to answer with.
        DataError: an input cannot be used: an empty text, a recording that cannot be read.
    """
    context, model_ref = open_finished(run, console, offline)
    check_request(context, model_ref, inputs, base=base, max_new_tokens=max_new_tokens)
    return answer(load_session(context, model_ref, console, base=base, max_new_tokens=max_new_tokens), inputs)


def stream_answer(
    run: Path,
    inputs: Mapping[str, str | None],
    console: Console,
    *,
    base: bool = False,
    max_new_tokens: int | None = None,
    offline: bool = False,
) -> Iterator[str]:
    """Yield the text of `answer_once` in pieces as they come, where the task has free prompts; raises as it does."""
    context, model_ref = open_finished(run, console, offline)
    check_request(context, model_ref, inputs, base=base, max_new_tokens=max_new_tokens)
    session = load_session(context, model_ref, console, base=base, max_new_tokens=max_new_tokens)
    if session.task.free_prompt:
        pieces = session.answer(str(inputs["prompt"]), system=inputs.get("system"))
        yield from (piece.content for piece in pieces if piece.content)
    else:
        yield str(answer(session, inputs)["text"])


def check_request(
    context: RunContext,
    model_ref: ModelRef,
    inputs: Mapping[str, str | None],
    *,
    base: bool,
    max_new_tokens: int | None,
) -> None:
    """Raise RecipeError for what this run's model cannot be asked."""
    check_inputs(context.task, inputs)
    if max_new_tokens is not None and not TASK_FACTS[context.recipe.task].generates:
        raise RecipeError.of("this run's model generates no text", "--max-new-tokens", "Omit it.")
    if base and head_is_new(model_ref, context.recipe, context.task):
        fix = "Omit --base: the head was made and trained by this run."
        raise RecipeError.of("the base model has no trained head for this task", "--base", fix)


def answer(session: ChatSession, inputs: Mapping[str, str | None]) -> dict[str, object]:
    """Return the answer of a loaded model: `text` and `prediction`, as `answer_once` does."""
    task, recipe = session.task, session.recipe
    if task.free_prompt:
        pieces = list(session.answer(str(inputs["prompt"]), system=inputs.get("system")))
        text, thoughts = "".join(piece.content for piece in pieces), "".join(piece.reasoning for piece in pieces)
        return {"text": text, "prediction": text, **({"reasoning": thoughts} if thoughts else {})}
    row, device = task.make_row(inputs), str(session.model.device)
    prediction: object
    if not task.predicts:
        ids = task.prompt_ids(row, session.processor, recipe)
        (output,) = generate(session.model, [ids], session.processor, recipe, device=device)
        prediction = answer_reader(session.processor, recipe)(output.token_ids, None).text
    else:
        dtype = resolve_dtype(recipe.model.dtype, session.model.device.type)
        with torch.inference_mode(), compute_context(dtype, device):
            (prediction,) = task.predict([row], LoadedModel(session.model, session.processor, recipe, device))
    return {"text": task.format_answer(prediction, row), "prediction": prediction}


def check_inputs(task: AnyTask, inputs: Mapping[str, str | None]) -> None:
    """Raise RecipeError for the inputs of a task that are missing, and for those that it does not use."""
    accepted = ", ".join(f"--{name}" for name in task.inputs)
    problems = [
        Problem(f"task {task.name} needs it", f"--{name}", f"Give {accepted}.")
        for name, required in task.inputs.items()
        if required and not (inputs.get(name) or "").strip()
    ]
    problems += [
        Problem(f"task {task.name} does not use it", f"--{name}", f"Omit it; give {accepted}.")
        for name, value in inputs.items()
        if value is not None and name not in task.inputs
    ]
    RecipeError.collect(problems)


def open_session(
    run: Path, console: Console, *, base: bool = False, max_new_tokens: int | None = None, offline: bool = False
) -> ChatSession:
    """Load the model of a finished run to talk to it."""
    context, model_ref = open_finished(run, console, offline)
    if not context.task.free_prompt:
        fix = "Use: llmtune generate RUN, which asks one thing at a time."
        raise RecipeError.of(f"a model of task {context.task.name} holds no conversation", str(run), fix)
    return load_session(context, model_ref, console, base=base, max_new_tokens=max_new_tokens)


def load_session(
    context: RunContext, model_ref: ModelRef, console: Console, *, base: bool, max_new_tokens: int | None
) -> ChatSession:
    """Load the base or the tuned model of an opened run."""
    recipe = context.recipe
    if max_new_tokens is not None:
        generation = recipe.generation.model_copy(update={"max_new_tokens": max_new_tokens})
        recipe = recipe.model_copy(update={"generation": generation})
    processor = load_processor(model_ref, recipe.model)
    models = Models(context, model_ref, processor)
    with models.base() if base else models.tuned() as model:
        return ChatSession(model, processor, recipe, context.task, console)
