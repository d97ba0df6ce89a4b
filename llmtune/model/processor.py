"""A model's tokenizer: load it with the recipe's template and tokens, and save it for every transformers version."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import cast

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from llmtune.data.chat_template import ChatTemplate
from llmtune.data.template_facts import TemplateRefusal
from llmtune.data.template_text import (
    check_length,
    fix_date,
    refuse_unread,
    with_defaults,
    with_parts,
    with_system_prompt,
)
from llmtune.errors import EnvironmentProblem, Problem, RecipeError, first_line
from llmtune.model.config import UNREADABLE, read_model_config, readable
from llmtune.model.model_files import read_json_object
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.user_files import read_text_file
from llmtune.records import ModelRef

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR_FILES = (
    "processor_config.json",
    PREPROCESSOR,
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
"""Files from which `AutoProcessor` makes the inputs of pictures, video and sound."""
TEMPLATE_FILES = ("processor_config.json", "chat_template.json")
"""Files with the template of a processor of pictures; `AutoProcessor` reads them in this order, `.jinja` last."""
_IMAGE_SIZE = "llmtune_image_size"
"""Attribute of a tokenizer: the size of pictures that the recipe chose."""
_PARTS = re.compile(r"['\".](type|text)\b")
_FAST = "PreTrainedTokenizerFast"
_WRITTEN_BY_5_ALONE = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")


def load_processor(
    model_ref: ModelRef, model: ModelSection, system_prompt: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with `model.chat_template` and `model.add_tokens` applied.

    All of the recipe's changes are written into the template. Programs that save or serve the tokenizer therefore have
    them: a fixed date, `model.chat_template_kwargs` as defaults, and `system_prompt` before conversations
    without a system message.

    The padding token falls back to the end token: the predicted tokens follow from spans, never from token ids, so
    end tokens stay supervised.

    Raises:
        EnvironmentProblem: the folder has no readable tokenizer.
        RecipeError: the template file cannot be read, it never uses one of `model.chat_template_kwargs`, or a token to
        add already exists.
    """
    read_model_config(model_ref, model)  # reports a damaged configuration
    fix = "The folder needs tokenizer.json (or the model's own vocabulary files) and tokenizer_config.json."
    with readable("the tokenizer cannot be loaded", str(model_ref.path), fix):
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_ref.path), trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        what = f"model_max_length is {tokenizer.model_max_length!r}, but must be a number"
        raise EnvironmentProblem.of(what, str(model_ref.path / "tokenizer_config.json"), fix)
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:  # encoders end in [SEP]
        raise EnvironmentProblem.of(
            "the tokenizer has no end token (eos_token): answers could not end",
            str(model_ref.path / "tokenizer_config.json"),
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    _set_template(tokenizer, model_ref.path, model, system_prompt)
    if model.add_tokens:
        vocab = tokenizer.get_vocab()
        RecipeError.collect(
            Problem(f"the tokenizer already has the token {token!r}", "model.add_tokens", "Omit it.")
            for token in model.add_tokens
            if token in vocab
        )
        tokenizer.add_tokens(list(model.add_tokens))
    if model.image_pixels:
        setattr(tokenizer, _IMAGE_SIZE, _choose_size(model_ref.path, model, *model.image_pixels))
    return cast(PreTrainedTokenizerBase, tokenizer)


def _choose_size(folder: Path, model: ModelSection, fewest: int, most: int) -> dict[str, int]:
    """Return the size in an image processor's files for these limits of a picture's pixels.

    Raises EnvironmentProblem if the folder has no processor that opens, RecipeError if its pictures have no limits.
    """
    check_image_processor(folder, model.trust_remote_code, "")
    part = open_processor(folder, model.trust_remote_code).image_processor
    resize = getattr(sys.modules[type(part).__module__], "smart_resize", None)
    stated = {name: value for name, value in dict(getattr(part, "size", None) or {}).items() if value is not None}
    if resize is None or stated.keys() != {"shortest_edge", "longest_edge"}:
        others = {
            name: value for name, value in vars(part).items() if re.search("tokens|tiles|patches|pinpoints", name)
        }
        what = f"the {type(part).__name__} of this model has no limits in pixels, but {stated | others or 'its own'}"
        raise RecipeError.of(what, "model.image_pixels", "Omit it, or make the pictures smaller.")
    frames = part.temporal_patch_size if "num_frames" in inspect.signature(resize).parameters else 1  # GLM counts them
    return {"shortest_edge": fewest * frames, "longest_edge": most * frames}


def set_image_size(processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a processor of pictures the limits of `model.image_pixels`, in place, if the tokenizer has some."""
    if size := getattr(tokenizer, _IMAGE_SIZE, None):
        processor.image_processor.size = type(processor.image_processor.size)(**size)


def _save_image_size(size: dict[str, int], folder: Path) -> None:
    """Write the limits into the files of a processor of pictures, also under the names of earlier versions."""
    for name in PROCESSOR_FILES[:2]:
        content = json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
        part = content.get("image_processor") if name != PREPROCESSOR else content
        if part:
            edges = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
            part |= {"size": size, **{key: value for key, value in edges.items() if key in part}}
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def open_processor(folder: Path, trust_remote_code: bool) -> ProcessorMixin:
    """Open the processor of pictures in a folder; raises ValueError for a tokenizer alone, or a library's error."""
    processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"AutoProcessor opens a {type(processor).__name__} alone")
    return processor


def check_image_processor(folder: Path, trust_remote_code: bool, alternative: str) -> None:
    """Raise EnvironmentProblem, with a cure or the `alternative`, if a folder has no processor that opens."""
    fix = "Download the model again with all files."
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        what = f"the model also reads images, but has none of its processor's files: {', '.join(PROCESSOR_FILES[:2])}"
        raise EnvironmentProblem.of(what, str(folder), fix + alternative)
    try:
        open_processor(folder, trust_remote_code)
    except (*UNREADABLE, NameError) as error:
        missing = [name for name in PROCESSOR_FILES if name in str(error) and not (folder / name).is_file()]
        reason = f"it has no {' or '.join(missing)}" if missing else first_line(error)
        what = f"the model also reads images, but its processor cannot be opened: {reason}"
        if isinstance(error, ImportError) or "Missing optional dependencies" in str(error):
            fix = "Install the package that it names."
        raise EnvironmentProblem.of(what, str(folder), fix + alternative) from error


def _set_template(
    tokenizer: PreTrainedTokenizerBase, folder: Path, model: ModelSection, system_prompt: str | None
) -> None:
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = read_text_file(Path(model.chat_template))
        except (OSError, UnicodeDecodeError) as error:
            what = f"the chat template {model.chat_template} cannot be read: {error}"
            raise RecipeError.of(what, "model.chat_template", "Use a Jinja file in UTF-8.") from None
    elif tokenizer.chat_template is None or any((folder / name).is_file() for name in PROCESSOR_FILES):
        tokenizer.chat_template = _read_processor_template(folder) or tokenizer.chat_template
    template = tokenizer.chat_template
    _check_texts(template, folder)
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        check_length(str(text), str(model.chat_template or folder))
    if template:
        refuse_unread(model.chat_template_kwargs, template, tokenizer.special_tokens_map)
    if isinstance(template, dict):  # several named templates
        tokenizer.chat_template = {name: _fix_template(text, model, system_prompt) for name, text in template.items()}
    elif template is not None:
        text = with_parts(template) if _takes_only_parts(tokenizer) else template
        tokenizer.chat_template = _fix_template(text, model, system_prompt)


def _read_processor_template(folder: Path) -> object:
    """Return the chat template in the files of a processor of pictures; None if it has that of the tokenizer."""
    files = [path for name in TEMPLATE_FILES if (path := folder / name).is_file()]
    return next((text for path in files if (text := read_json_object(path).get("chat_template")) is not None), None)


def _takes_only_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template leaves out contents that are texts, and writes those that are lists of parts."""
    if not _PARTS.search(cast(str, tokenizer.chat_template)):
        return False
    chats = ChatTemplate(tokenizer, {}, str(tokenizer.name_or_path))
    question, answer = "Is the probe read?", "It is read."

    def is_written(*contents: object) -> bool:
        messages = [
            {"role": role, "content": content} for role, content in zip(("user", "assistant"), contents, strict=True)
        ]
        try:
            text = chats.render(messages)
        except (TemplateRefusal, EnvironmentProblem):  # reported with its first conversation
            return False
        return question in text and answer in text

    parts = [[{"type": "text", "text": text}] for text in (question, answer)]
    return not is_written(question, answer) and is_written(*parts)


def _check_texts(template: object, folder: Path) -> None:
    """Raise EnvironmentProblem for a chat template that is neither a text nor texts by name."""
    texts = template if isinstance(template, dict) else {"default": template or ""}
    if not all(isinstance(text, str) for pair in texts.items() for text in pair) or (texts and "default" not in texts):
        what = f"chat_template is {template!r:.60}, but must be a text, or texts by name with one named default"
        raise EnvironmentProblem.of(what, str(folder / "tokenizer_config.json"), "Set model.chat_template.")


def _fix_template(template: str, model: ModelSection, system_prompt: str | None) -> str:
    fixed = with_defaults(fix_date(template), model.chat_template_kwargs)
    return fixed if system_prompt is None else with_system_prompt(fixed, system_prompt)


def count_ids(processor: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows needed: the highest id plus one; ids may have gaps."""
    return max(len(processor), 1 + max(processor.get_vocab().values(), default=-1))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer and its chat template so that transformers 4 and 5 read the same.

    Version 5 names classes that version 4 lacks, and stores extra special tokens in another form.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config: dict[str, object] = json.loads(path.read_text("utf-8"))
    if config.get("tokenizer_class") in _WRITTEN_BY_5_ALONE and (folder / "tokenizer.json").is_file():
        config["tokenizer_class"] = _FAST
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    for key in ("is_local", "local_files_only"):  # local loading options
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
    source = Path(str(tokenizer.name_or_path))
    for name in PROCESSOR_FILES if source.resolve() != folder.resolve() else ():
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    if size := getattr(tokenizer, _IMAGE_SIZE, None):
        _save_image_size(size, folder)
