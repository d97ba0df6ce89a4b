"""An answer by transformers' own loop: for beams, and for models whose rows cannot be written side by side by ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llmtune.evaluate.generation import generation_settings, only_these_settings
from llmtune.serve.sampling import SETTINGS, Wish

if TYPE_CHECKING:
    from llmtune.serve.served_model import Served


def write_alone(
    served: Served,
    prompt: Sequence[int],
    wish: Wish,
    tell: Callable[[list[int]], None],
    is_over: Callable[[], bool],
) -> list[int]:
    """Write one answer, `tell` its tokens as they come (those of beams at the end), and return them.

    `is_over` ends it early.
    """
    stated = {name: getattr(wish, name) for name in ("do_sample", *SETTINGS)}
    section = served.recipe.generation.model_copy(update={**stated, "max_new_tokens": wish.new_tokens})
    recipe = served.recipe.model_copy(update={"generation": section})
    settings = generation_settings(served.model, served.processor, recipe)
    beams = wish.num_beams > 1
    ids_1T = torch.tensor([list(prompt)], device=served.device)
    with torch.random.fork_rng(), only_these_settings(served.model):
        torch.manual_seed(wish.seed)
        out_1T = cast(Any, served.model).generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            generation_config=settings,
            streamer=None if beams else _Teller(tell),
            stopping_criteria=StoppingCriteriaList([_Over(is_over)]),
        )
    ids = cast(list[int], out_1T[0, len(prompt) :].tolist())
    if beams:
        end = next((at for at, token in enumerate(ids) if token in served.stops), len(ids) - 1)
        ids = ids[: end + 1]  # behind it is padding
        tell(ids)
    return ids


class _Teller(BaseStreamer):  # type: ignore[misc]
    """Hands on new tokens; what comes first is the prompt."""

    def __init__(self, tell: Callable[[list[int]], None]) -> None:
        self.tell = tell
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then a token at a time."""
        if self.prompt_seen:
            self.tell(value.reshape(-1).tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """There is no more; `write_alone` returns."""


class _Over(StoppingCriteria):  # type: ignore[misc]
    """Ends generation when nobody wants more."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_over(), device=input_ids.device)
