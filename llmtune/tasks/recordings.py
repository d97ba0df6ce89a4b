"""Recordings of speech: complete for training, in windows for answers; transcripts as a model's tokens or letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmtune.data.audio import SpeechRow
from llmtune.data.overlong import TOO_LONG
from llmtune.data.rejected_rows import RowError
from llmtune.data.waveforms import Waveform, cut_windows, decode_recording
from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.token_batches import budget_for, run_in_batches
from llmtune.model.audio_models import FeatureExtractor
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import SpeechSection

WINDOWS = {"cpu": 8, "cuda": 64}
"""How many windows are transcribed in one batch."""
SPOKEN = "%&@#+"
"""Characters that Unicode classifies as punctuation but that are spoken as words."""


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
    model_seconds = float(getattr(extract, "chunk_length", None) or stated)
    if stated > max(model_seconds, default):
        fix = f"Set it to {model_seconds:g} or less."
        raise RecipeError.of(
            f"it is {stated:g}, but the model takes {model_seconds:g} s at once", "speech.window_seconds", fix
        )
    return min(stated, model_seconds)


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


def spell(text: str, processor: PreTrainedTokenizerBase) -> list[int] | str:
    """Return the letters of a transcript, in the case of the vocabulary; or why there are none.

    Punctuation that the vocabulary lacks is dropped, because it is not heard. Accents, digits and signs such as % are
    heard, so they stay.
    """
    vocabulary = processor.get_vocab()
    composed = unicodedata.normalize("NFC", text)
    for cased in (composed, composed.upper(), composed.lower()):
        kept = [c for c in cased if c in vocabulary or c.isspace() or is_heard(c)]
        fits_vocabulary = all(c in vocabulary or c.isspace() for c in kept)
        ids = processor("".join(kept).strip(), add_special_tokens=False)["input_ids"] if fits_vocabulary else []
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
