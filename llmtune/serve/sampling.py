"""What a request asks of its answer, and how each next token is chosen: as transformers does, but row by row.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Wish:
    """How one answer is to be written; None means that a setting does nothing."""

    new_tokens: int
    seed: int
    """Where random draws start from."""
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1

    @property
    def greedy(self) -> bool:
        """Whether it is the likeliest token each time, and nothing else."""
        return not self.do_sample and self.repetition_penalty in (None, 1.0)


def wish_for(recipe: Recipe, stated: dict[str, Any], new_tokens: int, seed: int) -> Wish:
    """Return the recipe's generation settings with what a request states in their place.

    A temperature of 0 takes the likeliest token each time; stating anything else that draws are made by draws.
    """
    known = {name: getattr(recipe.generation, name) for name in SETTINGS}
    draws = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}
    drawn = recipe.generation.do_sample or any(stated.get(name) not in (None, off) for name, off in draws.items())
    known |= {name: value for name, value in stated.items() if value is not None}
    if known["temperature"] == 0:
        drawn = False
    if not drawn:
        known |= dict.fromkeys(SETTINGS[:4])
    beams = recipe.generation.num_beams
    return Wish(new_tokens=new_tokens, seed=seed, do_sample=drawn, num_beams=beams, **known)


class Chooser:
    """Chooses the tokens of one answer: the draws of two answers do not touch each other."""

    def __init__(self, wish: Wish, prompt: Sequence[int], device: str) -> None:
        self.wish, self.ids = wish, list(prompt)
        self.steps = LogitsProcessorList(_steps_of(wish))
        self.generator = torch.Generator(device)
        self.generator.manual_seed(wish.seed)

    def choose(self, logits_V: torch.Tensor) -> int:
        """Return the next token from its logits."""
        scores_1V = logits_V[None].float()
        if self.steps:
            ids_1T = torch.tensor([self.ids], device=logits_V.device)
            scores_1V = cast(torch.Tensor, self.steps(ids_1T, scores_1V.clone()))
        if not self.wish.do_sample:
            return int(scores_1V.argmax())
        return int(torch.multinomial(scores_1V.softmax(-1), 1, generator=self.generator))

    def note(self, token: int) -> None:
        """Remember a token that was written."""
        self.ids.append(token)


def _steps_of(wish: Wish) -> list[Any]:
    """Return what changes the scores before a choice, in the order in which `generate` does it."""
    steps: list[Any] = []
    if wish.repetition_penalty not in (None, 1.0):
        steps.append(RepetitionPenaltyLogitsProcessor(wish.repetition_penalty))
    if not wish.do_sample:
        return steps
    if wish.temperature not in (None, 1.0):
        steps.append(TemperatureLogitsWarper(float(wish.temperature)))
    if wish.top_k:
        steps.append(TopKLogitsWarper(wish.top_k))
    if wish.top_p is not None and wish.top_p < 1:
        steps.append(TopPLogitsWarper(wish.top_p))
    if wish.min_p is not None:
        steps.append(MinPLogitsWarper(wish.min_p))
    return steps


def choose_tokens(logits_BV: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Return each row's next token."""
    likeliest = logits_BV.argmax(-1).tolist()
    tokens = []
    for row, chooser in enumerate(choosers):
        tokens.append(likeliest[row] if chooser.wish.greedy else chooser.choose(logits_BV[row]))
        chooser.note(tokens[-1])
    return tokens
