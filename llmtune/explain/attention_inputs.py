"""What attention is looked at on: a text, what an encoder-decoder makes of it, or a recording, as the model reads it.

Shape: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.audio import Samples, read_recording
from llmtune.data.chat_template import render_prompt
from llmtune.data.rejected_rows import RowError
from llmtune.data.seq2seq_encoding import Pair, knows_languages, source_ids, target_ids
from llmtune.data.speech_encoding import DEFAULT_SECONDS, count_frames, is_multilingual, set_speech
from llmtune.data.target_collators import feature_extractor, hear
from llmtune.errors import DataError, Problem, RecipeError
from llmtune.evaluate.generation import only_these_settings
from llmtune.evaluate.task_predictions import decoder_settings, generate, write_texts
from llmtune.explain.attention_summary import Line, Lines
from llmtune.explain.target import Subject
from llmtune.explain.token_text import Token, name_tokens
from llmtune.model.memory_plan import context_length
from llmtune.model.task_losses import decoder_inputs
from llmtune.recipe import Recipe, SpeechSection
from llmtune.tasks.text_to_text import EncoderDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TOKENS = 512
"""Rows of a picture, unless a person asks for more."""
LIMIT = 2048
"""Rows that a person can ask for: a page of more is too large for a browser."""
MOST_STRETCHES = 60
"""Rows that a recording is shown in."""
FRAMES = 5
"""Frames of a recording in one row at least: a tenth of a second."""
LONGEST_ANSWER = 64
WHOLE = 1_000_000


@dataclass(frozen=True)
class Given:
    """What a person gives; what is None is not given."""

    text: str | None = None
    target: str | None = None
    pair: str | None = None
    audio: Path | None = None
    language: str | None = None
    """Of a model that is no run's: what is spoken, or both languages of a translator, with a comma between."""
    chat: bool = False
    """Whether the text is put into the model's chat template, as a user's message."""
    words: bool = False
    """Whether the pieces of a word share a row."""
    max_tokens: int = MOST_TOKENS
    cut: bool = False
    """Whether a text that is too long is cut instead of refused."""


@dataclass(frozen=True)
class Reading:
    """What goes into the model, and how its positions are called."""

    inputs: dict[str, torch.Tensor]
    source: Line
    recipe: Recipe
    """The run's, or what stands for one."""
    pair: Pair | None = None
    """What an encoder-decoder reads and writes; its target may be empty still."""
    words: bool = False
    notes: tuple[str, ...] = ()
    """What a person has to know about how it was read."""

    def lines(self, target: Sequence[Token] = ()) -> Lines:
        """Return what stands beside the pictures."""
        written = Line.of(target) if target else None
        if not self.words:
            return Lines(self.source, written)
        return Lines(self.source.by_word(), written and written.by_word())


def read(subject: Subject, given: Given) -> Reading:
    """Make inputs of what was given, before any weights are read.

    Raises:
        RecipeError: what this model needs is not given, or it has no use for something.
        DataError: the text is empty or too long, or the recording cannot be read.
    """
    check_given(subject, given)
    recipe = subject.recipe or plain_recipe(subject)
    if hears(subject):
        return _read_sound(subject, given, recipe)
    pair, kinds = None, None
    if subject.family == "encoder-decoder":
        pair = _pair(subject, given, recipe)
        with languages_of(given, subject):
            read_whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_overlong": "error"})})
            ids = source_ids(pair, subject.processor, read_whole)
        if pair.target:
            fit(target_ids(pair, subject.processor)[0], "--target", subject, given)
    else:
        ids, kinds = _ids(subject, given, recipe)
    ids = fit(ids, "--text", subject, given)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones((1, len(ids)), dtype=torch.int64)}
    if kinds is not None:
        inputs["token_type_ids"] = torch.tensor([kinds[: len(ids)]])
    return Reading(inputs, Line.of(name_tokens(subject.processor, ids)), recipe, pair, given.words)


def hears(subject: Subject) -> bool:
    """Whether the model reads sound."""
    return bool(subject.config.model_type == "whisper" or hasattr(subject.config, "conv_kernel"))


