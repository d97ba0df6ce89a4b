"""Task speech: transcribe recordings, with Whisper or with a CTC model (wav2vec2 and its relatives).

Shapes: B rows of a batch, T positions or frames, V letters, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.audio import SpeechRow
from llmtune.data.collators import IGNORED, pad
from llmtune.data.example import Collate, Example, Samples
from llmtune.data.overlong import too_long
from llmtune.data.task_interface import Encoded
from llmtune.data.tokenization import Segment, highlight
from llmtune.data.waveforms import Waveform
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.decoder_generation import decoder_settings, run_generation
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel
from llmtune.evaluate.generation import only_these_settings
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.text_metrics import find_spellings, measure_cer, measure_wer
from llmtune.model.audio_models import (
    SoundWindow,
    count_frames,
    extract_features,
    feature_extractor,
    heard_at_once,
    masked_frames,
    set_speech,
)
from llmtune.model.causal_lm_loss import move_to, unwrap
from llmtune.recipe.model_kind import CTC, WHISPER
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import SpeechSection
from llmtune.records import Batch, Loss
from llmtune.tasks.base import Endpoint, Task
from llmtune.tasks.recordings import load_samples, read_windows, spell, transcribe, window_seconds
from llmtune.tasks.text_to_text import TargetExample, check_decoder_start, decoder_targets, encoder_decoder_loss

MEASURES = {"wer": measure_wer, "cer": measure_cer}


class Speech(Task[SpeechRow, str]):
    """The rows of speech."""

    name = "speech"
    endpoint = Endpoint("/v1/transcribe", "the transcript")
    required_inputs = ("audio",)

    def make_row(self, given: Mapping[str, str | None]) -> SpeechRow:
        """Return the row of a recording."""
        return {"audio": str(Path(given["audio"] or "").absolute()), "content": "", "text": ""}

    def split_answer(self, row: SpeechRow) -> tuple[SpeechRow, str]:
        """Return the row without its transcript, and the transcript."""
        return {**row, "text": ""}, row["text"]

    def first_window(self, audio: Path, processor: PreTrainedTokenizerBase, recipe: Recipe) -> SoundWindow:
        """Return the first window of a recording.

        Raises DataError if it cannot be read, and RecipeError if it contains no sound.
        """
        extract = feature_extractor(processor)
        windows = read_windows([self.make_row({"audio": str(audio)})], extract, recipe)
        if not windows:
            raise RecipeError.of("it contains no sound", "--audio", "Give a recording with sound in it.")
        samples = windows[0][1]
        return SoundWindow(samples, len(samples) / extract.sampling_rate, len(windows) == 1)

    def compute_metric(self, metric: str, output: EvalPrediction[str], recipe: Recipe) -> Measure | None:
        """Measure transcripts after the recipe's normaliser."""
        if metric not in MEASURES:
            return None
        section = recipe.speech or SpeechSection()
        language = section.language if section.task == "transcribe" and section.language else "en"
        spellings = find_spellings(recipe.model) if section.normalizer == "whisper" else None
        return MEASURES[metric](output.predictions, output.references, section.normalizer, language, spellings)


@dataclass(frozen=True)
class WhisperExample(TargetExample):
    """A recording with the decoder's transcript."""

    audio: Samples = ()


