"""Two texts as an encoder-decoder reads and writes them, with the languages that some tokenizers need."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.language_codes import has_languages, language_tokens, set_languages
from llmtune.data.long_texts import tokenize
from llmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class TextPair:
    """Source and target, with their languages if the tokenizer needs them."""

    source: str
    target: str
    source_language: str | None = None
    target_language: str | None = None


def source_ids(pair: TextPair, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the encoder's input, in training and at inference; its end is cut if `data.on_overlong` says so."""
    set_languages(pair.source_language, pair.target_language, processor)
    cut = recipe.data.on_overlong == "truncate"
    options = {"truncation": True, "max_length": recipe.data.max_length} if cut else {}
    return list(tokenize(processor, pair.source, **options)["input_ids"])


def target_ids(pair: TextPair, processor: PreTrainedTokenizerBase) -> tuple[list[int], int, int]:
    """Return the decoder's output, and the supervised range in it.

    A language code at its start is given at generation, so it is not supervised. Tokens after the end are not text.
    """
    set_languages(pair.source_language, pair.target_language, processor)
    ids = list(processor(text_target=pair.target, verbose=False)["input_ids"])
    end = processor.eos_token_id
    if end not in ids:
        ids.append(end)
    start = int(has_languages(processor) and ids[0] == first_token(pair, processor))
    return ids, start, len(ids) - ids[::-1].index(end)


def first_token(pair: TextPair, processor: PreTrainedTokenizerBase) -> int | None:
    """Return the token that an answer in the target language must begin with; None if the model has none."""
    if not has_languages(processor):
        return None
    return language_tokens(processor).get(str(pair.target_language))
