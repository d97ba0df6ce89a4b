"""Transcripts as tokens: those of language and task that Whisper begins with, and the letters of CTC models."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import RecipeError, nearest
from llmtune.recipe import SpeechSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


SPOKEN = "%&@#+"
"""Signs that Unicode calls punctuation and that are said as words."""


def set_speech(processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Set the recipe's language and task in a Whisper tokenizer, in place.

    Raises RecipeError for a language that it does not know, one that is missing, or one where there is no choice.
    """
    section = recipe.speech or SpeechSection()
    language = section.language
    processor.language = processor.task = None  # what the tokenizer's files say is not what this recipe says
    if not is_multilingual(processor):
        if (language or "en").lower() not in ("en", "english") or section.task != "transcribe":
            what = "this model knows English alone, and writes down what is said"
            raise RecipeError.of(what, "speech.language", "Remove language and task, or name a multilingual model.")
        processor.set_prefix_tokens(predict_timestamps=False)
        return
    if language is None:
        fix = "Set it to what is spoken, such as en; the model would guess, and could guess wrongly in training."
        raise RecipeError.of("this model knows many languages, and the recipe names none", "speech.language", fix)
    code = language_code(language)
    if processor.convert_tokens_to_ids(f"<|{code}|>") in (None, processor.unk_token_id):
        fix = "Name a language that this model was made for, or another model."
        raise RecipeError.of(f"the tokenizer has no token for {language!r}", "speech.language", fix)
    processor.set_prefix_tokens(language=language, task=section.task, predict_timestamps=False)
    second = processor.convert_ids_to_tokens(processor.prefix_tokens[1])
    assert second == f"<|{code}|>", f"Whisper's tokenizer writes {second} for {code}"


def language_code(language: str) -> str:
    """Return the code of a language named by code or in English; raises RecipeError for one unknown to Whisper."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    named = language.lower()
    code = named if named in LANGUAGES else TO_LANGUAGE_CODE.get(named)
    if code is None:
        known = sorted(LANGUAGES if len(language) <= 3 else TO_LANGUAGE_CODE)
        fix = f"Use a code such as en, de, fr, or a name such as french.{nearest(named, known)}"
        raise RecipeError.of(f"the model does not know the language {language!r}", "speech.language", fix)
    return str(code)


def is_multilingual(processor: PreTrainedTokenizerBase) -> bool:
    """Whether a Whisper model knows more than English: its vocabulary does not tell, since all have the same words.

    Its generation settings say it; those made before there were such settings have one token less for English alone.
    """
    folder = Path(str(processor.name_or_path))
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text("utf-8")).get("is_multilingual") if path.is_file() else None
    if stated is None:
        path = folder / "config.json"
        stated = not path.is_file() or json.loads(path.read_text("utf-8")).get("vocab_size", 51865) >= 51865
    return bool(stated)


def spell(text: str, processor: PreTrainedTokenizerBase) -> list[int] | str:
    """Return the letters of a transcript, in the case that the vocabulary has; or why there are none.

    Punctuation that the vocabulary lacks is left out: it is not heard. Accents, digits and signs such as % are.
    """
    vocabulary = processor.get_vocab()
    composed = unicodedata.normalize("NFC", text)
    for cased in (composed, composed.upper(), composed.lower()):
        kept = [c for c in cased if c in vocabulary or c.isspace() or is_heard(c)]
        known = all(c in vocabulary or c.isspace() for c in kept)
        ids = processor("".join(kept).strip(), add_special_tokens=False)["input_ids"] if known else []
        if any(processor.convert_ids_to_tokens(i) in kept for i in ids):  # more than spaces
            return list(ids)
    unknown = [c for c in composed if is_heard(c) and not {c, c.upper(), c.lower()} & vocabulary.keys()]
    if unknown:
        return f"a letter that the model does not know: {unknown[0]!r}"
    if any(map(is_heard, composed)):
        return "the model knows some letters of the text in upper case alone, and others in lower case alone"
    return "the transcript has no letters"


def is_heard(character: str) -> bool:
    """Whether a character stands for a sound: it is neither white space nor punctuation."""
    return character in SPOKEN or unicodedata.category(character)[0] not in "PZC"
