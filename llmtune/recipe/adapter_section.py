"""The section `adapter`: the trained parameters, with PEFT's option names."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import ConfigDict, Field, Tag

from llmtune.errors import nearest
from llmtune.recipe.peft_options import (
    NEEDED,
    OWN_TARGETS,
    PROMPT_METHODS,
    REFUSED_METHODS,
    UNMERGEABLE,
    find_misfits,
    options_of,
    peft_methods,
    readers_of,
)
from llmtune.recipe.section import Many, NonEmpty, Positive, RecipeSection, absolute_or_address, by_type
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_variant import TaskVariant

OneOrMoreTexts = Annotated[
    Annotated[str, Tag("text")] | Annotated[Many[str], Tag("items")],
    by_type({str: "text"}, "items"),
]
Layers = Annotated[
    Annotated[int, Field(ge=0), Tag("number")] | Annotated[Many[Annotated[int, Field(ge=0)]], Tag("items")],
    by_type({int: "number", float: "number"}, "items"),
]
_STARTS = r"^(gaussian|orthogonal|olora|pissa|pissa_niter_[1-9][0-9]{0,3}|eva|corda|lora_ga)$"
InitWeights = Annotated[
    Annotated[bool, Tag("switch")]
    | Annotated[
        str,
        Field(pattern=_STARTS),
        Tag("text"),
    ],
    by_type({bool: "switch"}, "text"),
]
LowRank = Literal["hira", "loha", "lokr", "delora", "gralora", "randlora", "vera", "pvera", "tinylora"]
Shared = Literal["unilora", "vblora", "lily", "glora", "miss", "peanut", "deft", "adamss", "supertuning", "shira"]
Spectral = Literal["fourierft", "waveft", "c3a", "frod", "osf", "psoft", "oft", "boft", "hra", "road"]
Few = Literal["ia3", "ln_tuning", "beft", "trainable_tokens", "adaption_prompt", "shadow"]
PromptMethod = Literal["prompt_tuning", "p_tuning", "prefix_tuning", "cartridge", "cpt", "multitask_prompt_tuning"]
Method = Literal["lora", "qlora", "full", LowRank, Shared, Spectral, Few, PromptMethod, "adalora", "poly", "xlora"]
DATA_STARTS = ("eva", "corda", "lora_ga")
MUTATING = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations that move a part of the base weights into the adapter."""
QUANTIZATION_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def _close(schema: dict[str, Any]) -> None:
    """Add PEFT's other options to the JSON Schema and forbid all further keys."""
    schema["additionalProperties"] = False
    words = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "dict": "object"}
    for method, options in peft_methods().items():
        for name, option in options.items():
            if name not in AdapterSection.model_fields:
                kinds = schema["properties"].setdefault(name, {"type": ["null"], "description": "PEFT's option of:"})
                kinds["type"] = sorted({*kinds["type"], *(words.get(kind, "array") for kind in option["types"])})
                kinds["description"] += f" {method}"


