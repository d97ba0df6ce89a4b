"""What a model is given to go on from: the same token ids as in training and evaluation, or a plain model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.chat_template import render_prompt
from llmtune.data.completion_encoding import prompt_ids
from llmtune.data.seq2seq_encoding import Pair, first_token, source_ids
from llmtune.data.speech_encoding import set_speech
from llmtune.data.target_collators import feature_extractor, hear
from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.transcription import hear_windows
from llmtune.explain.target import Subject
from llmtune.model.memory_plan import context_length
from llmtune.recipe import Recipe
from llmtune.tasks.completion import MaskedCompletion
from llmtune.tasks.text_to_text import EncoderDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 4096
"""Tokens of a prompt: the attention of a longer one does not fit into common memory, written out as it is here."""
MASKED_HEADS = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
FAMILIES = {"decoder": "completion", "encoder-decoder": "summarize", "encoder": "completion"}
"""What a plain model of a family is asked to do, as far as its tokens go."""


@dataclass(frozen=True)
class Given:
    """What a person gives; what is None is not given."""

    prompt: str | None = None
    system: str | None = None
    context: str | None = None
    audio: Path | None = None
    plain: bool = False
    """Whether the prompt of a plain model goes without its chat template."""

    def named(self) -> dict[str, str | None]:
        """Return it by the names of the options."""
        audio = None if self.audio is None else str(self.audio)
        return {"prompt": self.prompt, "system": self.system, "context": self.context, "audio": audio}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    ids: list[int]
    """Its tokens; none where it is sound."""
    recipe: Recipe
    """How it is answered."""
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """What goes into the model beside tokens: the sound."""
    begun: list[int] = field(default_factory=list)
    """What the decoder is made to begin with, where that is more than its start token."""
    first: int | None = None
    """The language that a translation begins with."""
    places: tuple[int, ...] = ()
    """Of a text with masks, the masks: what is predicted."""
    note: str = ""
    """What a person has to know about how it was made."""


def read_prompt(subject: Subject, given: Given) -> Prompt:
    """Make token ids of what was given.

    Raises:
        RecipeError: it is empty, or not what this model is asked; it is too long; the model writes no text.
        DataError: the chat template does not take the messages, or a recording cannot be read.
    """
    check_given(subject, given)
    recipe = subject.recipe or plain_recipe(subject, given)
    if hears(subject):
        return _sound(subject, given, recipe)
    task = subject.task
    if subject.family == "encoder":
        prompt = _masked(str(given.prompt), subject, recipe)
    elif task is None:
        prompt = _plain(subject, given, recipe)
    elif task.continues_text:
        prompt = Prompt(task.prompt_ids(task.make_row(given.named()), subject.processor, recipe), recipe)
    else:
        assert isinstance(task, EncoderDecoder), "who writes a text makes pairs of its rows"
        pair = task.pair(task.make_row(given.named()), recipe)
        ids = source_ids(pair, subject.processor, recipe)
        prompt = Prompt(ids, recipe, first=first_token(pair, subject.processor))
    check_length(prompt.ids, subject)
    return prompt


def hears(subject: Subject) -> bool:
    """Whether the model writes down what it hears."""
    return bool(subject.config.model_type == "whisper")


def check_given(subject: Subject, given: Given) -> None:
    """Raise RecipeError for what is missing, empty or of no use here, and for a model that writes no text."""
    _check_writes(subject)
    if subject.task is not None:
        asks: Mapping[str, bool] = subject.task.inputs
    else:
        templated = bool(subject.processor.chat_template) and subject.family == "decoder" and not given.plain
        asks = {"audio": True} if hears(subject) else {"prompt": True, **({"system": False} if templated else {})}
    wanted = ", ".join(f"--{name}" for name in asks)
    problems = []
    for name, value in given.named().items():
        if asks.get(name) and not (value or "").strip():
            what = "it is needed" if value is None else "it is empty"
            problems.append(Problem(what, f"--{name}", f"Give {'a recording' if name == 'audio' else 'a text'}."))
        elif value is not None and name not in asks:
            problems.append(Problem("there is no use for it here", f"--{name}", f"Leave it out; give {wanted}."))
    if given.plain and (subject.task is not None or not subject.processor.chat_template):
        what = "the prompt of a run is made as in its training" if subject.task else "the model has no chat template"
        problems.append(Problem(what, "--plain", "Leave it out."))
    RecipeError.collect(problems)


def _check_writes(subject: Subject) -> None:
    task, config = subject.task, subject.config
    named = list(getattr(config, "architectures", None) or [])
    masked = any(name.endswith(MASKED_HEADS) for name in named)
    if task is None:
        writes = hears(subject) or subject.family != "encoder" or masked
        what = f"this model predicts no words: it is a {named[0] if named else config.model_type}"
    else:
        writes = hears(subject) or task.continues_text or isinstance(task, EncoderDecoder | MaskedCompletion)
        what = f"the model of this run predicts no words (task {task.name})"
    if not writes:
        fix = "`llmtune explain attention` and `llmtune explain model` look inside such a model."
        raise RecipeError.of(what, subject.name, fix)


def check_length(ids: Sequence[int], subject: Subject) -> None:
    """Raise RecipeError for a prompt that is longer than the model's positions, or than what can be looked at."""
    limit = min(context_length(subject.config) or LONGEST, LONGEST)
    if len(ids) > limit:
        known = f"more than {limit:,} are not looked at" if limit == LONGEST else f"the model has {limit:,} positions"
        raise RecipeError.of(f"it has {len(ids):,} tokens, and {known}", "--prompt", "Shorten it.")


