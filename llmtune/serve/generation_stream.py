"""An answer by transformers' own `generate`, its tokens delivered as they come; it can be cancelled between two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llmtune.evaluate.generation import generation_settings, only_these_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


def stream_generation(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    prompt: Sequence[int],
    seed: int,
    deliver: Callable[[list[int]], None],
    is_cancelled: Callable[[], bool],
) -> list[int]:
    """Generate one answer as the recipe's `generation` says, and return its ids.

    `deliver` gets the tokens as they come, those of beams at the end.
    """
    settings = generation_settings(model, processor, recipe)
    beams = settings.num_beams > 1
    ids_BT = torch.tensor([list(prompt)], device=model.device)
    with torch.random.fork_rng(), only_these_settings(model):
        torch.manual_seed(seed)
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=settings,
            streamer=None if beams else _TokenStreamer(deliver),
            stopping_criteria=StoppingCriteriaList([_Cancelled(is_cancelled)]),
        )
    ids = cast(list[int], out_BT[0, len(prompt) :].tolist())
    if beams:
        stops = settings.eos_token_id or ()
        end = next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1)
        ids = ids[: end + 1]  # behind it is padding
        deliver(ids)
    return ids


class _TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Delivers new tokens; what comes first is the prompt."""

    def __init__(self, deliver: Callable[[list[int]], None]) -> None:
        self.deliver = deliver
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then a token at a time."""
        if self.prompt_seen:
            self.deliver(value.reshape(-1).tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """There is no more: `generate` returns."""


class _Cancelled(StoppingCriteria):  # type: ignore[misc]
    """Ends generation when nobody wants more."""

    def __init__(self, is_cancelled: Callable[[], bool]) -> None:
        self.is_cancelled = is_cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_cancelled(), device=input_ids.device)
