"""What speech models write down: recordings of any length, heard in windows whose texts are joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.audio import Samples, cut_windows, read_recording
from llmtune.data.rejected_rows import RowError
from llmtune.data.speech_encoding import count_frames, set_speech, window_seconds
from llmtune.data.target_collators import ctc_collator, feature_extractor, hear
from llmtune.errors import DataError
from llmtune.evaluate.generation import only_these_settings
from llmtune.evaluate.task_predictions import decoder_settings, generate
from llmtune.evaluate.token_batches import run_in_batches
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.task_losses import sound_pieces
from llmtune.records import Advance, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

WINDOWS = {"cpu": 8, "cuda": 64}
"""Windows that are heard at once."""


def hear_windows(rows: Sequence[Any], extract: Any, recipe: Recipe) -> list[tuple[int, Samples]]:
    """Return the windows of all recordings, each with the number of its row.

    Raises DataError for a recording that cannot be read.
    """
    rate, seconds = extract.sampling_rate, window_seconds(extract, recipe)
    found = []
    for i, row in enumerate(rows):
        try:
            samples = read_recording(Path(row["audio"]), rate)
        except RowError as error:
            raise DataError.of(str(error), str(row["audio"]), "Give a wav, flac, mp3 or ogg file.") from None
        found += [(i, window) for window in cut_windows(samples, rate, seconds)]
    return found


def join_windows(rows: int, windows: Sequence[tuple[int, Any]], texts: Sequence[str]) -> list[str]:
    """Join the texts of each row's windows."""
    parts: list[list[str]] = [[] for _ in range(rows)]
    for (i, _), text in zip(windows, texts, strict=True):
        if text.strip():
            parts[i].append(text.strip())
    return [" ".join(part) for part in parts]


def transcribe_whisper(
    model: torch.nn.Module,
    rows: Sequence[Any],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Return what Whisper writes down; language and task are given to it, not guessed."""
    extract = feature_extractor(processor)
    set_speech(processor, recipe)
    windows = hear_windows(rows, extract, recipe)
    prefix = list(processor.prefix_tokens)
    texts = [""] * len(windows)
    left = _windows_left(windows, len(rows))
    with torch.random.fork_rng(), only_these_settings(model) as own:
        torch.manual_seed(recipe.seed)
        settings = decoder_settings(own, model, processor, recipe)
        room = unwrap(model).config.max_target_positions - len(prefix)
        settings.max_new_tokens = min(recipe.generation.max_new_tokens, room)

        def work(batch: list[int]) -> None:
            heard = hear(extract, [windows[i][1] for i in batch])
            features = heard["input_features"]
            begun_BT = torch.tensor([prefix] * len(batch))
            all_BT = torch.ones((len(batch), features.shape[-1]), dtype=torch.int64)  # silence behind a sound is heard
            inputs = {"input_features": features, "attention_mask": all_BT, "decoder_input_ids": begun_BT}
            written_BT = generate(model, {key: part.to(device) for key, part in inputs.items()}, settings)
            said = processor.batch_decode(written_BT[:, len(prefix) :].tolist(), skip_special_tokens=True)
            for i, text in zip(batch, said, strict=True):
                texts[i] = text
            advance(_count_done(left, windows, batch))

        _run(len(windows), device, work)
    return join_windows(len(rows), windows, texts)


def transcribe_ctc(
    model: torch.nn.Module,
    rows: Sequence[Any],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[str]:
    """Return the likeliest letter of each frame, repeats and blanks taken out."""
    extract, collate = feature_extractor(processor), ctc_collator(processor, recipe)
    config = unwrap(model).config
    heard = hear_windows(rows, extract, recipe)
    windows = [(i, window) for i, window in heard if count_frames(len(window), config)]  # else too short for a letter
    texts = [""] * len(windows)
    left = _windows_left(windows, len(rows))
    advance(left.count(0))

    def work(batch: list[int]) -> None:
        examples = [Example([], [], 0, audio=windows[i][1]) for i in batch]  # type: ignore[arg-type]
        tensors = collate(examples, 0)
        moved = {key: part.to(device) if isinstance(part, torch.Tensor) else part for key, part in tensors.items()}
        for inputs, at in sound_pieces(model, moved):
            best_BT = model(**inputs).logits.argmax(-1)
            for row, i in enumerate(batch[at]):
                letters = best_BT[row, : count_frames(len(windows[i][1]), config)].tolist()
                texts[i] = without_marks(processor.decode(letters), processor)
        advance(_count_done(left, windows, batch))

    _run(len(windows), device, work)
    return join_windows(len(rows), windows, texts)


def without_marks(text: str, processor: PreTrainedTokenizerBase) -> str:
    """Take special tokens such as `</s>` out of a text that was decoded with them.

    The tokenizer would do so before it looks for repeats, and take the blanks between two equal letters along.
    """
    for mark in processor.all_special_tokens:
        if mark != getattr(processor, "word_delimiter_token", None):
            text = text.replace(mark, "")
    return text


def _run(count: int, device: str, work: Any) -> None:
    """Hear windows in batches; out of memory makes those smaller."""
    run_in_batches([1] * count, WINDOWS.get(device.split(":")[0], WINDOWS["cpu"]), work)


def _windows_left(windows: Sequence[tuple[int, Any]], rows: int) -> list[int]:
    left = [0] * rows
    for i, _ in windows:
        left[i] += 1
    return left


def _count_done(left: list[int], windows: Sequence[tuple[int, Any]], batch: Sequence[int]) -> int:
    """Take a batch's windows off `left`, in place; return how many rows are done by that."""
    done = 0
    for i in batch:
        row = windows[i][0]
        left[row] -= 1
        done += left[row] == 0
    return done
