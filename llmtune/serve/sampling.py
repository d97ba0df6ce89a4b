"""How each next token is chosen: as transformers does, but row by row.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmtune.recipe.schema import Recipe

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is generated; None means that a setting does nothing."""

    new_tokens: int
    seed: int
    """Where random draws start from."""
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def greedy(self) -> bool:
        """Whether it is the likeliest token each time, and nothing else."""
        return not self.do_sample and self.repetition_penalty in (None, 1.0)


def sampling_params(recipe: Recipe, stated: Mapping[str, float | None], new_tokens: int, seed: int) -> SamplingParams:
    """Return the recipe's generation settings with what a request states in their place.

    A temperature of 0 takes the likeliest token each time; stating any other setting of random draws draws.
    """
    settings = {name: getattr(recipe.generation, name) for name in SETTINGS}
    neutral = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}
    drawn = recipe.generation.do_sample or any(stated.get(name) not in (None, off) for name, off in neutral.items())
    settings |= {name: value for name, value in stated.items() if value is not None}
    drawn = drawn and settings["temperature"] != 0
    if not drawn:
        settings |= dict.fromkeys(neutral)
    return SamplingParams(new_tokens=new_tokens, seed=seed, do_sample=drawn, **settings)


def recipe_for(recipe: Recipe, params: SamplingParams) -> Recipe:
    """Return the recipe with `params` as its generation settings."""
    settings = {name: getattr(params, name) for name in ("do_sample", *SETTINGS)}
    section = recipe.generation.model_copy(update={**settings, "max_new_tokens": params.new_tokens})
    return recipe.model_copy(update={"generation": section})


class TokenSampler:
    """Chooses the tokens of one answer: the draws of two answers do not touch each other."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], device: str) -> None:
        self.params, self.ids = params, list(prompt)
        self.processors = LogitsProcessorList(_processors(params))
        self.generator = torch.Generator(device)
        self.generator.manual_seed(params.seed)

    def sample(self, logits_V: torch.Tensor) -> int:
        """Return the next token from its logits."""
        scores_1V = logits_V[None].float()
        if self.processors:
            ids_1T = torch.tensor([self.ids], device=logits_V.device)
            scores_1V = cast(torch.Tensor, self.processors(ids_1T, scores_1V.clone()))
        if not self.params.do_sample:
            return int(scores_1V.argmax())
        return int(torch.multinomial(scores_1V.softmax(-1), 1, generator=self.generator))


def _processors(params: SamplingParams) -> list[LogitsProcessor]:
    """Return what changes the scores before a choice, in the order in which `generate` does it."""
    processors: list[LogitsProcessor] = []
    if params.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if not params.do_sample:
        return processors
    if params.temperature not in (None, 1.0):
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors


def sample_tokens(logits_BV: torch.Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    """Return each row's next token."""
    likeliest = logits_BV.argmax(-1).tolist()
    tokens = []
    for row, sampler in enumerate(samplers):
        tokens.append(likeliest[row] if sampler.params.greedy else sampler.sample(logits_BV[row]))
        sampler.ids.append(tokens[-1])
    return tokens
