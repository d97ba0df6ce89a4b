"""Model inputs (T tokens): a text, chat message, pair of texts or recording, as ids and tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llmtune.data.chat_template import render_prompt
from llmtune.data.completion_encoding import prompt_ids
from llmtune.data.text_pairs import TextPair, first_token, has_languages, source_ids, target_ids
from llmtune.errors import DataError, Problem, RecipeError
from llmtune.explain.explainer import Target
from llmtune.explain.picture_prompts import PromptPicture, picture_prompt
from llmtune.explain.token_text import TokenLine, time_line
from llmtune.model.audio_models import (
    SoundWindow,
    count_frames,
    extract_features,
    feature_extractor,
    is_multilingual,
    set_speech,
)
from llmtune.model.image_models import TOKEN_TYPES
from llmtune.model.memory_plan import context_length
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import DEFAULT_TASK

LONGEST_PROMPT = 4096  # tokens: the full attention of a longer one exceeds common memory
LARGEST_FIGURE = 2048  # tokens that --max-tokens allows
MASKED_HEADS = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
NO_WORDS_FIX = "`llmtune explain attention` and `llmtune explain model` look inside such a model."


@dataclass(frozen=True)
class AttentionRequest:
    """The options of `explain attention`; None means not given."""

    text: str | None = None
    target: str | None = None
    pair: str | None = None
    audio: Path | None = None
    language: str | None = None
    """For a plain model: the spoken language, or a translator's two languages joined by a comma."""
    chat: bool = False
    """Whether to put the text into the model's chat template as a user message."""
    max_tokens: int = 512
    cut: bool = False
    """Whether to cut a text that is too long instead of refusing it."""
    kind: str | None = None
    """Kind of attention; None for all kinds."""
    layer: int | None = None
    """None for the most telling layer."""
    head: str = "mean"
    """A number from 0, mean, or rollout."""
    threshold: float | None = None
    """Minimum weight of an edge in a graph."""
    image: tuple[Path, ...] = ()
    """Pictures before the text, or at each `<image>` in it."""
    word: str | None = None
    """The word of the answer whose attention is drawn on the pictures; None for its first."""


@dataclass(frozen=True)
class PromptRequest:
    """The options of `explain generation`; None takes the recipe's value or a default."""

    prompt: str | None = None
    system: str | None = None
    context: str | None = None
    audio: Path | None = None
    plain: bool = False
    """Whether to ignore a plain model's chat template."""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    sample: bool | None = None
    seed: int | None = None
    image: tuple[Path, ...] = ()
    """Pictures before the prompt, or at each `<image>` in it."""

    def named(self) -> dict[str, str | None]:
        """Return the parts of the prompt by option name."""
        audio = str(self.audio) if self.audio else None
        texts = {"prompt": self.prompt, "system": self.system, "context": self.context, "audio": audio}
        return texts | {"image": ", ".join(map(str, self.image)) or None}


@dataclass(frozen=True)
class ModelInputs:
    """A request as model inputs."""

    ids: list[int]
    """The tokens; empty for sound."""
    recipe: Recipe
    """The run's recipe, or a default one."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Model inputs other than tokens."""
    pair: TextPair | None = None
    """Source and target of an encoder-decoder; the target may still be empty."""
    frames: TokenLine | None = None
    """The rows of a recording."""
    decoder_ids: list[int] = field(default_factory=list)
    """The decoder's first tokens, if there is more than the start token."""
    first: int | None = None
    """The language token that a translation begins with."""
    masks: tuple[int, ...] = ()
    """Positions of the mask tokens, which an encoder predicts."""
    note: str = ""
    """A note to the reader on how the inputs were made."""
    pictures: tuple[PromptPicture, ...] = ()
    """The pictures of the prompt; `tensors` has them."""

    @property
    def text_tensors(self) -> dict[str, torch.Tensor]:
        """All model inputs except the decoder's."""
        if not self.ids:
            return dict(self.tensors)
        ids_1T, tensors = torch.tensor([self.ids]), dict(self.tensors)
        for name in tensors.keys() & {*TOKEN_TYPES}:  # the tokens of an answer are text
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, len(self.ids) - tensors[name].shape[1]))
        return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), **tensors}


