"""Recordings with what is said in them: samples, and the tokens of a decoder (Whisper) or letters (CTC)."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.audio import Samples, read_recording
from llmtune.data.overlong import TOO_LONG, Encoded, too_long
from llmtune.data.rejected_rows import RowError
from llmtune.data.target_collators import feature_extractor
from llmtune.errors import RecipeError, nearest
from llmtune.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

DEFAULT_SECONDS = 30.0
"""Of `speech.window_seconds`."""
SPOKEN = "%&@#+"
"""Signs that Unicode calls punctuation and that are said as words."""


def hear(row: Any, rate: int, longest: float) -> Samples | str:
    """Return the samples of a row's recording at `rate` a second, or why it cannot be trained on."""
    try:
        samples = read_recording(Path(row["audio"]), rate)
    except RowError as error:
        return str(error)
    seconds = len(samples) / rate
    if seconds > longest:
        return f"{TOO_LONG}: {seconds:.1f} s, and {longest:g} s are heard at once; its words have no times to cut it by"
    return samples


def window_seconds(extract: Any, recipe: Recipe) -> float:
    """Return the longest stretch that is heard at once; Whisper's windows have a length of their own.

    Raises RecipeError where the recipe wants more than that: the feature extractor would cut it off.
    """
    wanted = recipe.speech.window_seconds if recipe.speech else DEFAULT_SECONDS
    own = float(getattr(extract, "chunk_length", None) or wanted)
    if wanted > max(own, DEFAULT_SECONDS):
        fix = f"Set it to {own:g} or less."
        raise RecipeError.of(f"it is {wanted:g}, and this model hears {own:g} s at once", "speech.window_seconds", fix)
    return min(wanted, own)


# Whisper


def encode_whisper(rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: the samples, and the transcript behind the tokens of language and task.

    Those are given at generation, so they are not learned.
    """
    extract = feature_extractor(processor)
    longest = window_seconds(extract, recipe)
    set_speech(processor, recipe)
    prefix = list(processor.prefix_tokens)
    frames = extract.n_samples // extract.hop_length // 2
    encoded: list[Encoded] = []
    for row in rows:
        heard = hear(row, extract.sampling_rate, longest)
        if isinstance(heard, str):
            encoded.append(heard)
            continue
        said = row["text"].strip()
        target = [*prefix[1:], *processor(f" {said}", add_special_tokens=False)["input_ids"], processor.eos_token_id]
        if len(target) > recipe.data.max_length:
            encoded.append(too_long(len(target), recipe.data.max_length))
            continue
        start, end = len(prefix) - 1, len(target)
        example = Example(
            [],
            [],
            len(said.encode()),
            target_ids=target,
            target_spans=[start, end],
            audio=heard,  # type: ignore[arg-type]  # an array is as good as a list
            counted=end - start,
            cost=frames + len(target),
        )
        encoded.append([example])
    return encoded


def set_speech(processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Tell a Whisper tokenizer the language and the task, in place.

    Raises RecipeError for a language that it does not know, one that is missing, or one where there is no choice.
    """
    section = recipe.speech
    language, task = (section.language, section.task) if section else (None, "transcribe")
    processor.language = processor.task = None  # what the tokenizer's files say is not what this recipe says
    if not is_multilingual(processor):
        if (language or "en").lower() not in ("en", "english") or task != "transcribe":
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
    processor.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
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
    said = json.loads(path.read_text("utf-8")).get("is_multilingual") if path.is_file() else None
    if said is None:
        path = folder / "config.json"
        said = not path.is_file() or json.loads(path.read_text("utf-8")).get("vocab_size", 51865) >= 51865
    return bool(said)


# Letters


def encode_ctc(rows: Sequence[Any], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return one example a row: the samples, and the letters of the transcript."""
    extract = feature_extractor(processor)
    longest = window_seconds(extract, recipe)
    config = read_config(processor)
    return [_encode_letters(row, processor, extract.sampling_rate, longest, config) for row in rows]


def _encode_letters(row: Any, processor: PreTrainedTokenizerBase, rate: int, longest: float, config: Any) -> Encoded:
    letters = spell(row["text"], processor)
    if isinstance(letters, str):
        return letters
    heard = hear(row, rate, longest)
    if isinstance(heard, str):
        return heard
    frames = count_frames(len(heard), config)
    needed = len(letters) + sum(a == b for a, b in pairwise(letters))  # a blank between equals
    if frames < needed:
        return f"its text takes {needed} frames, and the recording has {frames}"
    if frames < masked_frames(config):
        hidden = masked_frames(config)
        return f"the recording has {frames} frames, and config.json hides {hidden} at once (mask_time_length)"
    said = len(row["text"].encode())
    example = Example(
        [],
        [],
        said,
        target_ids=letters,
        audio=heard,  # type: ignore[arg-type]  # an array is as good as a list
        counted=len(letters),
        cost=frames,
    )
    return [example]


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
    category = unicodedata.category(character)
    return character in SPOKEN or category[0] not in "PZC"


def count_frames(samples: int, config: Any) -> int:
    """Return how many frames a model with this configuration makes of so many samples, by its convolutions."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            samples = (samples - 1) // config.adapter_stride + 1
    return max(0, samples)


def masked_frames(config: Any) -> int:
    """Return how many frames on end SpecAugment hides in training (0: none); with fewer, transformers raises."""
    on = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0) > 0
    return int(config.mask_time_length) if on else 0


def read_config(processor: PreTrainedTokenizerBase) -> Any:
    """Return the configuration of the model that a tokenizer came with."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(processor.name_or_path), local_files_only=True)
