"""Models that read recordings: feature extractors, Whisper's language tokens, and the frames of wav2vec2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmtune.data.waveforms import Waveform, to_float
from llmtune.errors import EnvironmentProblem, RecipeError, first_line, nearest
from llmtune.model.causal_lm_loss import model_inputs, unwrap
from llmtune.model.model_files import read_json_object
from llmtune.records import Batch

MASKING = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
"""Audio models whose output padding does not change, except through a first layer that normalises over time."""


class SoundWindow(NamedTuple):
    """The part of a recording that a model reads at once."""

    samples: Waveform
    seconds: float
    is_complete: bool
    """Whether it is the complete recording."""


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


def set_speech(processor: PreTrainedTokenizerBase, language: str | None, task: str) -> None:
    """Set language and task (`transcribe` or `translate`) in a Whisper tokenizer, in place.

    Raises RecipeError for an unknown or missing language, or for a language given to an English-only model.
    """
    processor.language = processor.task = None  # discard the setting in the tokenizer's files
    if not is_multilingual(processor):
        if (language or "en").lower() not in ("en", "english") or task != "transcribe":
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
    processor.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
    second = processor.convert_ids_to_tokens(processor.prefix_tokens[1])
    assert second == f"<|{code}|>", f"Whisper's tokenizer writes {second} for {code}"


def language_code(language: str) -> str:
    """Return the code of a language named by code or in English. Raises RecipeError if Whisper does not know it."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    named = language.lower()
    code = named if named in LANGUAGES else TO_LANGUAGE_CODE.get(named)
    if code is None:
        languages = sorted(LANGUAGES if len(language) <= 3 else TO_LANGUAGE_CODE)
        fix = f"Use a code such as en, de, fr, or a name such as french.{nearest(named, languages)}"
        raise RecipeError.of(f"the model does not know the language {language!r}", "speech.language", fix)
    return str(code)


def is_multilingual(processor: PreTrainedTokenizerBase) -> bool:
    """Whether a Whisper model is multilingual. The vocabulary does not show it, because all models have the same words.

    The generation settings show it. Older models without such settings have one token less if they are English-only.
    """
    folder = Path(str(processor.name_or_path))
    path = folder / "generation_config.json"
    stated = read_json_object(path).get("is_multilingual") if path.is_file() else None
    if stated is None:
        path = folder / "config.json"
        stated = not path.is_file() or cast(int, read_json_object(path).get("vocab_size", 51865)) >= 51865
    return bool(stated)


def count_frames(samples: int, config: PretrainedConfig) -> int:
    """Return how many frames the convolutions of a model make of this many samples."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            samples = (samples - 1) // config.adapter_stride + 1
    return max(0, samples)


def masked_frames(config: PretrainedConfig) -> int:
    """Return how many consecutive frames SpecAugment hides in training (0: none); transformers raises with fewer."""
    on = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0) > 0
    return int(config.mask_time_length) if on else 0


def heard_at_once(model: torch.nn.Module, batch: Batch) -> list[tuple[dict[str, torch.Tensor], slice]]:
    """Return the complete batch, or its rows one by one without padding if the model cannot mask it.

    Padding reaches a first layer that normalises over time, and convolutions after the mask (Data2Vec, Conformer).
    """
    inputs, config = model_inputs(model, batch), unwrap(model).config
    masked = config.model_type in MASKING and not getattr(config, "add_adapter", False)
    if masked and config.feat_extract_norm != "group":
        return [(inputs, slice(0, batch["n_rows"]))]
    sizes = batch["samples_R"].tolist()
    values_BN = inputs["input_values"]
    return [({"input_values": values_BN[i : i + 1, :size]}, slice(i, i + 1)) for i, size in enumerate(sizes)]
