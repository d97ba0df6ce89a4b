"""`llmtune explain generation`: how an answer comes about in four stages, and where base and tuned model part.

Prompt to tokens, what each layer would say, which words could come next, the answer so far.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmtune.errors import RecipeError
from llmtune.explain.generation_inputs import Given, Prompt, read_prompt
from llmtune.explain.generation_page import write_generation_page
from llmtune.explain.generation_trace import Choice, Reading, Trace, read_answer, trace_answer, trace_masks
from llmtune.explain.target import BASE, MODEL, TUNED, Subject
from llmtune.explain.token_json import Words
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.store.atomic_files import explained, write_json

MOST_TOKENS = 256
"""Tokens of an answer: the page holds what each layer would say at each of them."""
FEW_TOKENS = 32
SHOWN_TEMPERATURE, SHOWN_TOP_P = 0.7, 0.9
"""What is shown where nobody says how to sample: common settings."""
SLUG_LETTERS = 40


@dataclass(frozen=True)
class Wishes:
    """How the answer is to be made; what is None is left to the run's recipe, or to defaults."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    sample: bool | None = None
    seed: int | None = None


def explain_generation(
    subject: Subject, given: Given, wishes: Wishes, folder: Path, console: Console
) -> tuple[dict[str, Any], list[Path]]:
    """Trace the answer of each side, and write the page and its numbers into `folder`.

    Returns:
        What is on the page as JSON values, and the files.

    Raises:
        RecipeError: the prompt is empty, too long or not what this model is asked; the model predicts no words.
        DataError: the chat template does not take the messages, or a recording cannot be read.
    """
    prompt = read_prompt(subject, given)
    choice = settle(wishes, prompt, subject)
    if subject.recipe is not None and subject.recipe.generation.num_beams > 1:
        console.print(f"generation: one answer is followed, not the run's {subject.recipe.generation.num_beams} beams")
    traces, readings = trace_sides(subject, prompt, choice, console)
    told = tell(subject, given, prompt, choice, traces, readings)
    name = f"generation-{slug(given)}"
    with explained(folder):
        page = write_generation_page(folder / f"{name}.html", told)
        write_json(folder / f"{name}.json", told)
    return told, [page, folder / f"{name}.json"]


def settle(wishes: Wishes, prompt: Prompt, subject: Subject) -> Choice:
    """Fill what was left open from the recipe of a run, or with defaults; raises RecipeError for too long an answer."""
    own = subject.recipe.generation if subject.recipe else None
    sampled = own if own is not None and own.do_sample else None
    longest = wishes.max_new_tokens or min(own.max_new_tokens if own else FEW_TOKENS, MOST_TOKENS)
    room = context_length(subject.config)
    if room is not None and not prompt.places:
        before = len(prompt.begun) or 1 if subject.config.is_encoder_decoder else len(prompt.ids)
        if room - before < (wishes.max_new_tokens or 1):
            what = f"{before:,} tokens and {wishes.max_new_tokens or 1} new ones do not fit into the model's {room:,}"
            raise RecipeError.of(what, "--prompt", "Shorten the prompt, or lower --max-new-tokens.")
        longest = min(longest, room - before)
    choice = Choice(
        max_new_tokens=longest,
        temperature=_first(wishes.temperature, sampled and (sampled.temperature or 1.0), SHOWN_TEMPERATURE),
        top_p=_first(wishes.top_p, sampled and (sampled.top_p or 1.0), SHOWN_TOP_P),
        top_k=_first(wishes.top_k, sampled and sampled.top_k, 0),
        min_p=sampled.min_p if sampled else None,
        sample=_first(wishes.sample, sampled and True, False),
        seed=_first(wishes.seed, subject.recipe and subject.recipe.seed, 0),
    )
    return replace(choice, sample=False) if prompt.places else choice


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def trace_sides(
    subject: Subject, prompt: Prompt, choice: Choice, console: Console
) -> tuple[dict[str, Trace], dict[str, list[Reading]]]:
    """Open each side and let it answer; of a run, let both read the tuned model's answer as well."""
    traces: dict[str, Trace] = {}
    readings: dict[str, list[Reading]] = {}

    def look(side: str) -> None:
        with opened(subject, side, console) as model:
            if side not in traces:
                traces[side] = trace_side(model, prompt, subject, choice, side, console)
            if TUNED not in traces or prompt.places:
                return
            answer = (prompt, traces[TUNED].begun, traces[TUNED].ids)
            readings[side] = read_answer(model, *answer)
            if side == TUNED and hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    readings[BASE] = read_answer(model, *answer)

    for side in subject.sides:
        look(side)
    if TUNED in readings and BASE not in readings:  # all weights were trained: the base is a model of its own
        look(BASE)
    return traces, readings


