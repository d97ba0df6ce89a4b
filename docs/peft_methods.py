"""The methods of the installed PEFT with their options, as `llmtune/recipe/peft_methods.json` has them."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from typing import Any

import peft
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

OURS = {field.name for field in dataclasses.fields(peft.PeftConfig)} | {
    *("fan_in_fan_out", "token_dim", "num_transformer_submodules", "num_attention_heads"),
    *("num_layers", "tokenizer_name_or_path", "tokenizer_kwargs"),
}
"""Fields that llmtune fills in by itself, from the model, or that its own keys are made of."""


def peft_methods() -> str:
    """Return the table as JSON: an option a line."""
    lines = []
    for kind in sorted(PEFT_TYPE_TO_CONFIG_MAPPING, key=lambda kind: kind.value):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        options = _options(config)
        if issubclass(config, PromptLearningConfig):
            options["num_virtual_tokens"]["default"] = 20
        rows = [f"  {json.dumps(name)}: {json.dumps(option)}" for name, option in options.items()]
        lines.append(f'"{kind.value.lower()}": {{\n' + ",\n".join(rows) + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _options(config: type) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(config)
    return {
        field.name: _describe(hints[field.name], field)
        for field in dataclasses.fields(config)
        if field.name not in OURS
    }


def _describe(hint: object, field: dataclasses.Field[Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"types": []}
    _add(hint, described)
    default = field.default_factory() if callable(field.default_factory) else field.default
    default = None if default is dataclasses.MISSING else default
    default = default.value if isinstance(default, enum.Enum) else default
    described["default"] = default if isinstance(default, bool | int | float | str) or default is None else {}
    if isinstance(default, list | dict):
        described["default"] = default
    described["types"] = sorted(set(described["types"]))
    return described


def _add(hint: object, described: dict[str, Any]) -> None:
    """Add what `hint` allows: names of types, choices of a text, options of a mapping."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            _add(part, described)
    elif origin is typing.Literal:
        described["types"].append("str")
        described.setdefault("choices", []).extend(typing.get_args(hint))
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        described["types"].append("str")
        described["choices"] = [member.value for member in hint]
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        described["types"].append("dict")
        described["options"] = _options(hint)
    elif hint is not type(None):
        described["types"].append(str(getattr(origin or hint, "__name__", hint)))
