"""PEFT's methods and options, from a table that `make docs` writes; does not import PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, cast

from llmtune.errors import nearest

Option = Mapping[str, Any]
"""`types` by Python's names, `default`, and optionally `choices` of a string or `options` of a mapping."""

PROMPT_METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")
"""Methods that prepend trained vectors to a text and change no layer."""
OWN_TARGETS = ("ia3", "trainable_tokens", "adaption_prompt")
"""Methods that choose their modules from PEFT's table or by themselves if the recipe names none."""
REFUSED_METHODS = {
    "adalora": "it prunes ranks at each step, and checkpoints do not save the state of its pruning",
    "cartridge": "its vectors are distilled from a long text, not learned from rows",
    "cpt": "it needs a type for each token: instruction, input or answer",
    "multitask_prompt_tuning": "each row needs a task number",
    "lily": "its router averages over all tokens of a batch, so a row's loss and answers depend on the other rows",
    "shadow": "it runs a second model with its own loss",
    "poly": "each row needs a task number",
    "xlora": "it mixes trained adapters, and trains none",
}
"""PEFT methods that llmtune cannot train, each with the reason."""
UNMERGEABLE = {
    **dict.fromkeys(PROMPT_METHODS, "its vectors come before the text and change no base weight"),
    "adaption_prompt": "its vectors are read with the text and change no base weight",
    "alora_invocation_tokens": "it becomes active in the middle of each row",
}
"""Methods, and a LoRA option, whose adapters cannot be merged into the base weights, each with the reason."""
REFUSED_OPTIONS = {
    "arrow_config": "it routes between trained adapters",
    "loftq_config": "LoftQ replaces the base weights with rounded ones that are not saved",
    "layers_pattern": "layers_to_transform detects the layers automatically",
    "use_qalora": "PEFT supports it for GPTQ bases only, and cannot merge it",
    "qalora_group_size": "it belongs to use_qalora, which is not supported",
    "layer_replication": "the model would have more layers than its files",
    "megatron_config": "Megatron models are not supported",
    "megatron_core": "Megatron models are not supported",
    "runtime_config": "recipes do not say where to run",
    "ensure_weight_tying": "PEFT 0.21 can neither save nor merge such an adapter of embedding and head",
    "kasa_config": "llmtune's loss does not include its penalty",
    "monteclora_config": "llmtune's loss does not include its penalty",
    "use_bdlora": "it splits the adapter for several serving processes",
    "trainable_token_indices": "use `model.add_tokens` to train tokens",
    "use_asa": "it selects subspaces at each step, and checkpoints do not save the state of its selection",
}
"""PEFT options that llmtune does not support, each with the reason."""
NEEDED = {
    "mini_r": ("init_weights", "mini"),
    "eps": ("coft", True),
    **dict.fromkeys(("num_cayley_neumann_terms", "cayley_neumann_eps"), ("use_cayley_neumann", True)),
    "psoft_svd_lowrank_niter": ("psoft_svd", "lowrank"),
    "svd_threshold": ("use_dynamic_rank", True),
    **dict.fromkeys(("asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"), ("use_asa", True)),
    **dict.fromkeys(("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"), ("use_asa", True)),
    "prompt_tuning_init_text": ("prompt_tuning_init", "TEXT"),
    "encoder_hidden_size": ("prefix_projection", True),
    **dict.fromkeys(("encoder_num_layers", "encoder_dropout"), ("encoder_reparameterization_type", "LSTM")),
    **{f"{start}_config": ("init_lora_weights", start) for start in ("eva", "corda", "lora_ga")},
}
"""Options that PEFT reads only if another option has a certain value. Ignored if the method lacks that option."""
_RATES = {
    "full": 0.1,
    "miss": 0.3,
    **dict.fromkeys(("ia3", "hira", "lokr", "adaption_prompt", "prefix_tuning"), 10.0),
    **dict.fromkeys(("ln_tuning", "beft", "road", "trainable_tokens", "prompt_tuning", "p_tuning"), 5.0),
    **dict.fromkeys(("vera", "pvera", "tinylora", "unilora", "vblora"), 5.0),
}
"""Learning rate relative to LoRA's: methods with few parameters need larger steps, as in PEFT's own comparison.

At LoRA's rate, MiSS does not learn on MiniLM and forgets most on SmolLM2 (docs/adapter.md).
"""
_KINDS = {
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    "list": (list, tuple),
    "tuple": (list, tuple),
    "dict": dict,
}
_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


@cache
def peft_methods() -> Mapping[str, Mapping[str, Option]]:
    """Return the options of each method, by method and option name."""
    text = (resources.files("llmtune.recipe") / "peft_methods.json").read_text("utf-8")
    methods: Mapping[str, Mapping[str, Option]] = json.loads(text)
    return methods


def options_of(method: str) -> Mapping[str, Option]:
    """Return the options of `adapter.method`: `qlora` has those of `lora`, `full` has none."""
    return peft_methods().get("lora" if method == "qlora" else method, {})


def rate_factor(method: str) -> float:
    """Return the factor from LoRA's learning rate to the method's."""
    return _RATES.get(method, 1.0)


def readers_of(option: str) -> list[str]:
    """Return the methods that have an option."""
    return [method for method, options in peft_methods().items() if option in options]


def find_misfits(name: str, value: object, option: Option) -> Iterator[tuple[str, str]]:
    """Yield each error in an option's value, with its fix."""
    if name in REFUSED_OPTIONS:
        yield f"'{name}' is not supported: {REFUSED_OPTIONS[name]}", "Remove it."
        return
    allowed, choices = option["types"], option.get("choices", ())
    if not any(_is_kind(value, kind) for kind in allowed):
        words = " or ".join(dict.fromkeys(_WORDS[kind.replace("tuple", "list")] for kind in allowed))
        yield f"'{name}' is {value!r}", f"It must be {words}."
    elif choices and isinstance(value, str) and value not in choices:
        yield f"'{name}' is {value!r}", f"{nearest(value, choices)} Allowed: {', '.join(map(str, choices))}.".strip()
    elif allowed == ["int"] and cast(int, value) < 1 and "seed" not in name and option["default"] not in (0, -1):
        yield f"'{name}' is {value}", "It must be at least 1."
    elif isinstance(value, dict) and "options" in option:
        inner_options = option["options"]
        for key, inner in value.items():
            if key not in inner_options:
                fix = f"{nearest(key, list(inner_options))} Allowed: {', '.join(inner_options)}.".strip()
                yield f"'{name}.{key}' is unknown", fix
            else:
                yield from find_misfits(f"{name}.{key}", inner, inner_options[key])


def _is_kind(value: object, kind: str) -> bool:
    kinds: Any = _KINDS[kind]
    return isinstance(value, kinds) and (kind == "bool" or not isinstance(value, bool))
