"""Translate the recipe's adapter section into PEFT's configuration: options by name, and the modules it adapts."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, PeftType
from transformers import PreTrainedModel

from llmtune.adapter.target_modules import are_transposed, ends_with, shorten_targets
from llmtune.adapter.wiring_check import find_reached_targets
from llmtune.errors import RecipeError
from llmtune.model.towers import tower_modules
from llmtune.recipe.adapter_section import DATA_STARTS, AdapterSection
from llmtune.recipe.peft_options import options_of
from llmtune.recipe.schema import Recipe
from llmtune.records import SelectedModel


def find_targets(selected: SelectedModel, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the modules that get an adapter, and those that `all-linear` skips because no input reaches them."""
    adapter = recipe.adapter
    if "target_modules" not in options_of(adapter.method) or _has_own_targets(selected, adapter):
        return [], []
    if adapter.method == "trainable_tokens" and adapter.target_modules == "all-linear":
        return _find_embedding(selected.model), []
    return find_reached_targets(selected, recipe)


def _has_own_targets(selected: SelectedModel, adapter: AdapterSection) -> bool:
    """Whether PEFT chooses a method's modules best: embeddings, attention, or those in its tables."""
    if adapter.target_modules != "all-linear":
        return False
    if adapter.method == "adaption_prompt":
        return True
    model_types = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    return adapter.method == "ia3" and selected.model.config.model_type in model_types


def _find_embedding(model: PreTrainedModel) -> list[str]:
    if model.main_input_name == "input_values":
        raise RecipeError.of("an audio model has no tokens to train", "adapter.method", "Use lora.")
    embedding = model.get_input_embeddings()
    return [name for name, module in model.named_modules() if module is embedding]


def make_config(
    selected: SelectedModel,
    adapter: AdapterSection,
    targets: Sequence[str],
    whole: Sequence[str],
    tokens: dict[str, list[int]] | None,
) -> PeftConfig:
    """Return the configuration of an adapter on `targets` that also trains the modules `whole` and the rows `tokens`.

    Other methods take options shared with LoRA only if the recipe states them: their defaults are PEFT's own.
    """
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("LORA" if adapter.is_lora else adapter.method.upper())]
    hints = typing.get_type_hints(kind)
    keys = set(options_of(adapter.method)) & (
        type(adapter).model_fields.keys() if adapter.is_lora else adapter.model_fields_set
    )
    given = {name: getattr(adapter, name) for name in keys} | adapter.options
    given |= {"exclude_modules": None, "layers_to_transform": None, "target_modules": None}  # resolved to names
    if targets:
        given["target_modules"] = shorten_targets(targets, selected.model)
    if adapter.init_lora_weights in DATA_STARTS:
        given.setdefault(f"{adapter.init_lora_weights}_config", {})
    if adapter.method == "ia3" and targets:
        given.setdefault("feedforward_modules", [])
    if tokens is not None:
        ids = next(iter(tokens.values()))
        given |= {"token_indices": ids} if adapter.method == "trainable_tokens" else {"trainable_token_indices": tokens}
    if adapter.is_prompt:
        given["num_virtual_tokens"] = adapter.virtual_tokens
        given["tokenizer_name_or_path"] = str(selected.model_ref.path)  # for prompt_tuning_init_text
    given |= {
        "modules_to_save": _name_whole(whole, selected.model) or None,
        "fan_in_fan_out": are_transposed(selected.model),
    }
    options = {name: _as_peft(value, hints[name]) for name, value in given.items() if name in hints}
    return kind(task_type=selected.peft_task_type, **options)


def _name_whole(entries: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Return name endings that PEFT matches; full names instead of an ending that also matches in a tower."""
    towers = set(tower_modules(model))
    names = [name for name, _ in model.named_modules() if name not in towers]
    full = (
        ends_with(names, entry) if entry not in towers and ends_with(towers, entry) else [entry] for entry in entries
    )
    return [name for some in full for name in some]


def _as_peft(value: Any, hint: object) -> Any:
    """Return lists for tuples, copies of mappings, and PEFT's dataclass for a mapping that needs one."""
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, dict):
        return value
    kinds = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
    return typing.cast(Any, kinds[0])(**value) if kinds else dict(value)