def check_options(given: Mapping[str, object], useful: Mapping[str, bool]) -> list[Problem]:
    """Return inapplicable and missing options; `useful` maps applicable options to whether they are required."""
    omit = f"Omit it; give {', '.join(f'--{name}' for name in useful)}."
    unused = (name for name, value in given.items() if value is not None and name not in useful)
    problems = [Problem("it does not apply to this model", f"--{name}", omit) for name in unused]
    for name in (name for name, needed in useful.items() if needed and given.get(name) is None):
        sound = name == "audio"
        what = "it is needed: this model reads recordings" if sound else "it is needed"
        problems.append(Problem(what, f"--{name}", f"Give {'a wav, flac, mp3 or ogg file' if sound else 'a text'}."))
    return problems


def make_pair(
    target: Target, given: Mapping[str, str | None], written: str = "", language: str | None = None
) -> TextPair:
    """Return source and target of an encoder-decoder; for a run, with its task's prefix and languages."""
    task, recipe, processor = target.task, target.recipe, target.processor
    if task is not None and recipe is not None and ("context" not in task.inputs or given.get("context") is not None):
        return replace(task.pair(task.make_row(given), recipe), target=written)
    languages = [getattr(processor, name, None) for name in ("src_lang", "tgt_lang")]
    if language:
        languages = [part.strip() for part in language.split(",")]
    return TextPair(str(given["prompt"]), written, languages[0], languages[-1])


def _whisper_inputs(target: Target, window: SoundWindow, recipe: Recipe, language: str | None = None) -> ModelInputs:
    """Return Whisper's inputs, and the language and task tokens at the start of its answer.

    `language` is that of a plain model; a run's recipe has its own.
    """
    if target.task is not None:
        target.task.prepare_processor(target.processor, recipe)
    else:
        set_speech(target.processor, language, "transcribe")
    features = extract_features(feature_extractor(target.processor), [window.samples])["input_features"]
    all_1T = torch.ones((1, features.shape[-1]), dtype=torch.int64)  # the silence after a sound counts
    tensors = {"input_features": features, "attention_mask": all_1T}
    return ModelInputs([], recipe, tensors, decoder_ids=list(target.processor.prefix_tokens))


# Attention


def read_attention_text(target: Target, request: AttentionRequest) -> ModelInputs:
    """Make the inputs for attention maps, without reading weights.

    Raises:
        RecipeError: an option that this model needs is missing, or one does not apply.
        DataError: the text is empty or too long, or the recording cannot be read.
    """
    check_text_options(target, request)
    recipe = target.recipe or target.default_recipe()
    if target.takes_audio:
        return _read_recording(target, request, recipe)
    if request.image:
        return _read_picture_question(target, request, recipe)
    text, processor, tensors, note = str(request.text), target.processor, {}, ""
    pair = kinds = first = None
    if target.family == "encoder-decoder":
        pair = make_pair(target, {"prompt": text}, request.target or "", request.language)
        with _language_errors(target):
            whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_overlong": "error"})})
            ids = source_ids(pair, processor, whole)
        first = first_token(pair, processor)
        if pair.target:
            fit_tokens(target_ids(pair, processor)[0], "--target", target, request)
    elif request.chat:
        ids = render_prompt([{"role": "user", "content": text}], processor, recipe)
    elif target.task is not None and target.task.model_kind.is_bare:
        ids, prompt = target.task.query_ids(text, processor, recipe)
        note = f"the text is a query, after the prompt {prompt!r}" if prompt else ""
    else:
        encoded = processor(text, request.pair, verbose=False)
        ids, kinds = list(encoded["input_ids"]), encoded.get("token_type_ids")
        if not ids:
            raise DataError.of("it has no tokens", "--text", "Give at least one word.")
    ids = fit_tokens(ids, "--text", target, request)
    if kinds is not None:
        tensors["token_type_ids"] = torch.tensor([kinds[: len(ids)]])
    return ModelInputs(ids, recipe, tensors, pair, first=first, note=note)


def _read_picture_question(target: Target, request: AttentionRequest, recipe: Recipe) -> ModelInputs:
    """Return the prompt of a question with pictures; the rows of a figure have one for each picture."""
    prompt, pictures = picture_prompt(target, request.text, None, request.image, recipe)
    rows = len(prompt) - sum(len(picture.stretch) - 1 for picture in pictures)
    if rows > request.max_tokens or len(prompt) > LONGEST_PROMPT:
        limits = f"at most {LONGEST_PROMPT:,} are drawn, {request.max_tokens:,} of text"
        what = f"it has {len(prompt):,} tokens, {rows:,} of text: {limits}"
        raise DataError.of(what, "--text", "Shorten it, or give smaller pictures.")
    assert prompt.media is not None, "it has pictures"
    return ModelInputs([*prompt.ids], recipe, dict(prompt.media()), pictures=pictures)


