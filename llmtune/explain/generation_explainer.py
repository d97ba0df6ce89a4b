"""`llmtune explain generation`: how an answer comes about in four stages, and where base and tuned model part.

Prompt to tokens, what each layer would predict, which words could come next, the answer so far.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from llmtune.errors import RecipeError
from llmtune.explain.explanation import Explanation, write_explanation
from llmtune.explain.generation_page import Generation, make_page
from llmtune.explain.generation_trace import Sampling, TokenScore, Trace, score_answer, trace_answer, trace_masks
from llmtune.explain.inputs import NO_WORDS_FIX, ModelInputs, PromptRequest, read_prompt
from llmtune.explain.target import BASE, TUNED, Target
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.store.atomic_files import explained

MOST_TOKENS = 256
"""Tokens of an answer: the page holds what each layer would predict at each of them."""
FEW_TOKENS = 32
SHOWN_TEMPERATURE, SHOWN_TOP_P = 0.7, 0.9
"""What is shown where nobody says how to sample: common settings."""
SLUG_LETTERS = 40
T = TypeVar("T")


def explain_generation(
    target: Target, request: PromptRequest, folder: Path, console: Console, *, top: int = 5
) -> Explanation:
    """Trace the answer of each model, and write the page and its numbers into `folder`; tables list `top` words.

    Raises:
        RecipeError: the prompt is empty or too long, an option has no use, or the model predicts no words.
        DataError: the chat template does not take the messages, or a recording cannot be read.
    """
    prompt = read_prompt(target, request)
    sampling = resolve_sampling(request, prompt, target)
    if target.recipe is not None and target.recipe.generation.num_beams > 1:
        console.print(f"generation: one answer is followed, not the run's {target.recipe.generation.num_beams} beams")
    traces, scores = trace_models(target, prompt, sampling, console)
    generation = Generation(target, request, prompt, sampling, traces, scores)
    with explained(folder):
        return write_explanation(
            folder / f"generation-{slug(request)}", to_json(generation), make_page(generation, top)
        )


def resolve_sampling(request: PromptRequest, prompt: ModelInputs, target: Target) -> Sampling:
    """Fill what was left open from the recipe of a run, or with defaults; raises RecipeError for too long an answer."""
    own = target.recipe.generation if target.recipe else None
    sampled = own if own is not None and own.do_sample else None
    longest = request.max_new_tokens or min(own.max_new_tokens if own else FEW_TOKENS, MOST_TOKENS)
    room = context_length(target.config)
    if room is not None and not prompt.masks:
        before = len(prompt.decoder_ids) or 1 if target.config.is_encoder_decoder else len(prompt.ids)
        if room - before < (request.max_new_tokens or 1):
            what = f"{before:,} tokens and {request.max_new_tokens or 1} new ones do not fit into the model's {room:,}"
            raise RecipeError.of(what, "--prompt", "Shorten the prompt, or lower --max-new-tokens.")
        longest = min(longest, room - before)
    return Sampling(
        max_new_tokens=longest,
        temperature=_first(request.temperature, sampled.temperature or 1.0 if sampled else SHOWN_TEMPERATURE),
        top_p=_first(request.top_p, sampled.top_p or 1.0 if sampled else SHOWN_TOP_P),
        top_k=_first(request.top_k, sampled.top_k if sampled else None, 0),
        min_p=sampled.min_p if sampled else None,
        sample=_first(request.sample, sampled is not None) and not prompt.masks,
        seed=_first(request.seed, target.recipe.seed if target.recipe else 0),
    )


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)


def trace_models(
    target: Target, prompt: ModelInputs, sampling: Sampling, console: Console
) -> tuple[dict[str, Trace], dict[str, list[TokenScore]]]:
    """Open each model and let it answer; of a run, let both score the tuned model's answer as well."""
    traces: dict[str, Trace] = {}
    scores: dict[str, list[TokenScore]] = {}

    def look(name: str) -> None:
        with target.open_model(name) as model:
            if name not in traces:
                with console.status(f"{name} answers"):
                    traces[name] = trace_model(model, prompt, target, sampling)
            if TUNED not in traces or prompt.masks:
                return
            answer = (prompt, target.processor, traces[TUNED].prefix, traces[TUNED].ids)
            scores[name] = score_answer(model, *answer)
            if name == TUNED and hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    scores[BASE] = score_answer(model, *answer)

    for name in target.models:
        look(name)
    if TUNED in scores and BASE not in scores:  # all weights were trained: the base is a model of its own
        look(BASE)
    return traces, scores


def trace_model(model: torch.nn.Module, prompt: ModelInputs, target: Target, sampling: Sampling) -> Trace:
    """Let one model answer; raises RecipeError for one that predicts no words."""
    inner = unwrap(model)
    if inner.get_output_embeddings() is None or not (prompt.masks or inner.can_generate()):
        what = f"this model predicts no words: it is a {type(inner).__name__}"
        raise RecipeError.of(what, target.name, NO_WORDS_FIX)
    trace = trace_masks if prompt.masks else trace_answer
    return trace(model, prompt, target.processor, sampling)


def slug(request: PromptRequest) -> str:
    """Return a name for a prompt that can stand in a file name: its letters, and a hash where those are not all."""
    text = request.prompt or (request.audio.stem if request.audio else "")
    letters = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if letters and len(letters) <= SLUG_LETTERS and text.isascii():
        return letters
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{letters[:SLUG_LETTERS].rsplit('-', 1)[0]}-{digest}".strip("-")


# JSON


def to_json(generation: Generation) -> dict[str, object]:
    """Return everything as JSON values, tokens with their text."""
    prompt, request = generation.prompt, generation.request.named()
    return {
        "model": generation.target.name,
        "family": generation.target.family,
        "given": {name: value for name, value in request.items() if value is not None},
        "note": prompt.note,
        "tokens": [asdict(token) for token in generation.prompt_tokens],
        "masked": bool(prompt.masks),
        "sampling": asdict(generation.sampling),
        "traces": {name: asdict(trace) for name, trace in generation.traces.items()},
        "parting": generation.parting,
        "scores": {name: [asdict(score) for score in scores] for name, scores in generation.scores.items()},
    }