def check_given(subject: Subject, given: Given) -> None:
    """Raise for what is missing, empty or of no use to this model: RecipeError and DataError."""
    writes, sound = subject.family == "encoder-decoder", hears(subject)
    asked = "--audio" if sound else "--text"
    useful = {"audio": sound, "text": not sound, "target": writes, "pair": subject.family == "encoder"}
    speaks = subject.config.model_type == "whisper" or (writes and knows_languages(subject.processor))
    useful |= {"language": speaks and subject.recipe is None}
    problems = [
        Problem("this model has no use for it", f"--{name}", f"Leave it out; give {asked}.")
        for name, used in useful.items()
        if getattr(given, name) is not None and not used
    ]
    if given.chat and not (subject.family == "decoder" and subject.processor.chat_template):
        problems.append(Problem("the model has no chat template", "--chat", "Leave it out."))
    if (given.audio if sound else given.text) is None:
        what = "this model reads recordings" if sound else "it is needed"
        problems.append(
            Problem(what, asked, "Give a wav, flac, mp3 or ogg file." if sound else "Give a text in quotes.")
        )
    RecipeError.collect(problems)
    DataError.collect(
        Problem("the text is empty", f"--{name}", "Give at least one word.")
        for name in ("text", "target", "pair")
        if (text := getattr(given, name)) is not None and not text.strip()
    )


def plain_recipe(subject: Subject) -> Recipe:
    """Return what stands for the recipe of a model that is no run's: defaults."""
    task = "speech" if hears(subject) else "summarize" if subject.family == "encoder-decoder" else "completion"
    if task == "completion" and subject.processor.chat_template:
        task = "chat"
    stated: dict[str, Any] = {"recipe_version": 1, "name": "model", "task": task, "data": {"train": "none"}}
    return Recipe.model_validate({**stated, "model": {"name": subject.name}})


def _ids(subject: Subject, given: Given, recipe: Recipe) -> tuple[list[int], list[int] | None]:
    """Return the tokens of a text, and which of two texts each belongs to."""
    if given.chat:
        return render_prompt([{"role": "user", "content": given.text}], subject.processor, recipe), None
    made = subject.processor(given.text, given.pair, verbose=False)
    if not made["input_ids"]:
        raise DataError.of("the tokenizer makes nothing of it", "--text", "Give at least one word.")
    return list(made["input_ids"]), made.get("token_type_ids")


def _pair(subject: Subject, given: Given, recipe: Recipe) -> Pair:
    """Return what is read and written: of a run as its task puts it, with its prefix and languages."""
    task, processor = subject.task, subject.processor
    if isinstance(task, EncoderDecoder) and "context" not in task.inputs:
        pair = task.pair(task.make_row({"prompt": given.text}), recipe)
        return replace(pair, target=given.target or "")
    own = [getattr(processor, name, None) for name in ("src_lang", "tgt_lang")]
    said = [part.strip() for part in given.language.split(",")] if given.language else own
    return Pair(str(given.text), given.target or "", said[0], said[-1])


@contextmanager
def languages_of(given: Given, subject: Subject) -> Iterator[None]:
    """Say of a model that is no run's which option names its languages."""
    try:
        yield
    except RecipeError as error:
        if subject.recipe is not None:
            raise
        fix = "Give what is spoken, such as en, or both languages of a translator, such as eng_Latn,fra_Latn."
        raise RecipeError.of(error.problems[0].what, "--language", fix) from None


def fit(ids: Sequence[int], where: str, subject: Subject, given: Given) -> list[int]:
    """Return tokens that fit into the model and into a picture, cut where that is asked for, an end token kept.

    Raises DataError for too many of them.
    """
    context = context_length(subject.config) or WHOLE
    room = min(context, given.max_tokens)
    if len(ids) <= room:
        return list(ids)
    if given.cut:
        ends = subject.family != "decoder" and ids[-1] in subject.processor.all_special_ids
        return [*ids[: room - 1], ids[-1]] if ends else list(ids[:room])
    cut = f"or add --cut to look at the first {room:,} alone"
    if len(ids) > context:
        what = f"it has {len(ids):,} tokens, and {subject.name} has positions for {context:,}"
        raise DataError.of(what, where, f"Shorten it, {cut}.")
    what = f"it has {len(ids):,} tokens, and pictures are drawn of {room:,} at most"
    more = f"raise --max-tokens to {len(ids)}, " if len(ids) <= LIMIT else ""
    raise DataError.of(what, where, f"Shorten it, {more}{cut}.")


# Sound


