"""Generation by the decoder of an encoder-decoder: with the model's required settings, in transformers' own loop."""

from __future__ import annotations

from typing import cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.utils import GenerationMixin

from llmtune.data.text_pairs import starts_with_language
from llmtune.evaluate.generation import generation_settings
from llmtune.model.causal_lm_loss import unwrap
from llmtune.recipe.schema import Recipe


def decoder_settings(
    model_settings: GenerationConfig | None,
    model: torch.nn.Module,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    first: int | None = None,
) -> GenerationConfig:
    """Return the recipe's generation settings with the model's required ones, such as the decoder's start token.

    Of `model_settings`, the start token, forced first token and suppressed tokens are kept. `first` is the
    language that an answer begins with.
    """
    config = unwrap(model).config
    settings = generation_settings(model, processor, recipe)
    never = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")  # Marian must not write its own start
    for name in ("decoder_start_token_id", "forced_bos_token_id", *never):
        value = getattr(model_settings, name, None)
        setattr(settings, name, value if value is not None else getattr(config, name, None))
    if first is not None and starts_with_language(processor):
        settings.decoder_start_token_id, settings.forced_bos_token_id = first, None
    elif first is not None:
        settings.forced_bos_token_id = first
    ends = getattr(model_settings, "eos_token_id", None) or config.eos_token_id
    named = ends if isinstance(ends, list) else [ends]
    settings.eos_token_id = sorted({int(i) for i in (*named, processor.eos_token_id) if i is not None})
    return settings


def run_generation(model: torch.nn.Module, inputs: dict[str, torch.Tensor], settings: GenerationConfig) -> torch.Tensor:
    """Generate with transformers' own loop, also for Whisper, whose class would override the settings."""
    inner = unwrap(model)
    floating = {key: part.to(inner.dtype) if part.is_floating_point() else part for key, part in inputs.items()}
    return cast(torch.Tensor, GenerationMixin.generate(inner, **floating, generation_config=settings))
