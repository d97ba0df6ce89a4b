"""`llmtune explain generation`: how an answer comes about in four stages, and where base and tuned model part.

Prompt to tokens, what each layer would predict, which words could come next, the answer so far.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmtune.errors import RecipeError
from llmtune.explain.explanation import Explanation
from llmtune.explain.generation_page import Generation, TokenNames, make_page
from llmtune.explain.generation_trace import (
    Sampling,
    Step,
    TokenScore,
    Trace,
    score_answer,
    trace_answer,
    trace_masks,
)
from llmtune.explain.inputs import NO_WORDS_FIX, ModelInputs, PromptRequest, read_prompt
from llmtune.explain.target import BASE, MODEL, TUNED, Target
from llmtune.explain.token_text import Token
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.report.render_html import write_page
from llmtune.store.atomic_files import explained, write_json

MOST_TOKENS = 256
"""Tokens of an answer: the page holds what each layer would predict at each of them."""
FEW_TOKENS = 32
SHOWN_TEMPERATURE, SHOWN_TOP_P = 0.7, 0.9
"""What is shown where nobody says how to sample: common settings."""
SLUG_LETTERS = 40
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationOptions:
    """How the answer is to be made; what is None is left to the run's recipe, or to defaults."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    sample: bool | None = None
    seed: int | None = None


def explain_generation(
    target: Target, request: PromptRequest, options: GenerationOptions, folder: Path, console: Console, *, top: int = 5
) -> Explanation:
    """Trace the answer of each model, and write the page and its numbers into `folder`.

    Args:
        target: a run or a model.
        request: what is continued.
        options: how.
        folder: for the files.
        console: for progress.
        top: words of a step that the tables list.

    Raises:
        RecipeError: the prompt is empty or too long, an option has no use, or the model predicts no words.
        DataError: the chat template does not take the messages, or a recording cannot be read.
    """
    prompt = read_prompt(target, request)
    sampling = resolve_sampling(options, prompt, target)
    if target.recipe is not None and target.recipe.generation.num_beams > 1:
        console.print(f"generation: one answer is followed, not the run's {target.recipe.generation.num_beams} beams")
    traces, scores = trace_models(target, prompt, sampling, console)
    generation = Generation(target, request, prompt, sampling, traces, scores)
    names = TokenNames(target.processor)
    values = to_json(generation, names)
    page = make_page(generation, names, values, top)
    name = f"generation-{slug(request)}"
    with explained(folder):
        path = write_page(folder / f"{name}.html", page)
        write_json(folder / f"{name}.json", values)
    return Explanation(values, page, [path, folder / f"{name}.json"])


def resolve_sampling(options: GenerationOptions, prompt: ModelInputs, target: Target) -> Sampling:
    """Fill what was left open from the recipe of a run, or with defaults; raises RecipeError for too long an answer."""
    own = target.recipe.generation if target.recipe else None
    sampled = own if own is not None and own.do_sample else None
    longest = options.max_new_tokens or min(own.max_new_tokens if own else FEW_TOKENS, MOST_TOKENS)
    room = context_length(target.config)
    if room is not None and not prompt.masks:
        before = len(prompt.decoder_ids) or 1 if target.config.is_encoder_decoder else len(prompt.ids)
        if room - before < (options.max_new_tokens or 1):
            what = f"{before:,} tokens and {options.max_new_tokens or 1} new ones do not fit into the model's {room:,}"
            raise RecipeError.of(what, "--prompt", "Shorten the prompt, or lower --max-new-tokens.")
        longest = min(longest, room - before)
    sampling = Sampling(
        max_new_tokens=longest,
        temperature=_first(options.temperature, sampled.temperature or 1.0 if sampled else SHOWN_TEMPERATURE),
        top_p=_first(options.top_p, sampled.top_p or 1.0 if sampled else SHOWN_TOP_P),
        top_k=_first(options.top_k, sampled.top_k if sampled else None, 0),
        min_p=sampled.min_p if sampled else None,
        sample=_first(options.sample, sampled is not None),
        seed=_first(options.seed, target.recipe.seed if target.recipe else 0),
    )
    return replace(sampling, sample=False) if prompt.masks else sampling


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def trace_models(
    target: Target, prompt: ModelInputs, sampling: Sampling, console: Console
) -> tuple[dict[str, Trace], dict[str, list[TokenScore]]]:
    """Open each model and let it answer; of a run, let both score the tuned model's answer as well."""
    traces: dict[str, Trace] = {}
    scores: dict[str, list[TokenScore]] = {}

    def look(name: str) -> None:
        status = console.status(f"loading the {name} model" if name != MODEL else "loading the model")
        status.start()
        with target.open_model(name) as model:
            status.stop()
            if name not in traces:
                traces[name] = trace_model(model, prompt, target, sampling, name, console)
            if TUNED not in traces or prompt.masks:
                return
            answer = (prompt, traces[TUNED].prefix, traces[TUNED].ids)
            scores[name] = score_answer(model, *answer)
            if name == TUNED and hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    scores[BASE] = score_answer(model, *answer)

    for name in target.models:
        look(name)
    if TUNED in scores and BASE not in scores:  # all weights were trained: the base is a model of its own
        look(BASE)
    return traces, scores


