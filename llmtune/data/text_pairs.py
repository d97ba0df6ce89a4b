"""Two texts as an encoder-decoder reads and writes them, with the languages that some tokenizers need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.long_texts import tokenize
from llmtune.errors import Problem, RecipeError, nearest
from llmtune.recipe.schema import Recipe

LANGUAGE_CODE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")
"""The language codes of mBART (`en_XX`) and NLLB (`eng_Latn`)."""


def has_languages(processor: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer writes language codes."""
    return hasattr(processor, "src_lang") and hasattr(processor, "tgt_lang")


def starts_with_language(processor: PreTrainedTokenizerBase) -> bool:
    """Whether the decoder's first token is the language instead of a start token, as in mBART of 2020.

    The tokenizer puts the language after the end of the text, and the model moves it to the front.
    """
    return has_languages(processor) and list(processor.suffix_tokens[-1:]) != [processor.eos_token_id]


def language_tokens(processor: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the token of each language by code, excluding ordinary words that look like a code."""
    if hasattr(processor, "lang_code_to_token"):  # M2M100 writes `fr` as `__fr__`
        return {code: int(processor.get_lang_id(code)) for code in processor.lang_code_to_token}
    if hasattr(processor, "lang_code_to_id"):  # mBART
        tokens = {code: int(token) for code, token in processor.lang_code_to_id.items()}
    else:
        tokens = {str(token): i for i, token in processor.added_tokens_decoder.items() if token.special}
    return {code: i for code, i in tokens.items() if LANGUAGE_CODE.fullmatch(code) and i != processor.unk_token_id}


def set_languages(source: str | None, target: str | None, processor: PreTrainedTokenizerBase) -> None:
    """Set the languages of the texts that a tokenizer encodes next, in place.

    Raises RecipeError for a language that is missing or unknown to the tokenizer.
    """
    if not has_languages(processor):
        return
    languages = source, target
    if None not in languages and (processor.src_lang, processor.tgt_lang) == languages:
        return
    codes = language_tokens(processor)
    problems = []
    for key, code in (("translate.source_language", source), ("translate.target_language", target)):
        if code is None:
            what = "this model needs the language, and neither recipe nor row states it"
            fix = "Set it to the model's own code, such as eng_Latn; or add a column of that name to the rows. "
            fix += f"`llmtune generate` takes --{key.partition('.')[2].replace('_', '-')}."
            problems.append(Problem(what, key, fix))
        elif code not in codes:
            fix = f"Use the model's own code, such as {next(iter(codes), 'eng_Latn')}.{nearest_code(code, list(codes))}"
            problems.append(Problem(f"the tokenizer does not know the language {code!r}", key, fix))
    RecipeError.collect(problems)
    processor.src_lang, processor.tgt_lang = languages


def nearest_code(code: str, codes: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` with the model's code for `en` or `English`, such as `eng_Latn` or `en_XX`."""
    stem = re.split("[-_]", code.lower())[0]
    names = {candidate: candidate.partition("_")[0] for candidate in codes}
    alike = [
        candidate for candidate, name in names.items() if stem and (stem.startswith(name) or name.startswith(stem))
    ]
    return f" Did you mean '{alike[0]}'?" if alike else nearest(code, codes)


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
