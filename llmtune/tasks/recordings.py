"""Recordings of speech: read whole for training, in windows for answers, and made into what a model hears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from llmtune.data.audio import Samples, SpeechRow, cut_windows, read_recording, to_float
from llmtune.data.overlong import TOO_LONG
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.token_batches import budget_for, run_in_batches
from llmtune.recipe import SpeechSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

WINDOWS = {"cpu": 8, "cuda": 64}
"""Windows that are heard at once."""


class FeatureExtractor(Protocol):
    """What is used of transformers' feature extractors of sound."""

    sampling_rate: int
    n_samples: int
    hop_length: int

    def __call__(self, raw_speech: Sequence[object], **options: object) -> dict[str, torch.Tensor]:
        """Return spectrograms, or waves that are normed."""


def feature_extractor(processor: PreTrainedTokenizerBase) -> FeatureExtractor:
    """Return what turns sound into a model's input, from the folder that its tokenizer came from.

    Raises EnvironmentProblem where there is none.
    """
    from transformers import AutoFeatureExtractor

    folder = str(processor.name_or_path)
    try:
        extract: FeatureExtractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "The folder needs preprocessor_config.json: get it from where the model comes from."
        raise EnvironmentProblem.of(f"there is no feature extractor that can be read: {first}", folder, fix) from error
    return extract


def extract_features(
    extract: FeatureExtractor, sounds: Sequence[Sequence[int] | Samples], **options: object
) -> dict[str, torch.Tensor]:
    """Make samples into what a model reads, in float32 whatever number format the model is computed in."""
    floats = [to_float(sound) for sound in sounds]
    with torch.autocast("cpu", enabled=False):
        return dict(extract(floats, sampling_rate=extract.sampling_rate, return_tensors="pt", **options))


def read_samples(row: SpeechRow, rate: int, longest: float) -> Samples | str:
    """Return the samples of a row's recording at `rate` a second, or why it cannot be trained on."""
    try:
        samples = read_recording(Path(row["audio"]), rate)
    except RowError as error:
        return str(error)
    seconds = len(samples) / rate
    if seconds > longest:
        return f"{TOO_LONG}: {seconds:.1f} s, and {longest:g} s are heard at once; its words have no times to cut it by"
    return samples


def window_seconds(extract: FeatureExtractor, recipe: Recipe) -> float:
    """Return the longest stretch that is heard at once; Whisper's windows have a length of their own.

    Raises RecipeError where the recipe wants more than that: the feature extractor would cut it off.
    """
    default = SpeechSection().window_seconds
    stated = recipe.speech.window_seconds if recipe.speech else default
    own = float(getattr(extract, "chunk_length", None) or stated)
    if stated > max(own, default):
        fix = f"Set it to {own:g} or less."
        raise RecipeError.of(f"it is {stated:g}, and this model hears {own:g} s at once", "speech.window_seconds", fix)
    return min(stated, own)


def read_windows(rows: Sequence[SpeechRow], extract: FeatureExtractor, recipe: Recipe) -> list[tuple[int, Samples]]:
    """Return the windows of all recordings, each with the number of its row.

    Raises DataError for a recording that cannot be read.
    """
    rate, seconds = extract.sampling_rate, window_seconds(extract, recipe)
    windows = []
    for i, row in enumerate(rows):
        try:
            samples = read_recording(Path(row["audio"]), rate)
        except RowError as error:
            raise DataError.of(str(error), str(row["audio"]), "Give a wav, flac, mp3 or ogg file.") from None
        windows += [(i, window) for window in cut_windows(samples, rate, seconds)]
    return windows


def transcribe(
    count: int,
    windows: Sequence[tuple[int, Samples]],
    loaded: LoadedModel,
    write: Callable[[list[Samples]], list[str]],
) -> list[str]:
    """Return the text of `count` rows, out of what `write` makes of batches of their windows.

    Out of memory makes batches smaller.
    """
    texts = [""] * len(windows)
    left = [0] * count
    for i, _ in windows:
        left[i] += 1
    loaded.advance(left.count(0))

    def work(batch: list[int]) -> None:
        done = 0
        for at, text in zip(batch, write([windows[at][1] for at in batch]), strict=True):
            texts[at] = text
            row = windows[at][0]
            left[row] -= 1
            done += left[row] == 0
        loaded.advance(done)

    run_in_batches([1] * len(windows), budget_for(loaded.device, WINDOWS), work)
    parts: list[list[str]] = [[] for _ in range(count)]
    for (i, _), text in zip(windows, texts, strict=True):
        if text.strip():
            parts[i].append(text.strip())
    return [" ".join(part) for part in parts]
