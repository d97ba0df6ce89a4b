"""What an encoder-decoder needs before it can be trained: a token that its decoder starts with, and one for padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.data.seq2seq_encoding import starts_with_language
from llmtune.errors import EnvironmentProblem, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


def check_decoder_start(model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Raise EnvironmentProblem where the model's configuration does not say how its decoder starts."""
    config = model.config
    size = config.get_text_config(decoder=True).vocab_size
    problems = []
    for name in ("decoder_start_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is None and name == "pad_token_id":
            config.pad_token_id = processor.pad_token_id
        elif token is None and name == "decoder_start_token_id" and starts_with_language(processor):
            continue
        elif token is None:
            fix = "Set it in config.json: the padding token for T5, the end token for BART."
            problems.append(
                Problem(f"{name} is missing: what the decoder starts with is not known", "config.json", fix)
            )
        elif not 0 <= int(token) < size:
            problems.append(Problem(f"{name} is {token}, and the decoder knows {size:,} tokens", "config.json"))
    EnvironmentProblem.collect(problems)