def check_text_options(target: Target, request: AttentionRequest) -> None:
    """Raise RecipeError or DataError for options that are missing, empty or inapplicable."""
    writes = target.family == "encoder-decoder"
    named = target.is_whisper or (writes and has_languages(target.processor))
    makes_vectors = target.task is not None and target.task.model_kind.is_bare
    paired = target.family == "encoder" and not makes_vectors
    has_image = target.takes_images and bool(request.image)
    options = {"target": writes or has_image, "pair": paired, "language": named and target.recipe is None}
    options |= {"image": target.takes_images, "word": has_image}
    useful = {
        "audio" if target.takes_audio else "text": True,
        **{name: False for name, used in options.items() if used},
    }
    names = ("text", "audio", "target", "pair", "language", "image", "word")
    given = {name: getattr(request, name) for name in names} | {"image": request.image or None}
    problems = check_options(given, useful)
    if request.chat and target.task is not None and makes_vectors:
        problems.append(Problem(f"a run of task {target.task.name} reads plain texts", "--chat", "Omit it."))
    elif request.chat and not (target.family == "decoder" and target.processor.chat_template):
        problems.append(Problem("the model has no chat template", "--chat", "Omit it."))
    RecipeError.collect(problems)
    DataError.collect(
        Problem("the text is empty", f"--{name}", "Give at least one word.")
        for name in ("text", "target", "pair")
        if given[name] is not None and not given[name].strip()
    )


@contextmanager
def _language_errors(target: Target) -> Iterator[None]:
    """Point to --language if a plain model needs languages: there is no recipe to name them."""
    try:
        yield
    except RecipeError as error:
        if target.recipe is not None:
            raise
        fix = "Give the spoken language, such as en, or a translator's two languages, such as eng_Latn,fra_Latn."
        raise RecipeError.of(error.problems[0].what, "--language", fix) from None


def fit_tokens(ids: Sequence[int], where: str, target: Target, request: AttentionRequest) -> list[int]:
    """Return tokens that fit into the model and a figure; --cut truncates them and keeps an end token.

    Raises DataError for too many tokens.
    """
    context = context_length(target.config)
    room = min(context or request.max_tokens, request.max_tokens)
    if len(ids) <= room:
        return list(ids)
    if request.cut:
        ends = target.family != "decoder" and ids[-1] in target.processor.all_special_ids
        return [*ids[: room - 1], ids[-1]] if ends else list(ids[:room])
    beyond = bool(context and len(ids) > context)
    limit = f"{target.name} has positions for {context:,}" if beyond else f"a figure shows at most {room:,}"
    more = "" if beyond or len(ids) > LARGEST_FIGURE else f"raise --max-tokens to {len(ids)}, "
    fix = f"Shorten it, {more}or add --cut to use only the first {room:,}."
    raise DataError.of(f"it has {len(ids):,} tokens, and {limit}", where, fix)


def _read_recording(target: Target, request: AttentionRequest, recipe: Recipe) -> ModelInputs:
    extract = feature_extractor(target.processor)
    window = target.first_window(request.audio, recipe)
    seconds = window.seconds
    if not (window.is_complete or request.cut):
        what = f"it is longer than the {seconds:.1f} s that the model reads at once"
        raise DataError.of(what, "--audio", f"Shorten it, or add --cut to use only its first {seconds:.1f} s.")
    if not target.is_whisper:
        frames = count_frames(len(window.samples), target.config)
        if not frames:
            raise DataError.of("it is too short for a single frame", "--audio", "Give a longer recording.")
        values = extract_features(extract, [window.samples])["input_values"]
        return ModelInputs([], recipe, {"input_values": values}, frames=time_line(seconds, frames, frames))
    guessed = target.task is None and request.language is None and is_multilingual(target.processor)
    with _language_errors(target):
        inputs = _whisper_inputs(target, window, recipe, "en" if guessed else request.language)
    pair = TextPair("", (request.target or "").strip())
    if pair.target:
        fit_tokens(transcript_ids(pair, target), "--target", target, request)
    frames = int(target.config.max_source_positions)
    filled = math.ceil(seconds / extract.chunk_length * frames)  # type: ignore[attr-defined]
    line = time_line(seconds, max(1, min(frames, filled)), frames)
    note = "taken as English; set another language with --language" if guessed else ""
    return replace(inputs, pair=pair, frames=line, note=note)


def transcript_ids(pair: TextPair, target: Target) -> list[int]:
    """Return the decoder inputs of Whisper: language and task tokens, then the transcript."""
    processor = target.processor
    text = processor(f" {pair.target}", add_special_tokens=False)["input_ids"] if pair.target else []
    return [*processor.prefix_tokens, *text]