def _read_sound(subject: Subject, given: Given, recipe: Recipe) -> Reading:
    extract = feature_extractor(subject.processor)
    whisper = subject.config.model_type == "whisper"
    try:
        samples = read_recording(Path(str(given.audio)), extract.sampling_rate)
    except RowError as error:
        raise DataError.of(str(error), "--audio", "Give a wav, flac, mp3 or ogg file.") from None
    seconds = float(getattr(extract, "chunk_length", None) or DEFAULT_SECONDS)
    if len(samples) > seconds * extract.sampling_rate:
        if not given.cut:
            what = f"it lasts {len(samples) / extract.sampling_rate:.1f} s, and {seconds:g} s are heard at once"
            raise DataError.of(what, "--audio", f"Shorten it, or add --cut to look at its first {seconds:g} s alone.")
        samples = samples[: int(seconds * extract.sampling_rate)]
    inputs = dict(hear(extract, [samples]))
    if not whisper:
        frames = count_frames(len(samples), subject.config)
        if not frames:
            raise DataError.of("it is too short for a single frame", "--audio", "Give a longer recording.")
        return Reading({"input_values": inputs["input_values"]}, time_line(samples, extract, frames, frames), recipe)
    recipe, notes = _with_language(subject, given, recipe)
    with languages_of(given, subject):
        set_speech(subject.processor, recipe)
    pair = Pair("", (given.target or "").strip())
    if pair.target:
        fit(_spoken_ids(pair, subject), "--target", subject, given)
    frames = int(subject.config.max_source_positions)
    heard = math.ceil(len(samples) / extract.sampling_rate / seconds * frames)
    line = time_line(samples, extract, max(1, min(frames, heard)), frames)
    return Reading({"input_features": inputs["input_features"]}, line, recipe, pair, given.words, notes)


def _with_language(subject: Subject, given: Given, recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    section = recipe.speech or SpeechSection()
    language = given.language or section.language
    guessed = language is None and is_multilingual(subject.processor)
    spoken = section.model_copy(update={"language": "en" if guessed else language})
    notes = ("taken as English; --language says otherwise",) if guessed else ()
    return recipe.model_copy(update={"speech": spoken}), notes


def time_line(samples: Samples, extract: Any, heard: int, frames: int) -> Line:
    """Name stretches of frames by when they begin; those behind the end of the recording are one, called silence."""
    size = max(FRAMES, math.ceil(heard / MOST_STRETCHES))
    starts = range(0, heard, size)
    second = len(samples) / extract.sampling_rate / heard
    digits = 1 if size * second >= 0.1 else 2
    tokens = [Token(-1, f"{start * second:.{digits}f}s", special=False, continues=False) for start in starts]
    sizes = [min(size, heard - start) for start in starts]
    if frames > heard:
        tokens.append(Token(-1, "silence", special=True, continues=False))
        sizes.append(frames - heard)
    return Line(tuple(tokens), tuple(sizes))


# What the decoder reads


def write(model: PreTrainedModel, reading: Reading, subject: Subject, given: Given) -> tuple[list[int], str]:
    """Return the tokens that the decoder reads, and the text: the one given, or the model's own greedy answer."""
    assert reading.pair is not None
    said = reading.pair.target
    if not said:
        said, given = _answer(model, reading, subject).strip(), replace(given, cut=True)
    pair = replace(reading.pair, target=said)
    if hears(subject):
        return fit(_spoken_ids(pair, subject), "--target", subject, given), said
    labels, _, end = target_ids(pair, subject.processor)
    moved = decoder_inputs(model, torch.tensor([labels], device=model.device))[0].tolist()
    return fit([int(i) for i in moved[:end]], "--target", subject, given), said


def _spoken_ids(pair: Pair, subject: Subject) -> list[int]:
    """Return what Whisper's decoder reads: the tokens of language and task, and what was said."""
    processor = subject.processor
    said = processor(f" {pair.target}", add_special_tokens=False)["input_ids"] if pair.target else []
    return [*processor.prefix_tokens, *said]


def _answer(model: PreTrainedModel, reading: Reading, subject: Subject) -> str:
    """Let the model write; an answer that is looked at is a short one."""
    plain = {"max_new_tokens": LONGEST_ANSWER, "do_sample": False, "num_beams": 1}
    generation = type(reading.recipe.generation).model_validate(plain)
    recipe, device = reading.recipe.model_copy(update={"generation": generation}), str(model.device)
    processor, pair = subject.processor, reading.pair
    assert pair is not None, "an encoder-decoder reads and writes"
    with torch.inference_mode():
        if not hears(subject):
            return write_texts(model, [{}], processor, recipe, lambda row, settled: pair, device=device)[0]
        begun = list(processor.prefix_tokens)
        features = reading.inputs["input_features"].to(device)
        inputs = {"input_features": features, "decoder_input_ids": torch.tensor([begun], device=device)}
        inputs["attention_mask"] = torch.ones((1, features.shape[-1]), dtype=torch.int64, device=device)
        with only_these_settings(model) as own:
            settings = decoder_settings(own, model, processor, recipe)
            settings.max_new_tokens = min(LONGEST_ANSWER, subject.config.max_target_positions - len(begun))
            written_1T = generate(model, inputs, settings)
        return str(processor.decode(written_1T[0, len(begun) :].tolist(), skip_special_tokens=True))
