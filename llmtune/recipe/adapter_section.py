"""The section `adapter`: what is trained, by PEFT's own option names."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from llmtune.recipe.diagnostics import Diagnostics
from llmtune.recipe.section import Count, Many, Section, Text, absolute, by_type

Texts = Annotated[
    Annotated[str, Tag("text")] | Annotated[Many[str], Tag("items")],
    by_type({str: "text"}, "items"),
]
Layers = Annotated[
    Annotated[int, Field(ge=0), Tag("number")] | Annotated[Many[Annotated[int, Field(ge=0)]], Tag("items")],
    by_type({int: "number", float: "number"}, "items"),
]
InitWeights = Annotated[
    Annotated[bool, Tag("switch")]
    | Annotated[str, Field(pattern=r"^(gaussian|olora|pissa|pissa_niter_[1-9][0-9]{0,3})$"), Tag("text")],
    by_type({bool: "switch"}, "text"),
]
QUANTIZATION_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


class AdapterSection(Section):
    """What is trained: low-rank adapters by PEFT's own option names, or all weights."""

    method: Literal["lora", "qlora", "full"] = "lora"
    """`lora` trains low-rank matrices beside frozen weights, `qlora` the same on a base in 4 bits, `full` trains every
    weight. Default `lora`: near the quality of `full` at a fraction of the memory."""
    r: int = Field(default=16, ge=1, le=4096)
    """Rank of the low-rank matrices. Default 16: enough for most tasks of one domain."""
    lora_alpha: Count = 32
    """Scale of the adapter: its output counts `lora_alpha / r` times. Default 32: twice the default rank, so that a
    usual learning rate fits."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs set to zero in training. Default 0: early stopping guards better against over-fitting,
    and dropout costs speed."""
    target_modules: Texts = "all-linear"
    """Modules that get an adapter: `all-linear`, a list of name endings, or a regular expression over whole names.
    Default `all-linear`: adapters everywhere learn better than on attention alone."""
    exclude_modules: Texts | None = None
    """Modules that get none though they match: name endings or a regular expression. Default none."""
    modules_to_save: Many[str] | None = None
    """Modules that are trained whole and saved with the adapter. Default none: each costs its full size."""
    layers_to_transform: Layers | None = None
    """Numbers of the layers that get an adapter, counted from 0. Default none: all layers."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained. Default `none`: with trained biases a model changes even when its adapter is switched
    off."""
    use_dora: bool = False
    """Split weights into magnitude and direction (DoRA). Default false: better at low rank, but slower."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` (rsLoRA), which keeps high ranks stable. Default false, as in PEFT."""
    init_lora_weights: InitWeights = True
    """How the matrices start: true (B is zero, so the start is the base model), false (random, for tests of loading),
    `gaussian`, `pissa`, `pissa_niter_N` or `olora`. Default true: costs nothing and starts from the base."""
    rank_pattern: dict[str, Count] = Field(default={})
    """Another rank for modules whose name matches the key. Default none: one rank for all."""
    alpha_pattern: dict[str, Count] = Field(default={})
    """Another `lora_alpha` for modules whose name matches the key. Default none: one scale for all."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit number format of the base with `qlora`. Default `nf4`: made for weights that are normally distributed, and
    closer to them than `fp4`."""
    bnb_4bit_use_double_quant: bool = True
    """With `qlora`, quantise the scales of the 4-bit blocks too. Default true: saves 0.4 bits a weight at no measured
    loss."""
    start_from: Text | None = None
    """A run folder or PEFT folder whose adapter training goes on from. Default none: a new adapter."""

    paths: ClassVar = {"start_from": absolute}

    def check(self, diagnostics: Diagnostics) -> None:
        """Report settings that the method, or the adapter to go on from, does not read, and what PEFT does not do."""
        why, method = f"with adapter.method: {self.method}", "adapter.method"
        if self.method == "full":
            diagnostics.none_has_effect(self, "adapter", LORA_KEYS, why, "Remove it, or use lora or qlora.", method)
            fix = "Name the run's `weights` folder as model.name."
            diagnostics.none_has_effect(self, "adapter", ("start_from",), why, fix, method)
        elif self.start_from is not None:
            kept = [name for name in LORA_KEYS if _is_kept(name, diagnostics)]
            fix = "Remove it (or set it to null): the adapter's own setting is kept."
            because = ("adapter.start_from", method)
            diagnostics.none_has_effect(self, "adapter", kept, "with adapter.start_from", fix, *because)
        if self.method != "qlora":
            diagnostics.none_has_effect(self, "adapter", QUANTIZATION_KEYS, why, "Remove it, or use qlora.", method)
        if self.method != "full":
            self._check_lora(diagnostics)

    def _check_lora(self, diagnostics: Diagnostics) -> None:
        start = self.init_lora_weights
        if self.method == "qlora" and isinstance(start, str) and start.startswith(("pissa", "olora")):
            what = f"'adapter.init_lora_weights' is '{start}', which needs weights that are not quantised"
            fix = "Use adapter.method: lora with it, or omit it."
            diagnostics.add("adapter.init_lora_weights", what, fix, "adapter.method")
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as error:
                    what = f"'adapter.{name}' has {pattern!r}, which is not a regular expression: {error}"
                    diagnostics.add(f"adapter.{name}", what, "For a name ending, write a list: [q_proj].")


LORA_KEYS = tuple(
    name for name in AdapterSection.model_fields if name not in ("method", "start_from", *QUANTIZATION_KEYS)
)


def _is_kept(name: str, diagnostics: Diagnostics) -> bool:
    """Whether a setting is the adapter's own when training goes on from one, and is not compared with it either."""
    if diagnostics.assume_stated:
        return name != "lora_dropout"  # a default that is not stated gives way to the adapter's own
    if name in ("exclude_modules", "layers_to_transform"):
        return not diagnostics.stated("adapter.target_modules")
    return name in ("modules_to_save", "init_lora_weights")
