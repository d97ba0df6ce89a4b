"""Load an existing adapter to continue training, or to evaluate and generate with it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.adapter.fused_lora import fuse_products
from llmtune.adapter.peft_config import find_targets
from llmtune.adapter.target_modules import PATTERN_SECONDS, are_transposed, ends_with
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.model.chunked_cross_entropy import remove_head_loss
from llmtune.model.config import UNREADABLE, in_heads, readable
from llmtune.model.device import is_out_of_memory
from llmtune.model.library_logging import hushed
from llmtune.model.model_files import check_safetensors, read_json_object
from llmtune.model.towers import dropped_modules, find_projectors
from llmtune.recipe.adapter_section import AdapterSection
from llmtune.recipe.schema import Recipe
from llmtune.records import SelectedModel
from llmtune.store.resource_limits import limited

MAX_RANK = 2**14
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
SAVED = (".lora_", "trainable_tokens", ".modules_to_save.")
"""Substrings in the names of adapter weights."""
_SHAPE_KEYS = ("r", "lora_alpha", "use_dora", "use_rslora", "bias", "rank_pattern", "alpha_pattern")


def find_adapter(folder: Path) -> Path:
    """Return the PEFT folder at `folder`, or its `adapter/` if it is a run; reads headers, not weights.

    Raises:
        EnvironmentProblem: none found, or its weights are missing, damaged or truncated.
        RecipeError: its weights are pickled.
    """
    for source in (folder, folder / "adapter"):
        if (source / "adapter_config.json").is_file():
            _check_weights(source)
            return source
    if (folder / "weights" / "config.json").is_file():
        what = "this run trained all weights (method: full): it has no adapter"
        fix = f"Set model.name to {folder / 'weights'} and omit adapter.start_from."
        raise EnvironmentProblem.of(what, str(folder), fix)
    raise EnvironmentProblem.of(
        "no adapter found" if folder.is_dir() else "folder not found",
        str(folder),
        "Name a run folder with finished training, or a folder with adapter_config.json and adapter_model.safetensors.",
    )


def _check_weights(source: Path) -> None:
    path = source / WEIGHTS
    if path.exists():
        EnvironmentProblem.collect(check_safetensors(path))
    elif (source / _PICKLED).is_file():
        raise RecipeError.of(
            f"its weights are pickled ({_PICKLED}), and loading a pickle can run any code",
            str(source),
            f"If you trust it, load it with PEFT and save it again: save_pretrained writes {WEIGHTS}.",
        )
    else:
        raise EnvironmentProblem.of(
            f"the adapter's weights are missing: no {WEIGHTS} found",
            str(source),
            "The folder is incomplete: download it again, or train again.",
        )


def continue_adapter(selected: SelectedModel, recipe: Recipe, folder: Path, console: Console) -> PeftModel:
    """Put the adapter in `folder` into the model for further training. The recipe's stated values must match it.

    Raises RecipeError for mismatches; EnvironmentProblem for a folder that is missing or damaged.
    """
    source, adapter = find_adapter(folder), recipe.adapter
    config = read_config(source)
    if not isinstance(config, LoraConfig):
        kind = config.peft_type.value.lower()
        what = f"the adapter in {source} is of type {kind}, but only LoRA adapters can be trained further"
        raise RecipeError.of(what, "adapter.start_from", "Name a run trained with lora, or remove the key.")
    problems = [*_compare_shape(config, adapter, source), *_compare_classes(selected, source)]
    if not problems and "target_modules" in adapter.model_fields_set:
        problems = list(_compare_targets(config, selected, recipe, source))
    if adapter.train_projector and not {*find_projectors(selected.model)} <= {*(config.modules_to_save or ())}:
        what, fix = f"the adapter in {source} has no projector", "Omit it: an adapter keeps its shape."
        problems.append(Problem(what, "adapter.train_projector", fix))
    RecipeError.collect(problems)
    made_for = config.base_model_name_or_path
    if made_for not in (selected.model_ref.name, str(selected.model_ref.path)):
        was, now = f"The adapter in {source} was trained on {made_for}", selected.model_ref.name
        console.print(f"{was}; training continues with {now}.", style="yellow", markup=False)
    config.lora_dropout = adapter.lora_dropout
    return attach(selected, config, source, trainable=True)


def attach(selected: SelectedModel, config: PeftConfig, source: Path, *, trainable: bool) -> PeftModel:
    """Build the adapter that `config` describes and fill it from `source`.

    Raises EnvironmentProblem if weights are missing, superfluous, damaged or of another shape.
    """
    name = selected.model_ref.name
    config.task_type = selected.peft_task_type  # PEFT's class for extractive qa keeps token_type_ids from the model
    check_patterns(config, [module for module, _ in selected.model.named_modules()], source)
    try:
        model = put_adapter(selected.model, config, trainable=trainable)
        weights = load_peft_weights(str(source), device="cpu")
        whole = () if isinstance(model.peft_config["default"], LoraConfig) else (torch.int32, torch.int64)
        _refuse_no_numbers({key: weight for key, weight in weights.items() if weight.dtype not in whole}, source)
        result = set_peft_model_state_dict(model, weights)
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[-1].strip()
        raise EnvironmentProblem.of(
            f"the adapter cannot be loaded onto {name}: {first}",
            str(source),
            "The adapter is damaged, or was made for another model.",
        ) from error
    present = {key for key, _ in model.named_parameters() if ".default" in key and any(part in key for part in SAVED)}
    missing = [key for key in result.missing_keys if key in present]  # excludes the second name of a tied weight
    left = list(result.unexpected_keys)
    if not isinstance(model.peft_config["default"], LoraConfig):
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        missing, left = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong, fix = missing or left, "The adapter is damaged, or was made for another model."
    towers = dropped_modules(selected.model)  # torch ignores weights of a module that is None
    if inside := [key for key in weights if in_heads(key.removeprefix("base_model.model."), towers)]:
        wrong = inside
        fix = "It has modules that read images or sound, which are not loaded for text. Set chat.images: true."
    if wrong:
        what = f"{len(wrong)} weights of the adapter have no counterpart, such as {wrong[0]}"
        raise EnvironmentProblem.of(what, str(source), fix)
    fuse_products(model)
    return model


def check_patterns(config: PeftConfig, names: Sequence[str], source: Path) -> None:
    """Raise EnvironmentProblem if an adapter's regular expression is invalid, or does not end on these modules."""
    stated = vars(config)
    single = [one for one in map(stated.get, ("target_modules", "exclude_modules")) if isinstance(one, str)]
    patterns = [key for name, keys in stated.items() if name.endswith("_pattern") for key in keys or ()]
    endings = [rf"(.*\.)?({key})$" for key in patterns]
    what, fix = "a regular expression in it cannot be matched", "The file is damaged."
    with readable(what, str(source / "adapter_config.json"), fix), limited(PATTERN_SECONDS):
        for pattern in (*single, *endings):
            for name in names:
                re.match(pattern, name)


