"""An answer step by step: candidates, their probabilities, and the prediction of each layer.

transformers' own `generate` writes the answer, so it equals the model's answer elsewhere. A logits
processor records it without changing it. Then the model reads its answer once more, and the lens reads its layers.
Each layer is read through the model's own head (nostalgebraist, "interpreting GPT: the logit lens", 2020).
Shapes: V vocabulary, D width, T tokens, A those of the answer, L layers and the embeddings before them, P positions
examined or masked, R rows of a replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerationMixin

from llmtune.evaluate.decoder_generation import decoder_settings
from llmtune.evaluate.generation import generate, generation_settings, only_these_settings
from llmtune.explain.inputs import ModelInputs
from llmtune.explain.logit_lens import ForwardPass, read_lens, run_forward
from llmtune.explain.token_text import Token, token_namer
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.recipe.schema import Recipe

LISTED = 40
"""Tokens listed per step, the likeliest first."""
LENS_TOKENS = 3
"""Tokens listed per layer."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: `sample` draws from the kept ones, otherwise the likeliest wins."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float | None = None
    sample: bool = False
    seed: int = 0

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this sampling."""
        changed: dict[str, object] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.sample, "num_beams": 1}
        changed |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        if self.sample:
            changed |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or None}
            changed |= {"min_p": self.min_p}
        return recipe.model_copy(update={"generation": recipe.generation.model_copy(update=changed)})

    def warp(self, scores_1V: torch.Tensor) -> torch.Tensor:
        """Return the scores that sampling draws from: -inf for tokens cut off."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else [])
        warpers += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        warpers += [MinPLogitsWarper(self.min_p)] if self.min_p else []
        no_ids = torch.zeros((1, 0), dtype=torch.int64, device=scores_1V.device)
        return cast(torch.Tensor, warpers(no_ids, scores_1V))


@dataclass(frozen=True)
class LikelyToken:
    """A candidate for the next token."""

    token: Token
    probability: float
    """Before temperature, top-k and top-p."""
    kept: float | None = None
    """Probability after temperature, top-k and top-p, 0 if cut off; None without sampling."""


@dataclass(frozen=True)
class LayerPrediction:
    """The prediction of one layer: its likeliest tokens, and the probability of the finally chosen token."""

    likeliest: list[LikelyToken]
    chosen: float


@dataclass(frozen=True)
class AnswerStep:
    """One token of an answer, or one mask of a text."""

    token: Token
    probability: float
    """Before temperature, top-k and top-p."""
    entropy_bits: float
    kept_tokens: int
    candidates: list[LikelyToken]
    """The likeliest first."""
    layers: list[LayerPrediction] | None
    """From the embeddings to the last layer; None if the lens cannot read this model."""


@dataclass(frozen=True)
class Trace:
    """An answer, step by step."""

    prefix: list[int]
    """The decoder's tokens before its first step: the prompt, or the start of an encoder-decoder's answer."""
    steps: list[AnswerStep]
    text: str
    ended: bool
    """Whether it ends with an end token; otherwise it was truncated at max_new_tokens."""

    @property
    def ids(self) -> list[int]:
        """The tokens of the answer."""
        return [step.token.id for step in self.steps]


@dataclass
class Recorder(LogitsProcessor):  # type: ignore[misc]
    """Records the log-probabilities [V] of each step, and changes nothing."""

    logs: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record the scores, after forbidden tokens are ruled out and before temperature."""
        self.logs.append(scores[0].float().log_softmax(-1))
        return scores


def trace_answer(
    model: torch.nn.Module, prompt: ModelInputs, processor: PreTrainedTokenizerBase, sampling: Sampling
) -> Trace:
    """Let the model answer; record each step and each layer's prediction."""
    inner, recipe, recorder = unwrap(model), sampling.recipe(prompt.recipe), Recorder()
    with torch.random.fork_rng(), only_these_settings(model) as model_settings:
        torch.manual_seed(sampling.seed)
        if inner.config.is_encoder_decoder:
            settings = decoder_settings(model_settings, model, processor, recipe, prompt.first)
        else:
            settings = generation_settings(model, processor, recipe)
        settings.max_new_tokens = sampling.max_new_tokens
        inputs, processors = place_inputs(prompt, inner), LogitsProcessorList([recorder])
        if prompt.decoder_ids:
            inputs["decoder_input_ids"] = torch.tensor([prompt.decoder_ids], device=inner.device)
        if inner.config.is_encoder_decoder:
            out_BT = GenerationMixin.generate(inner, **inputs, generation_config=settings, logits_processor=processors)
        else:
            options = {**inputs, "generation_config": settings, "logits_processor": processors}
            out_BT = generate(model, **options)
    ids = cast(list[int], out_BT[0].tolist())
    written = len(recorder.logs)
    prefix, answer, ends = ids[:-written], ids[-written:], settings.eos_token_id or []
    stops = set(ends if isinstance(ends, list) else [ends])
    seen = read_again(model, prompt, prefix, answer)
    return Trace(
        prefix=prefix,
        steps=list(list_steps(answer, recorder.logs, sampling, seen, processor)),
        text=str(processor.decode([token for token in answer if token not in stops], skip_special_tokens=True)),
        ended=answer[-1] in stops,
    )