class Whisper(Speech):
    """A model whose decoder begins with language and task tokens."""

    model_kind = WHISPER
    example_type = WhisperExample

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model is a Whisper."""
        return bool(config.model_type == "whisper")

    def prepare_processor(self, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Set the recipe's language and task, in place. Raises as `set_speech` does."""
        section = recipe.speech or SpeechSection()
        set_speech(processor, section.language, section.task)

    def set_generation(self, settings: GenerationConfig, recipe: Recipe) -> None:
        """Set the recipe's language and task, which Whisper's class looks up in its own settings."""
        if recipe.speech is not None and getattr(settings, "is_multilingual", False):
            settings.language, settings.task = recipe.speech.language, recipe.speech.task

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Set language and task, which are saved with the tokenizer, and compare the tokens with the model's.

        Raises EnvironmentProblem if model and tokenizer do not match.
        """
        check_decoder_start(model, processor)
        self.prepare_processor(processor, recipe)
        start = processor.prefix_tokens[0]
        if start != model.config.decoder_start_token_id:
            what = (
                f"the decoder starts with token {model.config.decoder_start_token_id}, but the tokenizer's is {start}"
            )
            raise EnvironmentProblem.of(what, str(processor.name_or_path), "Use the tokenizer of this model.")

    def encode(self, rows: Sequence[SpeechRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example per row: the samples, and the transcript after the language and task tokens.

        These tokens are given at generation, so they are not supervised.
        """
        extract = feature_extractor(processor)
        longest = window_seconds(extract, recipe)
        self.prepare_processor(processor, recipe)
        prefix = list(processor.prefix_tokens)
        frames = extract.n_samples // extract.hop_length // 2

        def encode_one(row: SpeechRow) -> Encoded:
            samples = load_samples(row, extract.sampling_rate, longest)
            if isinstance(samples, str):
                return samples
            text = row["text"].strip()
            words = processor(f" {text}", add_special_tokens=False)["input_ids"]
            target = [*prefix[1:], *words, processor.eos_token_id]
            if len(target) > recipe.data.max_length:
                return too_long(len(target), recipe.data.max_length)
            learned = [len(prefix) - 1, len(target)]
            example = WhisperExample(
                [],
                [],
                len(text.encode()),
                counted=learned[1] - learned[0],
                cost=frames + len(target),
                target_ids=target,
                target_spans=learned,
                audio=samples,  # type: ignore[arg-type]  # an array works like a list
            )
            return [example]

        return [encode_one(row) for row in rows]

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return the function that makes log-mel spectrograms of samples."""
        extract = feature_extractor(processor)

        def collate(examples: Sequence[WhisperExample], draw: int = 0) -> Batch:
            features = extract_features(extract, [example.audio for example in examples])["input_features"]
            return {"input_features": features, "n_rows": len(examples), **decoder_targets(examples)}

        return collate

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the transcripts' tokens."""
        return encoder_decoder_loss(model, batch, by_row)

    def highlighted_text(
        self, example: WhisperExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show the length of a recording, and the supervised part of its transcript."""
        return [heard(example.audio), *highlight(example.target_ids, example.target_spans, processor)]

    def predict(self, rows: Sequence[SpeechRow], loaded: LoadedModel) -> list[str]:
        """Return Whisper's transcripts; language and task are given, not guessed."""
        model, processor, recipe = loaded.model, loaded.processor, loaded.recipe
        extract = feature_extractor(processor)
        self.prepare_processor(processor, recipe)
        windows = read_windows(rows, extract, recipe)
        prefix = list(processor.prefix_tokens)
        cut: dict[int, bool] = {}
        with torch.random.fork_rng(), only_these_settings(model) as model_settings:
            torch.manual_seed(recipe.seed)
            settings = decoder_settings(model_settings, model, processor, recipe)
            room = unwrap(model).config.max_target_positions - len(prefix)
            settings.max_new_tokens = min(recipe.generation.max_new_tokens, room)

            def write(batch: list[int]) -> list[str]:
                features = extract_features(extract, [windows[at][1] for at in batch])["input_features"]
                begun_BT = torch.tensor([prefix] * len(batch))
                all_BT = torch.ones((len(batch), features.shape[-1]), dtype=torch.int64)  # the padding counts too
                inputs = {"input_features": features, "attention_mask": all_BT, "decoder_input_ids": begun_BT}
                begun = {key: part.to(loaded.device) for key, part in inputs.items()}
                written = run_generation(model, begun, settings)[:, len(prefix) :].tolist()
                for at, ids in zip(batch, written, strict=True):
                    row = windows[at][0]
                    cut[row] = cut.get(row, False) or not {*settings.eos_token_id} & {*ids}
                texts: list[str] = processor.batch_decode(written, skip_special_tokens=True)
                return texts

            texts = transcribe(len(rows), windows, loaded, write)
        for row, is_cut in cut.items():
            loaded.note_end(row, is_cut)
        return texts


@dataclass(frozen=True)
class LettersExample(Example):
    """A recording with the letters of its transcript."""

    letters: Sequence[int] = ()
    audio: Samples = ()

    @property
    def sequences(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """The letters, which are learned by frame and not by position."""
        return [(self.letters, ())]


class Ctc(Speech):
    """A model that assigns each frame of a recording a letter or a blank."""

    model_kind = CTC
    example_type = LettersExample
    loss_unit = "letters"

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model makes its frames from samples by convolutions; other models need spectrograms."""
        return hasattr(config, "conv_kernel")

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Compare the letters of a model with its tokenizer's.

        Turns layer dropping off, in place: a layer without a gradient would block training in several processes. Raises
        EnvironmentProblem if model and tokenizer do not match.
        """
        config, where = model.config, str(processor.name_or_path)
        config.layerdrop = 0.0
        if recipe.model.add_tokens:
            raise RecipeError.of("this model writes only letters", "model.add_tokens", "Remove it.")
        if processor.vocab_size > config.vocab_size:
            what = f"the tokenizer has {processor.vocab_size} letters, but the model has {config.vocab_size} outputs"
            fix = "Set vocab_size in config.json to the tokenizer's, for a new head."
            raise EnvironmentProblem.of(what, where, fix)
        if config.pad_token_id != processor.pad_token_id:
            tokenizer_blank, model_blank = processor.pad_token_id, config.pad_token_id
            what = f"the blank is token {model_blank} in config.json, but {tokenizer_blank} in the tokenizer"
            fix = "Set pad_token_id in config.json to the value that the model was trained with."
            raise EnvironmentProblem.of(what, where, fix)

    def encode(self, rows: Sequence[SpeechRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example per row: the samples, and the letters of the transcript."""
        from transformers import AutoConfig

        extract = feature_extractor(processor)
        longest = window_seconds(extract, recipe)
        config = AutoConfig.from_pretrained(str(processor.name_or_path), local_files_only=True)

        def encode_one(row: SpeechRow) -> Encoded:
            letters = spell(row["text"], processor)
            if isinstance(letters, str):
                return letters
            samples = load_samples(row, extract.sampling_rate, longest)
            if isinstance(samples, str):
                return samples
            frames = count_frames(len(samples), config)
            needed = len(letters) + sum(a == b for a, b in pairwise(letters))  # equal neighbours need a blank
            if frames < needed:
                return f"its text needs {needed} frames, but the recording has {frames}"
            if frames < (hidden := masked_frames(config)):
                return f"the recording has {frames} frames, but config.json masks {hidden} at once (mask_time_length)"
            return [letters_example(samples, row["text"], letters, frames)]

        return [encode_one(row) for row in rows]

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return the function that makes batches of sound waves; each wave is normalised before padding.

        `samples_R` [R] has the length of each.
        """
        extract = feature_extractor(processor)

        def collate(examples: Sequence[LettersExample], draw: int = 0) -> Batch:
            sounds = [example.audio for example in examples]
            waves = extract_features(extract, sounds, padding=True, return_attention_mask=True)
            return {
                "input_values": waves["input_values"],
                "attention_mask": waves["attention_mask"],
                "samples_R": torch.tensor([len(sound) for sound in sounds]),
                "labels": pad([example.letters for example in examples], IGNORED),
                "n_rows": len(examples),
            }

        return collate

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the negative log-likelihood of the transcripts over all alignments; the count is their tokens.

        Graves et al., "Connectionist Temporal Classification", 2006. If padding would change the model's input (its
        first layer normalises over time), rows are processed one by one.
        """
        inner = unwrap(model)
        labels_BT, blank = batch["labels"], inner.config.pad_token_id
        frames_R = inner._get_feat_extract_output_lengths(batch["samples_R"]).to(torch.long)
        sums = []
        for values, rows in heard_at_once(model, batch):
            logits_BTV = model(**values).logits
            log_TBV = logits_BTV.float().log_softmax(-1).transpose(0, 1)
            targets_BT = labels_BT[rows]
            sizes_B = (targets_BT >= 0).sum(-1)
            with torch.backends.cudnn.flags(enabled=False):  # its kernel is not deterministic
                losses_B = functional.ctc_loss(
                    log_TBV, targets_BT.clamp_min(0), frames_R[rows], sizes_B, blank=blank, reduction="none"
                )
            sums.append(losses_B)
        losses_R = torch.cat(sums)
        count = int((labels_BT >= 0).sum())
        zero = torch.zeros((), device=losses_R.device)
        if not by_row:
            return Loss(losses_R.sum(), count, zero, losses_R.detach())
        return Loss(losses_R.sum(), count, zero, losses_R, torch.zeros_like(losses_R))

    def highlighted_text(
        self, example: LettersExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show the length of a recording, and its transcript."""
        return [heard(example.audio), *highlight(example.letters, [0, len(example.letters)], processor)]

    def predict(self, rows: Sequence[SpeechRow], loaded: LoadedModel) -> list[str]:
        """Return the most likely letter of each frame, without repeats and blanks."""
        processor = loaded.processor
        config = unwrap(loaded.model).config
        collate = self.collator(processor, loaded.recipe)
        windows = read_windows(rows, feature_extractor(processor), loaded.recipe)
        windows = [(i, window) for i, window in windows if count_frames(len(window), config)]  # others are too short

        def write(at_once: list[int]) -> list[str]:
            sounds = [windows[at][1] for at in at_once]
            batch = collate([letters_example(sound, "", [], 0) for sound in sounds], 0)
            moved = move_to(loaded.device, batch)
            texts = []
            for inputs, at in heard_at_once(loaded.model, moved):
                best_BT = loaded.model(**inputs).logits.argmax(-1)
                for best_T, sound in zip(best_BT, sounds[at], strict=True):
                    letters = best_T[: count_frames(len(sound), config)].tolist()
                    texts.append(without_marks(processor.decode(letters), processor))
            return texts

        return transcribe(len(rows), windows, loaded, write)

    def baseline(
        self, references: Sequence[str], prompts: Sequence[SpeechRow], recipe: Recipe
    ) -> tuple[str, list[str]]:
        """Predict empty transcripts."""
        return "an empty transcript", [""] * len(prompts)


def letters_example(samples: Waveform, text: str, letters: list[int], frames: int) -> LettersExample:
    """Return the example of a recording with the letters of its transcript."""
    sound: Any = samples  # an array works like a list
    return LettersExample([], [], len(text.encode()), counted=len(letters), cost=frames, letters=letters, audio=sound)


def heard(audio: Samples) -> Segment:
    """Return the length of a recording, for display."""
    return Segment(f"[{len(audio):,} samples]\n", False)


def without_marks(text: str, processor: PreTrainedTokenizerBase) -> str:
    """Remove special tokens such as `</s>` from a text that was decoded with them.

    The tokenizer would remove them before it merges repeats, and lose the blanks between two equal letters.
    """
    for mark in processor.all_special_tokens:
        if mark != getattr(processor, "word_delimiter_token", None):
            text = text.replace(mark, "")
    return text


VARIANTS = (Whisper(), Ctc())
