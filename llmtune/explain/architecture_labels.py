"""What is written on the parts of a model: heads, widths, shapes and sizes, by its configuration and its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune.explain.module_calls import ModuleCall
from llmtune.explain.position_encodings import SLOPED

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
BIASES = ("relative_attention_bias", "rel_embeddings", "relative_attention_bias_embedding")
"""Last parts of the names of modules that hold a bias by distance."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation")
"""Keys of a configuration that name the activation."""


def briefly(number: float) -> str:
    """Write a number in three digits: 134,515,008 is 135 M."""
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number:g}"


def operations(number: float) -> str:
    """Write a number of floating-point operations."""
    text = briefly(number)
    return f"{text}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"


def brief_size(number: float) -> str:
    """Write a number of parameters in three digits, none as nothing; a thousand million is B, as usual for models."""
    return briefly(number).replace("G", "B") if number else ""


def norm_kind(module: nn.Module) -> str:
    """Return the kind of a norm: those that take no mean away have no bias, whatever their class is called."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return type(module).__name__
    return "RMSNorm" if "RMS" in name or not hasattr(module, "bias") else name


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear module; None for others."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def write_shape(module: nn.Module, parameters: Sequence[nn.Parameter]) -> str:
    """Write inputs and outputs of a matrix, rows and width of a table; of several matrices, how many."""
    if shape := linear_shape(module):
        return f"{shape[0]:,} → {shape[1]:,}"
    sizes = [f"{edge:,}" for edge in parameters[0].shape] if parameters else []
    if isinstance(module, nn.Embedding):
        return " × ".join(sizes)
    if len(sizes) == 3:
        return f"{sizes[0]} × ({sizes[1]} × {sizes[2]})"
    return f"{sizes[1]} → {sizes[0]}" if len(sizes) == 2 else ""


def describe_heads(config: PretrainedConfig, half: str) -> str:
    """Say how many heads there are, and how many of them for keys and values where these are fewer."""
    keys = (f"{half}_attention_heads", "num_attention_heads", "num_heads", "n_head")
    heads = next((number for key in keys if isinstance(number := getattr(config, key, None), int)), 0)
    if not heads:
        return ""
    width = getattr(config, "hidden_size", None)
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or (width and width // heads)
    fewer = getattr(config, "num_key_value_heads", None) or heads
    return f"{heads} heads of {size}" + (f", {fewer} for keys and values" if fewer < heads else "")


def describe_feed_forward(config: PretrainedConfig, calls: Sequence[ModuleCall]) -> str:
    """Say how wide it is, how many experts it has, its activation, and whether two projections are multiplied."""
    shapes = [shape for call in calls if (shape := linear_shape(call.module))]
    experts = [part.shape[0] for call in calls for part in call.module.parameters() if part.ndim == 3]
    wide = shapes[-1][0] if shapes else 0
    gated = bool(experts) or len(shapes) > 2 or (wide and shapes[0][1] == 2 * wide)
    size = f"{experts[0]} experts, a router" if experts else f"{wide:,} wide" if wide else ""
    activation = next((str(getattr(config, key)) for key in ACTIVATIONS if getattr(config, key, None)), "")
    return ", ".join(filter(None, [size, activation, "gated" if gated else ""]))


def describe_window(config: PretrainedConfig, *, causal: bool) -> str:
    """Say how far attention reaches where a configuration has a sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or [])
    sliding = sum(bool(re.search("sliding|local|chunked", kind)) for kind in kinds)
    if not window or (kinds and not sliding) or getattr(config, "use_sliding_window", True) is False:
        return ""
    reach = f"window {window:,} tokens back" if causal else f"window {window:,} each way"
    return f"{reach} in {sliding} of {len(kinds)} layers" if kinds and sliding < len(kinds) else reach


def is_positions(call: ModuleCall) -> bool:
    """Whether a module adds positions to what it is given."""
    last = call.name.rpartition(".")[2].lower()
    return "pos" in last or last == "wpe" or "Positional" in type(call.module).__name__ or "pos_conv" in call.name


def find_orders(config: PretrainedConfig, owner: nn.Module, before: Sequence[ModuleCall]) -> Iterator[str]:
    """Yield how a stack knows the order of words, from its modules and its configuration."""
    for call in filter(is_positions, before):
        weight = getattr(call.module, "weight", None)
        if "pos_conv" in call.name:
            yield "a convolution over neighbours"
        else:
            sines = "sinus" in type(call.module).__name__.lower() or weight is None or not weight.requires_grad
            yield "sines, fixed" if sines else "a learned table"
    inside = dict(owner.named_modules())
    rotary = any("rotary" in type(module).__name__.lower() for module in inside.values())
    if rotary or getattr(config, "rotary_dim", None):
        yield "rotary: queries and keys are turned by their position"
    if any(name.endswith(BIASES) for name in inside):
        yield "relative: a learned bias by distance"
    if config.model_type in SLOPED or getattr(config, "alibi", False):
        yield "linear biases by distance (ALiBi)"