def place_inputs(prompt: ModelInputs, inner: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Move inputs to the model's device and, unless they are tokens, to its dtype."""
    return {
        name: part.to(inner.device, inner.dtype) if part.is_floating_point() else part.to(inner.device)
        for name, part in prompt.text_tensors.items()
    }


def trace_masks(
    model: torch.nn.Module, prompt: ModelInputs, processor: PreTrainedTokenizerBase, sampling: Sampling
) -> Trace:
    """Let an encoder fill in all masks of a text at once; each mask is a step."""
    seen = run_forward(model, place_inputs(prompt, unwrap(model)), prompt.masks)
    logs_PV = seen.logits.log_softmax(-1)
    answer = logs_PV.argmax(-1).tolist()
    filled = list(prompt.ids)
    for at, token in zip(prompt.masks, answer, strict=True):
        filled[at] = token
    steps = list(list_steps(answer, list(logs_PV), sampling, seen, processor))
    return Trace(prompt.ids, steps, str(processor.decode(filled, skip_special_tokens=True)), True)


def read_again(
    model: torch.nn.Module, prompt: ModelInputs, prefix: Sequence[int], answer: Sequence[int]
) -> ForwardPass:
    """Let a model read an answer, its own or another's, and return its predictions at each token."""
    inner = unwrap(model)
    ids = [*prefix, *answer[:-1]]
    inputs: dict[str, object] = {**place_inputs(replace(prompt, ids=ids), inner)}
    if inner.config.is_encoder_decoder:
        inputs = {**place_inputs(prompt, inner), "decoder_input_ids": torch.tensor([ids], device=inner.device)}
    if "logits_to_keep" in accepted_arguments(inner.__class__):
        inputs["logits_to_keep"] = len(answer)
    return run_forward(model, inputs, slice(-len(answer), None))


def list_steps(
    answer: Sequence[int],
    logs: Sequence[torch.Tensor],
    sampling: Sampling,
    seen: ForwardPass,
    processor: PreTrainedTokenizerBase,
) -> Iterator[AnswerStep]:
    """Yield the steps to show, from log-probabilities [V] and the hidden states of layers."""
    lens, name = read_lens(seen), token_namer(processor)
    for token, logs_V in zip(answer, logs, strict=True):
        top = logs_V.topk(min(LISTED, int(logs_V.isfinite().sum())))
        warped_V = sampling.warp(logs_V[None])[0]
        columns = (top.indices, top.values.exp(), warped_V.softmax(-1)[top.indices])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        yield AnswerStep(
            token=name(token),
            probability=math.exp(float(logs_V[token])),
            entropy_bits=float(torch.special.entr(logs_V.exp()).sum()) / math.log(2),
            kept_tokens=int(warped_V.isfinite().sum()),
            candidates=[LikelyToken(name(i), probability, kept) for i, probability, kept in rows],
            layers=None if lens is None else list_layers(next(lens), token, name),
        )


def list_layers(logits_LV: torch.Tensor, token: int, name: Callable[[int], Token]) -> list[LayerPrediction]:
    """Return each layer's prediction from its logits [L, V]."""
    shares_LV = logits_LV.softmax(-1)
    top = shares_LV.topk(LENS_TOKENS)
    columns = zip(top.indices.tolist(), top.values.tolist(), shares_LV[:, token].tolist(), strict=True)
    return [
        LayerPrediction([LikelyToken(name(i), share) for i, share in zip(ids, shares, strict=True)], chosen)
        for ids, shares, chosen in columns
    ]


@dataclass(frozen=True)
class TokenScore:
    """The probability of one token of a given answer, and the model's own prediction there."""

    probability: float
    rank: int
    """1 plus the number of likelier tokens."""
    likeliest: LikelyToken


def score_answer(
    model: torch.nn.Module,
    prompt: ModelInputs,
    processor: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    answer: Sequence[int],
) -> list[TokenScore]:
    """Score each token of a given answer (teacher forcing)."""
    logs_AV = read_again(model, prompt, prefix, answer).logits.log_softmax(-1)
    own_A1 = logs_AV.gather(-1, torch.tensor(answer)[:, None])
    best = logs_AV.max(-1)
    columns = (own_A1[:, 0].exp(), (logs_AV > own_A1).sum(-1) + 1, best.indices, best.values.exp())
    name, rows = token_namer(processor), zip(*(column.tolist() for column in columns), strict=True)
    return [TokenScore(probability, rank, LikelyToken(name(first), share)) for probability, rank, first, share in rows]