def trace_model(
    model: torch.nn.Module, prompt: ModelInputs, target: Target, sampling: Sampling, name: str, console: Console
) -> Trace:
    """Let one model answer, with a progress bar; raises RecipeError for one that predicts no words."""
    inner = unwrap(model)
    if inner.get_output_embeddings() is None or not (prompt.masks or inner.can_generate()):
        what = f"this model predicts no words: it is a {type(inner).__name__}"
        raise RecipeError.of(what, target.name, NO_WORDS_FIX)
    if prompt.masks:
        return trace_masks(model, prompt, target.processor, sampling)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(f"{name} answers", total=sampling.max_new_tokens)
        return trace_answer(model, prompt, target.processor, sampling, lambda: bars.advance(bar))


def slug(request: PromptRequest) -> str:
    """Return a name for a prompt that can stand in a file name: its letters, and a hash where those are not all."""
    text = request.prompt or (request.audio.stem if request.audio else "")
    letters = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if letters and len(letters) <= SLUG_LETTERS and text.isascii():
        return letters
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{letters[:SLUG_LETTERS].rsplit('-', 1)[0]}-{digest}".strip("-")


# JSON


def to_json(generation: Generation, names: TokenNames) -> dict[str, object]:
    """Return everything as JSON values, tokens with their text."""
    prompt, sampling, traces = generation.prompt, generation.sampling, generation.traces
    given = {name: value for name, value in generation.request.named().items() if value is not None}
    comparison = []
    if generation.scores:
        columns = (traces[TUNED].ids, generation.scores[BASE], generation.scores[TUNED])
        comparison = [_compare(names, *row) for row in zip(*columns, strict=True)]
    return {
        "subject": generation.target.name,
        "family": generation.target.family,
        "given": given,
        "note": prompt.note,
        "tokens": [_token(token) for token in names.sequence(prompt.ids or prompt.decoder_ids)],
        "masked": bool(prompt.masks),
        "choice": asdict(sampling),
        "temperatures": sampling.temperatures,
        "traces": {name: _trace(trace, names) for name, trace in traces.items()},
        "parting": generation.parting,
        "comparison": comparison,
    }


def _token(token: Token) -> dict[str, object]:
    return {"id": token.id, "text": token.text, "special": token.special}


def _compare(names: TokenNames, token: int, base: TokenScore, tuned: TokenScore) -> dict[str, object]:
    """Return how likely a token of the tuned model's answer is to both, and what the base would have predicted."""
    return {
        **_token(names.one(token)),
        "base": base.probability,
        "tuned": tuned.probability,
        "base_rank": base.rank,
        "base_says": {**_token(names.one(base.likeliest)), "probability": base.likeliest_probability},
    }


def _trace(trace: Trace, names: TokenNames) -> dict[str, object]:
    return {
        "text": trace.text,
        "ended": trace.ended,
        "lens": all(step.layers is not None for step in trace.steps),
        "steps": [_step(*pair, names) for pair in zip(trace.steps, names.sequence(trace.ids), strict=True)],
    }


def _step(step: Step, token: Token, names: TokenNames) -> dict[str, object]:
    listed = step.next_tokens
    columns = zip(listed.ids, listed.probabilities, listed.kept, strict=True)
    return {
        "token": _token(token),
        "probability": step.probability,
        "entropy_bits": listed.entropy_bits,
        "kept_tokens": listed.kept_tokens,
        "candidates": [{**_token(names.one(i)), "probability": share, "kept": kept} for i, share, kept in columns],
        "partitions": listed.partitions,
        "layers": step.layers
        and [
            {
                "says": [
                    {**_token(names.one(i)), "probability": share}
                    for i, share in zip(layer.ids, layer.probabilities, strict=True)
                ],
                "chosen": layer.chosen,
            }
            for layer in step.layers
        ],
    }
