"""Recordings of speech: complete for training, in windows for answers; transcripts as a model's tokens or letters."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from llmtune.data.audio import SpeechRow, Waveform, cut_windows, decode_recording, to_float
from llmtune.data.overlong import TOO_LONG
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, EnvironmentProblem, RecipeError, first_line, nearest
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.token_batches import budget_for, run_in_batches
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import SpeechSection

WINDOWS = {"cpu": 8, "cuda": 64}
"""How many windows are transcribed in one batch."""
SPOKEN = "%&@#+"
"""Characters that Unicode classifies as punctuation but that are spoken as words."""


class FeatureExtractor(Protocol):
    """The part of transformers' audio feature extractors that is used here."""

    sampling_rate: int
    n_samples: int
    hop_length: int

    def __call__(self, raw_speech: Sequence[object], **options: object) -> dict[str, torch.Tensor]:
        """Return spectrograms, or normalised waves."""


def feature_extractor(processor: PreTrainedTokenizerBase) -> FeatureExtractor:
    """Return the feature extractor from the folder of its tokenizer.

    Raises EnvironmentProblem if it has none.
    """
    from transformers import AutoFeatureExtractor

    folder = str(processor.name_or_path)
    try:
        extract: FeatureExtractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"the feature extractor cannot be read: {first_line(error)}"
        fix = "The folder needs preprocessor_config.json: copy it from the original model."
        raise EnvironmentProblem.of(what, folder, fix) from error
    return extract


def extract_features(
    extract: FeatureExtractor, sounds: Sequence[Sequence[int] | Waveform], **options: object
) -> dict[str, torch.Tensor]:
    """Convert samples to model inputs, in float32 whatever the model's dtype."""
    floats = [to_float(sound) for sound in sounds]
    with torch.autocast("cpu", enabled=False):
        return dict(extract(floats, sampling_rate=extract.sampling_rate, return_tensors="pt", **options))


def load_samples(row: SpeechRow, rate: int, longest: float) -> Waveform | str:
    """Return the samples of a row's recording at `rate` per second, or why it cannot be trained on."""
    try:
        samples = decode_recording(Path(row["audio"]), rate)
    except RowError as error:
        return str(error)
    seconds = len(samples) / rate
    if seconds > longest:
        return f"{TOO_LONG}: {seconds:.1f} s, but the limit is {longest:g} s, and its transcript has no timestamps"
    return samples


def window_seconds(extract: FeatureExtractor, recipe: Recipe) -> float:
    """Return the longest input in seconds; Whisper's windows have a fixed length.

    Raises RecipeError if the recipe asks for more, because the feature extractor would cut it off.
    """
    default = SpeechSection().window_seconds
    stated = recipe.speech.window_seconds if recipe.speech else default
    own = float(getattr(extract, "chunk_length", None) or stated)
    if stated > max(own, default):
        fix = f"Set it to {own:g} or less."
        raise RecipeError.of(f"it is {stated:g}, but the model takes {own:g} s at once", "speech.window_seconds", fix)
    return min(stated, own)


def read_windows(rows: Sequence[SpeechRow], extract: FeatureExtractor, recipe: Recipe) -> list[tuple[int, Waveform]]:
    """Return the windows of all recordings, each with its row's number.

    Raises DataError for a recording that cannot be read.
    """
    rate, seconds = extract.sampling_rate, window_seconds(extract, recipe)
    windows = []
    for i, row in enumerate(rows):
        try:
            samples = decode_recording(Path(row["audio"]), rate)
        except RowError as error:
            raise DataError.of(str(error), str(row["audio"]), "Give a wav, flac, mp3 or ogg file.") from None
        windows += [(i, window) for window in cut_windows(samples, rate, seconds)]
    return windows


def transcribe(
    count: int,
    windows: Sequence[tuple[int, Waveform]],
    loaded: LoadedModel,
    write: Callable[[list[int]], list[str]],
) -> list[str]:
    """Return the text of `count` rows; `write` transcribes batches of their windows, given by number.

    If memory runs out, batches become smaller.
    """
    left = [0] * count
    for i, _ in windows:
        left[i] += 1
    loaded.advance(left.count(0))

    def work(batch: list[int]) -> Sequence[str]:
        written = write(batch)
        for at in batch:
            row = windows[at][0]
            left[row] -= 1
            loaded.advance(int(left[row] == 0))
        return written

    texts = run_in_batches([1] * len(windows), budget_for(loaded.device, WINDOWS), work)
    parts: list[list[str]] = [[] for _ in range(count)]
    for (i, _), text in zip(windows, texts, strict=True):
        if text.strip():
            parts[i].append(text.strip())
    return [" ".join(part) for part in parts]