class AdapterSection(RecipeSection):
    """The trained parameters: an adapter, with PEFT's method and option names, or all weights."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_close)

    method: Method = "lora"
    """`lora` trains low-rank matrices and freezes the base, `qlora` does the same on a 4-bit base, `full` trains every
    weight. All others are PEFT's methods, with PEFT's options and defaults ([adapter-methods](adapter-methods.md)).
    Default `lora`: close to the quality of `full` at a fraction of the memory."""
    r: int = Field(default=16, ge=1, le=4096)
    """Rank of the low-rank matrices. Default 16: enough for most tasks in one domain. For other methods, all keys they
    share with LoRA have PEFT's defaults."""
    lora_alpha: Positive = 32
    """Scale of the adapter: its output is multiplied by `lora_alpha / r`. Default 32: twice the default rank, which
    suits common learning rates."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs set to zero in training. Default 0: early stopping prevents overfitting better, and
    dropout costs speed."""
    target_modules: OneOrMoreTexts = "all-linear"
    """Modules that get an adapter: `all-linear`, a list of name suffixes, or a regular expression for full names.
    Default `all-linear`: adapters on all layers learn better than on attention alone."""
    exclude_modules: OneOrMoreTexts | None = None
    """Matching modules that get no adapter: name suffixes or a regular expression. Default none."""
    modules_to_save: Many[str] | None = None
    """Modules that are fully trained and saved with the adapter. Default none: each adds its full size."""
    layers_to_transform: Layers | None = None
    """Indices of the layers that get an adapter, from 0. Default none: all layers."""
    train_projector: bool = False
    """Also train the modules between the encoder of images and the language model, completely. They are saved with
    the adapter. Default false: those of a trained model fit it already. Needed for a new projector."""
    bias: Literal["none", "all", "lora_only", "oft_only", "delora_only"] = "none"
    """Biases to train. Default `none`: trained biases change the model even with the adapter switched off."""
    use_dora: bool = False
    """Split weights into magnitude and direction (DoRA). Default false: better at low rank, but slower."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` (rsLoRA), which is stable at high ranks. Default false, as in PEFT."""
    init_lora_weights: InitWeights = True
    """Initialisation of the matrices: true (B is zero, so training starts from the base model), false (random, to test
    loading), `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N`, `olora`, or from training rows `eva`, `corda`,
    `lora_ga`. Default true: costs nothing and starts from the base model."""
    rank_pattern: dict[str, Positive] = Field(default={})
    """Rank of modules whose name matches the key. Default none: `r` for all."""
    alpha_pattern: dict[str, Positive] = Field(default={})
    """`lora_alpha` of modules whose name matches the key. Default none: one scale for all."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format of the base with `qlora`. Default `nf4`: made for normally distributed weights, and more
    precise than `fp4` for them."""
    bnb_4bit_use_double_quant: bool = True
    """With `qlora`, also quantise the scales of the 4-bit blocks. Default true: saves 0.4 bits per weight without a
    measured loss."""
    start_from: NonEmpty | None = None
    """A run, a release or a PEFT folder whose adapter to continue training: a folder, `NAME` (the newest run of that
    recipe that passed its gates), `NAME@HASH` or `release:NAME`. Default none: a new adapter."""

    paths: ClassVar = {"start_from": absolute_or_address}

    @property
    def options(self) -> dict[str, Any]:
        """Return the stated PEFT options that are not fields of this class."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}

    def check(self, diagnostics: Diagnostics, variant: TaskVariant, add_tokens: bool = False) -> None:
        """Report settings that the method or `start_from` ignores, and combinations that PEFT does not support."""
        why, method = f"with adapter.method: {self.method}", "adapter.method"
        diagnostics.check_release("adapter.start_from", self.start_from)
        if self.method == "full":
            diagnostics.none_has_effect(self, "adapter", LORA_KEYS, why, "Remove it, or use lora or qlora.", method)
            fix = "Set model.name to the run's `weights` folder."
            diagnostics.none_has_effect(self, "adapter", ("start_from",), why, fix, method)
        elif self.start_from is not None:
            kept = [name for name in LORA_KEYS if _is_kept(name, diagnostics)]
            fix = "Remove it (or set it to null): the adapter's own setting is kept."
            because = ("adapter.start_from", method)
            diagnostics.none_has_effect(self, "adapter", kept, "with adapter.start_from", fix, *because)
        if self.method != "qlora":
            diagnostics.none_has_effect(self, "adapter", QUANTIZATION_KEYS, why, "Remove it, or use qlora.", method)
        if self.method != "full" and "modules_to_save" not in options_of(self.method):
            diagnostics.none_has_effect(self, "adapter", ("train_projector",), why, "Remove it, or use lora.", method)
        self._check_options(diagnostics)
        if self.method != "full":
            self._check_patterns(diagnostics)
        if self.is_lora:
            self._check_lora(diagnostics)
        elif self.method != "full":
            self._check_method(diagnostics, variant, add_tokens)

    @property
    def is_lora(self) -> bool:
        """Return whether the method is LoRA, on a quantised base or not."""
        return self.method in ("lora", "qlora")

    @property
    def is_prompt(self) -> bool:
        """Return whether the method prepends trained vectors to a text."""
        return self.method in PROMPT_METHODS

    @property
    def virtual_tokens(self) -> int:
        """Return the number of trained vectors that the method prepends to a text."""
        default = options_of(self.method)["num_virtual_tokens"]["default"] if self.is_prompt else 0
        return cast(int, self.options.get("num_virtual_tokens", default))

    @property
    def unmergeable(self) -> str | None:
        """Return why the adapter cannot be merged into the base weights, or None."""
        return next((UNMERGEABLE[name] for name in (self.method, *self.options) if name in UNMERGEABLE), None)

    @property
    def needs_rows_apart(self) -> str | None:
        """Return why rows cannot be packed with this adapter, or None."""
        if self.is_prompt:
            return f"{self.method} prepends its vectors to each row"
        return (
            "an adapter with alora_invocation_tokens becomes active within each row"
            if "alora_invocation_tokens" in self.options
            else None
        )

    def _check_options(self, diagnostics: Diagnostics) -> None:
        allowed = options_of(self.method)
        for name, value in self.options.items():
            key = f"adapter.{name}"
            if name in allowed:
                for what, fix in find_misfits(name, value, allowed[name]):
                    diagnostics.add(key, f"adapter.method: {self.method}: {what}", fix, "adapter.method")
                needed, wanted = NEEDED.get(name, ("", None))
                if needed in allowed and (now := getattr(self, needed, allowed[needed]["default"])) != wanted:
                    why, fix = (
                        f"with adapter.{needed}: {_option_text(now)}",
                        f"Set that to {_option_text(wanted)}, or remove this.",
                    )
                    diagnostics.no_effect(key, why, fix, f"adapter.{needed}")
            elif others := readers_of(name):
                what = f"'{key}' has no effect with adapter.method: {self.method}: it is an option of"
                fix = (
                    f"{nearest(name, list(allowed))} Options of {self.method}: {', '.join(allowed) or 'none'}.".strip()
                )
                diagnostics.add(key, f"{what} {', '.join(others)}", fix, "adapter.method")

    def _check_method(self, diagnostics: Diagnostics, variant: TaskVariant, add_tokens: bool) -> None:
        """Report methods that llmtune cannot train, and LoRA keys that the method does not have."""
        key, allowed = "adapter.method", options_of(self.method)
        if reason := REFUSED_METHODS.get(self.method):
            what = f"'{key}' is {self.method}, which llmtune cannot train: {reason}"
            diagnostics.add(key, what, "Use another method, e.g. lora.")
            return
        if self.method == "trainable_tokens" and not add_tokens and "token_indices" not in self.options:
            what = f"'{key}' is trainable_tokens, but the recipe names no token"
            diagnostics.add(key, what, "Set model.add_tokens, or adapter.token_indices to token ids.")
        elif add_tokens and self.method != "trainable_tokens":
            what = f"'model.add_tokens' has no effect with {key}: {self.method}, which trains no embeddings"
            diagnostics.add("model.add_tokens", what, "Use lora, qlora, trainable_tokens or full.", key)
        if self.method in OWN_TARGETS and self.target_modules == "all-linear":
            why = f"with {key}: {self.method}, which selects its own modules"
            names = ("exclude_modules", "layers_to_transform")
            diagnostics.none_has_effect(self, "adapter", names, why, "Set adapter.target_modules to modules.", key)
        if self.is_prompt and (variant.without_decoder or variant.loss):
            what = (
                f"'{key}' is {self.method}, which cannot train models of task: {variant.task}: it prepends its vectors"
            )
            diagnostics.add(key, f"{what} to the prompt of a decoder", "Use lora.", "task")
        if self.start_from is not None:
            what = f"'adapter.start_from' does not work with {key}: {self.method}: it continues LoRA adapters only"
            diagnostics.add("adapter.start_from", what, "Use lora or qlora, or remove it.", key)
        for name in LORA_KEYS:
            idle = name not in allowed and not (name in RESOLVED_KEYS and "target_modules" in allowed)
            default = diagnostics.assume_stated and name not in self.model_fields_set and name not in RESOLVED_KEYS
            stated = name in allowed and name in self.model_fields_set and getattr(self, name) is not None
            for what, fix in find_misfits(name, getattr(self, name), allowed[name]) if stated else ():
                diagnostics.add(f"adapter.{name}", f"{key}: {self.method}: {what}", fix, key)
            if idle or default:
                fix = f"{nearest(name, list(allowed))} Options of {self.method}: {', '.join(allowed)}.".strip()
                diagnostics.none_has_effect(self, "adapter", (name,), f"with {key}: {self.method}", fix, key)

    def _check_lora(self, diagnostics: Diagnostics) -> None:
        start = self.init_lora_weights
        if self.options.get("target_parameters"):
            wrong = {
                "lora_dropout": self.lora_dropout,
                "use_dora": self.use_dora,
                "init_lora_weights": start is not True,
            }
            for name in [name for name, stated in wrong.items() if stated]:
                what = f"'adapter.{name}' does not work with adapter.target_parameters: PEFT does not support it there"
                diagnostics.add(f"adapter.{name}", what, "Remove one of them.", "adapter.target_parameters")
        if self.method == "qlora" and isinstance(start, str) and start.startswith(MUTATING):
            what = f"'adapter.init_lora_weights' is '{start}', which needs weights that are not quantised"
            fix = "Use adapter.method: lora, or remove it."
            diagnostics.add("adapter.init_lora_weights", what, fix, "adapter.method")
        velora = self.options.get("velora_config")
        if isinstance(velora, dict) and velora.get("init_type") != "random":
            what = "'adapter.velora_config' projects by micro-batch averages, which depend on the available memory"
            fix = "Set adapter.velora_config.init_type to random."
            diagnostics.add("adapter.velora_config", what, fix)
        if self.bias not in ("none", "all", "lora_only"):
            what = f"'adapter.bias' is '{self.bias}', which belongs to another method"
            diagnostics.add("adapter.bias", what, "Allowed: none, all, lora_only.", "adapter.method")

    def _check_patterns(self, diagnostics: Diagnostics) -> None:
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as error:
                    what = f"'adapter.{name}' has {pattern!r}, which is not a regular expression: {error}"
                    diagnostics.add(f"adapter.{name}", what, "For a name suffix, write a list: [q_proj].")


def _option_text(value: object) -> str:
    """Return an option's value as written in a recipe."""
    return str(value).lower() if isinstance(value, bool) else str(value)


_OTHER_KEYS = ("method", "start_from", "train_projector", *QUANTIZATION_KEYS)
LORA_KEYS = tuple(name for name in AdapterSection.model_fields if name not in _OTHER_KEYS)


RESOLVED_KEYS = ("target_modules", "exclude_modules", "layers_to_transform")
"""Keys that llmtune resolves to module names, for every method with target modules."""


def _is_kept(name: str, diagnostics: Diagnostics) -> bool:
    """Return whether a setting is taken from the adapter in `start_from` without comparison."""
    if diagnostics.assume_stated:
        return name != "lora_dropout"  # the adapter's value overrides a default that is not stated
    if name in ("exclude_modules", "layers_to_transform"):
        return not diagnostics.stated("adapter.target_modules")
    return name in ("modules_to_save", "init_lora_weights")