@contextmanager
def opened(subject: Subject, side: str, console: Console) -> Iterator[Any]:
    """Give a side's model; that it is loading is said only until it is there."""
    with ExitStack() as stack:
        with console.status(f"loading the {side} model" if side != MODEL else "loading the model"):
            model = stack.enter_context(subject.open_side(side))
        yield model


def trace_side(
    model: torch.nn.Module, prompt: Prompt, subject: Subject, choice: Choice, side: str, console: Console
) -> Trace:
    """Let one model answer, with a progress bar; raises RecipeError for one that predicts no words."""
    inner = unwrap(model)
    if inner.get_output_embeddings() is None or not (prompt.places or inner.can_generate()):
        what = f"this model predicts no words: it is a {type(inner).__name__}"
        fix = "`llmtune explain attention` and `llmtune explain model` look inside such a model."
        raise RecipeError.of(what, subject.name, fix)
    if prompt.places:
        return trace_masks(model, prompt, subject.processor, choice)
    with progress(console) as bars:
        bar = bars.add_task(f"{side} answers", total=choice.max_new_tokens)
        return trace_answer(model, prompt, subject.processor, choice, lambda: bars.advance(bar))


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Show a bar while the block runs, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars


def tell(
    subject: Subject,
    given: Given,
    prompt: Prompt,
    choice: Choice,
    traces: dict[str, Trace],
    readings: dict[str, list[Reading]],
) -> dict[str, Any]:
    """Put everything into JSON values, tokens with their text."""
    words = Words(subject.processor)
    found = {side: words.trace(trace) for side, trace in traces.items()}
    told: dict[str, Any] = {
        "subject": subject.name,
        "family": subject.family,
        "given": {name: value for name, value in given.named().items() if value is not None},
        "note": prompt.note,
        "tokens": words.several(prompt.ids or prompt.begun),
        "masked": bool(prompt.places),
        "choice": asdict(choice),
        "temperatures": choice.temperatures,
        "traces": found,
        "parting": None,
        "comparison": [],
    }
    if TUNED in traces and BASE in traces:
        told["parting"] = parting(traces[BASE].ids, traces[TUNED].ids)
    if readings:
        answered = [step.id for step in traces[TUNED].steps]
        rows = zip(answered, readings[BASE], readings[TUNED], strict=True)
        told["comparison"] = [words.compared(*row) for row in rows]
    return told


def parting(base: Sequence[int], tuned: Sequence[int]) -> int | None:
    """Return the first step, counted from 0, at which two answers differ; None where they are the same."""
    for at, pair in enumerate(zip(base, tuned, strict=False)):
        if pair[0] != pair[1]:
            return at
    return None if len(base) == len(tuned) else min(len(base), len(tuned))


def slug(given: Given) -> str:
    """Return a name for a prompt that can stand in a file name: its letters, and a hash where those are not all."""
    text = given.prompt or (given.audio.stem if given.audio else "")
    letters = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if letters and len(letters) <= SLUG_LETTERS and text.isascii():
        return letters
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{letters[:SLUG_LETTERS].rsplit('-', 1)[0]}-{digest}".strip("-")
