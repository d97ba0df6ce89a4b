"""Word and character error rate of transcripts after a named normaliser, as jiwer counts them.

Shapes: N rows.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmtune.evaluate.metric import Measure
from llmtune.evaluate.paired_statistics import Floats
from llmtune.recipe.user_files import read_text

if TYPE_CHECKING:
    from jiwer import AlignmentChunk

    from llmtune.recipe.model_section import ModelSection

SPELLINGS = "normalizer.json"
NORMALISERS = ("none", "basic", "whisper")
ENGLISH = ("en", "english")
Normaliser = Callable[[str], str]


def measure_error_rate(
    metric: str,
    texts: Sequence[str],
    references: Sequence[str],
    normaliser: str = "basic",
    language: str = "",
    spellings: Mapping[str, str] | None = None,
) -> Measure:
    """Build the word error rate (`wer`) or character error rate (`cer`, spaces between words included).

    It is what is substituted, deleted and inserted in all rows by the length of all references: 0 is without an error,
    it may pass 1, and it is NaN where no reference has a word. See `make_normaliser` for the rest.
    """
    import jiwer

    assert len(texts) == len(references)
    process = jiwer.process_words if metric == "wer" else jiwer.process_characters
    unit = "words" if metric == "wer" else "characters"
    clean = make_normaliser(normaliser, language, spellings)
    sums_N2 = np.empty((0, 2))
    if texts:
        aligned = process([clean(text) for text in references], [clean(text) for text in texts])
        sums_N2 = errors_and_lengths(aligned.alignments, aligned.references)
    signature = (
        f"errors by reference {unit}, normaliser {describe(normaliser, language, spellings)}, jiwer {version('jiwer')};"
        " what is written where the reference is empty counts as errors"
    )
    return Measure(metric, sums_N2, error_rate, signature=signature)


measure_wer = partial(measure_error_rate, "wer")
measure_cer = partial(measure_error_rate, "cer")


def error_rate(sums: Floats) -> Floats:
    """[..., (errors, reference length)] -> [...]; NaN without a reference."""
    errors, length = sums[..., 0], sums[..., 1]
    return np.asarray(np.where(length > 0, errors / np.maximum(length, 1), np.nan), dtype=np.float64)


def errors_and_lengths(alignments: Sequence[Sequence[AlignmentChunk]], references: Sequence[Sequence[str]]) -> Floats:
    """Return [N, (errors, reference length)] of what jiwer aligned."""
    rows = []
    for chunks, words in zip(alignments, references, strict=True):
        wrong = [chunk for chunk in chunks if chunk.type != "equal"]
        sizes = [max(one.ref_end_idx - one.ref_start_idx, one.hyp_end_idx - one.hyp_start_idx) for one in wrong]
        rows.append((sum(sizes), len(words)))
    return np.asarray(rows, dtype=np.float64).reshape(-1, 2)


def make_normaliser(name: str, language: str = "", spellings: Mapping[str, str] | None = None) -> Normaliser:
    """Return the normaliser of a name of `NORMALISERS`.

    "none" leaves a text as it is; jiwer parts it at spaces. "basic" is Unicode's lower case without punctuation, where
    dashes and white space of any kind become one space. "whisper" is the one of OpenAI's Whisper: for English it also
    writes out contractions, turns number words into digits and, with `spellings` (British to American, in Whisper's
    tokenizer as `english_spelling_normalizer`), unifies spellings.
    """
    if name == "none":
        return str
    if name == "basic":
        return lower_without_punctuation
    assert name == "whisper"
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    english = language.lower() in ENGLISH
    whisper = EnglishTextNormalizer(dict(spellings or {})) if english else BasicTextNormalizer()
    return lambda text: str(whisper(text)).strip()


def find_spellings(model: ModelSection) -> dict[str, str] | None:
    """Return the spellings that a Whisper model brings in `normalizer.json`; None where it has none, or lies elsewhere.

    Looked for in a folder and in the hub's cache, where the model is by the time that its answers are measured.
    """
    from huggingface_hub import try_to_load_from_cache

    name = str(model.name)
    found: object = Path(name) / SPELLINGS
    if not Path(name).is_dir():
        named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        found = try_to_load_from_cache(name, SPELLINGS, revision=model.revision) if named else None
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    content = json.loads(read_text(Path(found)))
    return {str(british): str(american) for british, american in content.items()} if isinstance(content, dict) else None


def lower_without_punctuation(text: str) -> str:
    """Lower the case, make dashes spaces, take out other punctuation, join white space; composed letters (NFC)."""
    lowered = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    return " ".join("".join(map(without_punctuation, lowered)).split())


def without_punctuation(letter: str) -> str:
    """Keep what is no punctuation; a dash parts words."""
    category = unicodedata.category(letter)
    return " " if category == "Pd" else "" if category.startswith("P") else letter


def describe(name: str, language: str, spellings: Mapping[str, str] | None) -> str:
    """Name a normaliser as it stands in a report."""
    if name != "whisper":
        return name
    if language.lower() not in ENGLISH:
        return "whisper (basic)"
    return "whisper (English)" if spellings else "whisper (English, spellings not unified)"