def plain_recipe(subject: Subject, given: Given) -> Recipe:
    """Return what stands for the recipe of a model that is no run's: defaults."""
    task = FAMILIES[subject.family]
    if hears(subject):
        task = "speech"
    elif subject.family == "decoder" and subject.processor.chat_template and not given.plain:
        task = "chat"
    stated: dict[str, Any] = {"recipe_version": 1, "name": "model", "task": task, "data": {"train": "none"}}
    return Recipe.model_validate({**stated, "model": {"name": subject.name}})


def _messages(given: Given) -> list[dict[str, Any]]:
    head = [{"role": "system", "content": given.system}] if given.system else []
    return [*head, {"role": "user", "content": given.prompt}]


def _plain(subject: Subject, given: Given, recipe: Recipe) -> Prompt:
    processor, text = subject.processor, str(given.prompt)
    if subject.family == "encoder-decoder":
        languages = (getattr(processor, name, None) for name in ("src_lang", "tgt_lang"))
        pair = Pair(text, "", *languages)
        return Prompt(source_ids(pair, processor, recipe), recipe, first=first_token(pair, processor))
    if recipe.task == "chat":
        return Prompt(render_prompt(_messages(given), processor, recipe), recipe)
    return Prompt(prompt_ids(text, processor), recipe)


def _masked(text: str, subject: Subject, recipe: Recipe) -> Prompt:
    processor: PreTrainedTokenizerBase = subject.processor
    mask = processor.mask_token
    if mask is None or mask not in text:
        what = f"an encoder fills in what is masked, and there is no {mask or 'mask token'} in the prompt"
        fix = f"Write {mask or 'the mask token'} where a word is to be predicted: The sky is {mask or '[MASK]'}."
        raise RecipeError.of(what, "--prompt", fix)
    ids = list(processor(text, verbose=False)["input_ids"])
    places = tuple(at for at, token in enumerate(ids) if token == processor.mask_token_id)
    return Prompt(ids, recipe, places=places)


def _sound(subject: Subject, given: Given, recipe: Recipe) -> Prompt:
    """Read the first window of a recording."""
    processor = subject.processor
    extract = feature_extractor(processor)
    set_speech(processor, recipe)
    windows = hear_windows([{"audio": str(Path(str(given.audio)).absolute())}], extract, recipe)
    if not windows:
        raise RecipeError.of("nothing is to be heard in it", "--audio", "Give a recording with sound in it.")
    heard = hear(extract, [windows[0][1]])["input_features"]
    all_1T = torch.ones((1, heard.shape[-1]), dtype=torch.int64)  # silence behind a sound is heard
    seconds = len(windows[0][1]) / extract.sampling_rate
    note = f"Only the first {seconds:.0f} s of the recording are heard." if len(windows) > 1 else ""
    begun = list(processor.prefix_tokens)
    return Prompt([], recipe, {"input_features": heard, "attention_mask": all_1T}, begun, note=note)
