"""PEFT's methods and their options by its own names, from a table that `make docs` writes; PEFT is not imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, cast

from llmtune.errors import nearest

Option = Mapping[str, Any]
"""`types` by Python's names, `default`, and where there are any `choices` of a text or `options` of a mapping."""

PROMPT_METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")
"""They put trained vectors before a text, and change no layer."""
OWN_TARGETS = ("ia3", "trainable_tokens", "adaption_prompt")
"""Where no module is named, PEFT's table or the method itself says which they are."""
REFUSED_METHODS = {
    "adalora": "it takes ranks away by a rule of its own at each step, whose state no checkpoint holds",
    "cartridge": "its vectors are distilled from a long text, not learned from rows",
    "cpt": "it needs to know of each token whether it is instruction, input or answer",
    "multitask_prompt_tuning": "each row needs the number of its task",
    "shadow": "a second model with a loss of its own runs beside the base",
    "poly": "each row needs the number of its task",
    "xlora": "it mixes adapters that are trained already, and trains none",
}
"""Methods of PEFT that rows of one task cannot be trained with, each with the reason."""
UNMERGEABLE = {
    **dict.fromkeys(PROMPT_METHODS, "its vectors stand before the text, and no weight of the base changes"),
    "adaption_prompt": "its vectors are read beside the text, and no weight of the base changes",
    "lily": "which of its matrices is taken depends on the input",
    "alora_invocation_tokens": "it begins in the middle of each row",
}
"""Methods (and an option of LoRA) whose adapters are no change of the base's weights, each with the reason."""
REFUSED_OPTIONS = {
    "arrow_config": "it routes between adapters that are trained already",
    "loftq_config": "LoftQ replaces the base's weights by rounded ones that are in no file",
    "layers_pattern": "layers_to_transform finds the layers by itself",
    "use_qalora": "PEFT has it for bases of GPTQ alone, and cannot merge it there",
    "qalora_group_size": "it belongs to use_qalora, which is not taken",
    "layer_replication": "the model would have other layers than its files",
    "megatron_config": "models of Megatron are not read",
    "megatron_core": "models of Megatron are not read",
    "runtime_config": "it says where a model runs, which no recipe does",
    "ensure_weight_tying": "PEFT 0.21 can neither save nor merge such an adapter of embedding and head",
    "kasa_config": "its penalty is no part of llmtune's loss",
    "monteclora_config": "its penalty is no part of llmtune's loss",
    "use_bdlora": "it cuts the adapter for several serving processes",
    "trainable_token_indices": "the rows of `model.add_tokens` are trained; write them there",
    "use_asa": "subspaces would be chosen by a rule at each step, whose state no checkpoint holds",
}
"""Options of PEFT that are not taken, each with the reason."""
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
"""Options that PEFT reads only where another, if the method has it, has a certain value."""
_RATES = {
    "full": 0.1,
    "miss": 0.3,
    **dict.fromkeys(("ia3", "hira", "lokr", "adaption_prompt", "prefix_tuning"), 10.0),
    **dict.fromkeys(("ln_tuning", "beft", "road", "trainable_tokens", "prompt_tuning", "p_tuning"), 5.0),
    **dict.fromkeys(("vera", "pvera", "tinylora", "unilora", "vblora"), 5.0),
}
"""Of a rate that suits LoRA: methods that train few numbers learn from larger steps, as in PEFT's own comparison.

MiSS does not learn at LoRA's own rate on MiniLM, and forgets most on SmolLM2 (docs/adapter.md).
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
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


@cache
def peft_methods() -> Mapping[str, Mapping[str, Option]]:
    """Return the options of each method by name."""
    text = (resources.files("llmtune.recipe") / "peft_methods.json").read_text("utf-8")
    methods: Mapping[str, Mapping[str, Option]] = json.loads(text)
    return methods


def options_of(method: str) -> Mapping[str, Option]:
    """Return the options of `adapter.method`; of `qlora` those of `lora`, of `full` none."""
    return peft_methods().get("lora" if method == "qlora" else method, {})


def rate_factor(method: str) -> float:
    """Return how many times LoRA's learning rate suits a method."""
    return _RATES.get(method, 1.0)


def readers_of(option: str) -> list[str]:
    """Return the methods that have an option."""
    return [method for method, options in peft_methods().items() if option in options]


def find_misfits(name: str, value: object, option: Option) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with an option's value, and what to do."""
    if name in REFUSED_OPTIONS:
        yield f"'{name}' is not taken: {REFUSED_OPTIONS[name]}", "Remove it."
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
        known = option["options"]
        for key, inner in value.items():
            if key not in known:
                fix = f"{nearest(key, list(known))} Allowed: {', '.join(known)}.".strip()
                yield f"'{name}.{key}' is unknown", fix
            else:
                yield from find_misfits(f"{name}.{key}", inner, known[key])


def _is_kind(value: object, kind: str) -> bool:
    kinds: Any = _KINDS[kind]
    return isinstance(value, kinds) and (kind == "bool" or not isinstance(value, bool))