def _refuse_no_numbers(weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raise EnvironmentProblem if weights are integers, NaN or infinite, which no LoRA has.

    Methods that change single weights (SHiRA) store their positions as integers.
    """
    wrong = [name for name, weight in weights.items() if not weight.is_floating_point() or not weight.isfinite().all()]
    if wrong:
        what = f"{len(wrong)} weights of the adapter are not finite numbers, such as {wrong[0]}"
        raise EnvironmentProblem.of(what, str(source), "The adapter is damaged: download it again, or train again.")


def _set_transposed(config: PeftConfig, model: torch.nn.Module) -> None:
    """Set how this model's projections store their weights: in 4 bits, those of GPT-2 are not transposed."""
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = are_transposed(model)


def put_adapter(model: PreTrainedModel, config: PeftConfig, *, trainable: bool) -> PeftModel:
    """Build the adapter that `config` describes around `model`; its weights are filled in later."""
    config.inference_mode = not trainable
    _set_transposed(config, model)
    config.base_model_name_or_path = model.name_or_path  # the local name, not that of the training machine
    return wrap_model(model, config)


def wrap_model(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put an adapter around `model`; prompt vectors shift its logits, so the loss is computed from all of them."""
    if config.is_prompt_learning:
        remove_head_loss(model)
    with hushed(), warnings.catch_warnings():
        # PEFT sets patterns for fused experts automatically, but looks for them only among modules.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "lora with eva initialization", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # we print this
        return cast(PeftModel, get_peft_model(model, config))


def read_config(source: Path) -> PeftConfig:
    """Read `adapter_config.json`; raises EnvironmentProblem if it is damaged."""
    path = source / "adapter_config.json"
    read_json_object(path)  # deeply nested JSON, a pipe
    with readable("cannot be read", str(path), "The file is damaged."):
        config = PeftConfig.from_pretrained(str(source))
    if isinstance(config, LoraConfig):
        EnvironmentProblem.collect(_check_values(config, str(path)))
    return config


def _check_values(config: LoraConfig, where: str) -> Iterator[Problem]:
    """Yield settings that PEFT accepts but that disable the adapter or make it invalid."""
    fix = "The file is damaged: download it again, or train again."
    if type(config.r) is not int or not 1 <= config.r <= MAX_RANK:
        yield Problem(f"r is {config.r!r}, but must be a number from 1 to {MAX_RANK:,}", where, fix)
    if type(config.lora_alpha) not in (int, float) or not 0 < config.lora_alpha < math.inf:
        yield Problem(f"lora_alpha is {config.lora_alpha!r}, but must be a number above 0", where, fix)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(config, key) or {}, dict):
            yield Problem(f"{key} is {getattr(config, key)!r}, but must be an object", where, fix)


def _compare_shape(config: LoraConfig, adapter: AdapterSection, source: Path) -> Iterator[Problem]:
    stated = adapter.model_fields_set
    for key in (*_SHAPE_KEYS, *adapter.options):
        expected, actual = getattr(adapter, key), getattr(config, key)
        same = {*expected} == {*(actual or ())} if isinstance(expected, list | tuple) else expected == actual
        if key in stated and not same:
            fix = f"Set it to {actual!r} or omit it: an adapter keeps its shape."
            yield Problem(
                f"the recipe has {expected!r}, but the adapter in {source} has {actual!r}", f"adapter.{key}", fix
            )
    if config.alora_invocation_tokens:
        what = f"the adapter in {source} is an activated LoRA (alora_invocation_tokens): it cannot be trained on"
        yield Problem(
            what, "adapter.start_from", "Start from a plain LoRA, or train this one again without start_from."
        )
    if "init_lora_weights" in stated and adapter.init_lora_weights is not True:
        what = "has no effect, because training continues from an existing adapter"
        yield Problem(what, "adapter.init_lora_weights", "Omit it.")


def _compare_classes(selected: SelectedModel, source: Path) -> Iterator[Problem]:
    """Compare the head's output names, saved with the adapter, with the current ones, in order."""
    path = source / "config.json"
    if not selected.trains_head or not path.is_file():
        return
    actual = [str(name) for _, name in sorted(_read_names(path).items())]
    expected = [str(name) for _, name in sorted((selected.model.config.id2label or {}).items())]
    if actual and actual != expected:
        what = f"its head was trained for {', '.join(actual)}, in this order, but the rows have {', '.join(expected)}"
        fix = "List the adapter's labels in its order; a head's outputs cannot be changed."
        yield Problem(f"{what} ({source})", "adapter.start_from", fix)


def _read_names(path: Path) -> dict[int, str]:
    """Read the output names by number; raises EnvironmentProblem for a damaged file."""
    try:
        named = read_json_object(path).get("id2label") or {}
        assert isinstance(named, dict)
        return {int(number): str(name) for number, name in named.items()}
    except (AssertionError, ValueError) as error:
        raise EnvironmentProblem.of(f"cannot be read: {error}", str(path), "The file is damaged.") from error


def _compare_targets(config: LoraConfig, selected: SelectedModel, recipe: Recipe, source: Path) -> Iterator[Problem]:
    expected = set(find_targets(selected, recipe)[0])
    named = config.target_modules or set()
    names = [name for name, _ in selected.model.named_modules()]
    actual = {name for entry in named for name in ends_with(names, entry)}
    if not isinstance(named, str) and expected != actual:
        what = f"the recipe matches {len(expected)} modules, but the adapter in {source} has {len(actual)}"
        yield Problem(what, "adapter.target_modules", "Omit it: an adapter keeps its shape.")