# Transcripts


def set_speech(processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Set the recipe's language and task in a Whisper tokenizer, in place.

    Raises RecipeError for an unknown or missing language, or for a language given to an English-only model.
    """
    section = recipe.speech or SpeechSection()
    language = section.language
    processor.language = processor.task = None  # discard the setting in the tokenizer's files
    if not is_multilingual(processor):
        if (language or "en").lower() not in ("en", "english") or section.task != "transcribe":
            what = "this model only transcribes English"
            raise RecipeError.of(what, "speech.language", "Remove language and task, or name a multilingual model.")
        processor.set_prefix_tokens(predict_timestamps=False)
        return
    if language is None:
        fix = "Set it to the spoken language, such as en. Otherwise the model would guess it, maybe wrongly."
        raise RecipeError.of("this model knows many languages, but the recipe names none", "speech.language", fix)
    code = language_code(language)
    if processor.convert_tokens_to_ids(f"<|{code}|>") in (None, processor.unk_token_id):
        fix = "Name a language that this model was made for, or another model."
        raise RecipeError.of(f"the tokenizer has no token for {language!r}", "speech.language", fix)
    processor.set_prefix_tokens(language=language, task=section.task, predict_timestamps=False)
    second = processor.convert_ids_to_tokens(processor.prefix_tokens[1])
    assert second == f"<|{code}|>", f"Whisper's tokenizer writes {second} for {code}"


def language_code(language: str) -> str:
    """Return the code of a language named by code or in English. Raises RecipeError if Whisper does not know it."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    named = language.lower()
    code = named if named in LANGUAGES else TO_LANGUAGE_CODE.get(named)
    if code is None:
        known = sorted(LANGUAGES if len(language) <= 3 else TO_LANGUAGE_CODE)
        fix = f"Use a code such as en, de, fr, or a name such as french.{nearest(named, known)}"
        raise RecipeError.of(f"the model does not know the language {language!r}", "speech.language", fix)
    return str(code)


def is_multilingual(processor: PreTrainedTokenizerBase) -> bool:
    """Whether a Whisper model is multilingual. The vocabulary does not show it, because all models have the same words.

    The generation settings show it. Older models without such settings have one token less if they are English-only.
    """
    folder = Path(str(processor.name_or_path))
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text("utf-8")).get("is_multilingual") if path.is_file() else None
    if stated is None:
        path = folder / "config.json"
        stated = not path.is_file() or json.loads(path.read_text("utf-8")).get("vocab_size", 51865) >= 51865
    return bool(stated)


def spell(text: str, processor: PreTrainedTokenizerBase) -> list[int] | str:
    """Return the letters of a transcript, in the case of the vocabulary; or why there are none.

    Punctuation that the vocabulary lacks is dropped, because it is not heard. Accents, digits and signs such as % are
    heard, so they stay.
    """
    vocabulary = processor.get_vocab()
    composed = unicodedata.normalize("NFC", text)
    for cased in (composed, composed.upper(), composed.lower()):
        kept = [c for c in cased if c in vocabulary or c.isspace() or is_heard(c)]
        known = all(c in vocabulary or c.isspace() for c in kept)
        ids = processor("".join(kept).strip(), add_special_tokens=False)["input_ids"] if known else []
        if any(processor.convert_ids_to_tokens(i) in kept for i in ids):  # contains more than spaces
            return list(ids)
    unknown = [c for c in composed if is_heard(c) and not {c, c.upper(), c.lower()} & vocabulary.keys()]
    if unknown:
        return f"a letter that the model does not know: {unknown[0]!r}"
    if any(map(is_heard, composed)):
        return "the model knows some letters of the text only in upper case, and others only in lower case"
    return "the transcript has no letters"


def is_heard(character: str) -> bool:
    """Whether a character is pronounced: it is neither white space nor punctuation."""
    return character in SPOKEN or unicodedata.category(character)[0] not in "PZC"


def without_marks(text: str, processor: PreTrainedTokenizerBase) -> str:
    """Remove special tokens such as `</s>` from a text that was decoded with them.

    The tokenizer would remove them before it merges repeats, and lose the blanks between two equal letters.
    """
    for mark in processor.all_special_tokens:
        if mark != getattr(processor, "word_delimiter_token", None):
            text = text.replace(mark, "")
    return text