# Generation


def read_prompt(target: Target, request: PromptRequest) -> ModelInputs:
    """Make a prompt's token ids: as in training and evaluation for a run, or as a plain model needs them.

    Raises:
        RecipeError: it is empty or too long; an option does not apply; the model generates no text.
        DataError: the chat template rejects the messages, or a recording cannot be read.
    """
    check_prompt_options(target, request)
    recipe = target.recipe or target.default_recipe(chat=not request.plain)
    task, processor = target.task, target.processor
    if target.is_whisper:
        window = target.first_window(request.audio, recipe)
        note = "" if window.is_complete else f"Only the first {window.seconds:.0f} s of the recording are used."
        return replace(_whisper_inputs(target, window, recipe), note=note)
    if target.family == "encoder":
        inputs = _read_masked(str(request.prompt), target, recipe)
    elif target.takes_images:
        prompt, pictures = picture_prompt(target, request.prompt, request.system, request.image, recipe)
        media = dict(prompt.media()) if pictures and prompt.media else {}
        inputs = ModelInputs([*prompt.ids], recipe, media, pictures=pictures)
    elif task is not None and task.model_kind.decodes:
        inputs = ModelInputs(task.prompt_ids(task.make_row(request.named()), processor, recipe), recipe)
    elif task is not None or target.family == "encoder-decoder":
        pair = make_pair(target, request.named())
        inputs = ModelInputs(source_ids(pair, processor, recipe), recipe, first=first_token(pair, processor))
    elif recipe.task == DEFAULT_TASK:
        turns = (("system", request.system), ("user", request.prompt))
        messages = [{"role": role, "content": content} for role, content in turns if content]
        inputs = ModelInputs(render_prompt(messages, processor, recipe), recipe)
    else:
        inputs = ModelInputs(prompt_ids(str(request.prompt), processor), recipe)
    limit = min(context_length(target.config) or LONGEST_PROMPT, LONGEST_PROMPT)
    if len(inputs.ids) > limit:
        limit_phrase = f"the most is {limit:,}" if limit == LONGEST_PROMPT else f"the model has {limit:,} positions"
        raise RecipeError.of(f"it has {len(inputs.ids):,} tokens, and {limit_phrase}", "--prompt", "Shorten it.")
    return inputs


def check_prompt_options(target: Target, request: PromptRequest) -> None:
    """Raise RecipeError for missing, empty or inapplicable options, or for a model that generates no text."""
    task, has_template, whisper = target.task, bool(target.processor.chat_template), target.is_whisper
    named = list(getattr(target.config, "architectures", None) or [])
    if task is None:
        writes = whisper or target.family != "encoder" or any(name.endswith(MASKED_HEADS) for name in named)
        what = f"this model predicts no words: it is a {named[0] if named else target.config.model_type}"
    else:
        writes = whisper or task.model_kind.predicts_tokens
        what = f"the model of this run predicts no words (task {task.name})"
    if not writes:
        raise RecipeError.of(what, target.name, NO_WORDS_FIX)
    templated = has_template and target.family == "decoder" and not request.plain
    model_inputs = {"audio": True} if whisper else {"prompt": True, **({"system": False} if templated else {})}
    options, given = dict(task.inputs) if task else model_inputs, request.named()
    options |= {"image": False} if target.takes_images else {}
    problems = check_options(given, options)
    for name in (name for name, needed in options.items() if needed and given.get(name) is not None):
        if not str(given[name]).strip():
            problems.append(Problem("it is empty", f"--{name}", "Give a text."))
    if request.plain and (task is not None or not has_template):
        what = "a run's prompt is always made as in training" if target.recipe else "the model has no chat template"
        what = "pictures are read in the chat template" if request.image and not target.recipe else what
        problems.append(Problem(what, "--plain", "Omit it."))
    RecipeError.collect(problems)


def _read_masked(text: str, target: Target, recipe: Recipe) -> ModelInputs:
    processor = target.processor
    mask = processor.mask_token
    if mask is None or mask not in text:
        what = f"an encoder fills in masks, and the prompt has no {mask or 'mask token'}"
        fix = f"Write {mask or 'the mask token'} for each word to predict: The sky is {mask or '[MASK]'}."
        raise RecipeError.of(what, "--prompt", fix)
    ids = list(processor(text, verbose=False)["input_ids"])
    return ModelInputs(ids, recipe, masks=tuple(at for at, i in enumerate(ids) if i == processor.mask_token_id))
