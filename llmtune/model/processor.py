"""The tokenizer of a model: loaded with the recipe's template and tokens, saved so that every transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtune.data.template_text import check_length, fix_date, refuse_unread, with_defaults, with_system_prompt
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.model.config import read_model_config, readable
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.user_files import read_text_file
from llmtune.records import ModelRef

PREPROCESSOR = "preprocessor_config.json"
_FAST = "PreTrainedTokenizerFast"
_WRITTEN_BY_5_ALONE = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")


def load_processor(
    model_ref: ModelRef, model: ModelSection, system_prompt: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with `model.chat_template` and `model.add_tokens` applied.

    All that a recipe changes of a template is written into it here, so that whatever saves or serves the tokenizer has
    it: the date is fixed, `model.chat_template_kwargs` are its defaults, and `system_prompt` stands in front of
    conversations that have no system message.

    The padding token falls back on the end token: what is predicted follows from spans, never from token ids, so an
    end token stays supervised.

    Raises:
        EnvironmentProblem: the folder holds no tokenizer that can be read.
        RecipeError: the template file cannot be read, it never reads one of `model.chat_template_kwargs`, or a token to
            add is there already.
    """
    read_model_config(model_ref, model)  # a damaged configuration is reported as such
    fix = "The folder needs tokenizer.json (or the model's own vocabulary files) and tokenizer_config.json."
    with readable("the tokenizer cannot be loaded", str(model_ref.path), fix):
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_ref.path), trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        what = f"model_max_length is {tokenizer.model_max_length!r}, and must be a number"
        raise EnvironmentProblem.of(what, str(model_ref.path / "tokenizer_config.json"), fix)
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:  # encoders end in [SEP]
        raise EnvironmentProblem.of(
            "the tokenizer has no end token (eos_token): answers could not end",
            str(model_ref.path / "tokenizer_config.json"),
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = read_text_file(Path(model.chat_template))
        except (OSError, UnicodeDecodeError) as error:
            what = f"the chat template {model.chat_template} cannot be read: {error}"
            raise RecipeError.of(what, "model.chat_template", "Name a Jinja file in UTF-8.") from None
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        check_length(str(text), str(model.chat_template or model_ref.path))
    if template:
        refuse_unread(model.chat_template_kwargs, template, tokenizer.special_tokens_map)
    if isinstance(template, dict):  # several that go by name
        tokenizer.chat_template = {name: _fix_template(text, model, system_prompt) for name, text in template.items()}
    elif template is not None:
        tokenizer.chat_template = _fix_template(template, model, system_prompt)
    if model.add_tokens:
        known = tokenizer.get_vocab()
        RecipeError.collect(
            Problem(f"the tokenizer has the token {token!r} already", "model.add_tokens", "Omit it.")
            for token in model.add_tokens
            if token in known
        )
        tokenizer.add_tokens(list(model.add_tokens))
    return cast(PreTrainedTokenizerBase, tokenizer)


def _fix_template(template: str, model: ModelSection, system_prompt: str | None) -> str:
    fixed = with_defaults(fix_date(template), model.chat_template_kwargs)
    return fixed if system_prompt is None else with_system_prompt(fixed, system_prompt)


def count_ids(processor: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding needs: one more than the highest id; ids may have gaps."""
    return max(len(processor), 1 + max(processor.get_vocab().values(), default=-1))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer and its chat template so that transformers 4 and 5 read the same.

    Version 5 names classes that version 4 does not have, and keeps extra special tokens in another shape.
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
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
    source = Path(str(tokenizer.name_or_path)) / PREPROCESSOR
    if source.is_file() and source.parent.resolve() != folder.resolve():  # what turns sound into what the model reads
        (folder / PREPROCESSOR).write_bytes(source.read_bytes())
