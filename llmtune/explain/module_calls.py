"""The modules with weights that a text passes through, in their order, and how those of a block follow one another.

Where a norm stands is seen from which tensor it reads: a new one is a sum on the residual path, that of the module
before it is none. What a module is, its name and its class say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from llmtune.explain.fake_model import FakeModel
from llmtune.explain.position_encodings import SLOPED
from llmtune.model.config import linear_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Role = Literal["attention", "cross-attention", "feed-forward", "experts", "convolution"]
ROLES: Sequence[tuple[Role, str]] = (
    ("cross-attention", "cross|encdec|encoder_attn"),
    ("attention", "attention|attn"),
    ("experts", "expert|moe|router"),
)
"""By the first pattern that is found in the names and classes of a module and those around it; else feed-forward."""
PLAIN = (nn.Linear, nn.Embedding, _ConvNd, Conv1D)
SHORTEST = 8
"""Tokens of the text; a model of speech reads its whole window."""


@dataclass
class ModuleCall:
    """One call of a module that has weights, or knows positions."""

    name: str
    module: nn.Module
    source: torch.Tensor | None = None
    """What it reads first."""
    output: torch.Tensor | None = None

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm."""
        return "norm" in type(self.module).__name__.lower()


@dataclass
class Branch:
    """Calls of one role, with what stands before and behind them."""

    role: Role
    calls: list[ModuleCall]
    before: list[ModuleCall]
    """Norms."""
    inner: list[ModuleCall] = field(default_factory=list)
    """Norms between its calls, such as those of queries and keys."""
    after: list[ModuleCall] = field(default_factory=list)
    """Norms of what it gives, before this is added to the residual path."""
    behind: list[ModuleCall] = field(default_factory=list)
    """Norms on the residual path, after the sum."""

    @property
    def source(self) -> torch.Tensor | None:
        """What it takes from the residual path."""
        return (self.before or self.calls)[0].source


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold weights, or positions, by name; what stands within a plain layer is a part of it."""
    units: dict[str, nn.Module] = {}
    plain = ""
    for name, module in model.named_modules():
        below = {id(weight) for child in module.children() for weight in child.parameters()}
        holds = any(id(weight) not in below for weight in module.parameters(recurse=False))
        computed = "Positional" in type(module).__name__ and not [*module.parameters()]
        if (holds or computed) and not (plain and name.startswith(plain)):
            units[name] = module
            if isinstance(module, PLAIN):
                plain = f"{name}."
    return units


def record_calls(fake: FakeModel) -> tuple[list[ModuleCall], tuple[int, ...]]:
    """Return all calls in the order in which they begin, and the shape of the logits.

    Raises UntraceableError where the model cannot be run on shapes.
    """
    calls: list[ModuleCall] = []
    running: list[ModuleCall] = []

    def begin(name: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors = (part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor))
        calls.append(ModuleCall(name, module, next(tensors, None)))
        running.append(calls[-1])

    def end(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        running.pop().output = next((part for part in tree_leaves(output) if isinstance(part, torch.Tensor)), None)

    with ExitStack() as hooks:
        for name, module in find_units(fake.model).items():
            hooks.callback(module.register_forward_pre_hook(partial(begin, name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(end).remove)
        logits = getattr(fake.run(SHORTEST), "logits", None)
    return calls, tuple(getattr(logits, "shape", ()))


def find_role(model: nn.Module, block: str, call: ModuleCall) -> Role:
    """Return what a module of a block is part of."""
    if isinstance(call.module, _ConvNd):
        return "convolution"
    parts, words = call.name.removeprefix(f"{block}.").split("."), ""
    for end in range(1, len(parts) + 1):
        owner = model.get_submodule(".".join([block, *parts[:end]]))
        words += f" {parts[end - 1]} {type(owner).__name__}".lower()
    return next((role for role, pattern in ROLES if re.search(pattern, words)), "feed-forward")


def find_branches(model: nn.Module, block: str, calls: Sequence[ModuleCall]) -> list[list[Branch]]:
    """Return the branches of a block in their order; those that leave the residual path at one point stand together.

    A block that ends with a norm of a sum has its norms on the residual path; another has them within its branches.
    """
    branches: list[Branch] = []
    norms: list[ModuleCall] = []  # since the last call
    waiting: list[ModuleCall] = []  # for a branch that comes later
    for call in calls:
        last = branches[-1] if branches else None
        if call.is_norm and last and not norms and call.source is (last.after or last.calls)[-1].output is not None:
            last.after.append(call)
        elif call.is_norm:
            norms.append(call)
        elif last and last.role == find_role(model, block, call):
            last.inner += [*last.after, *norms]
            last.calls.append(call)
            last.after, norms = [], []
        else:
            found = [*waiting, *norms]
            own = [norm for norm in found if norm.output is call.source] or found
            branches.append(Branch(find_role(model, block, call), [call], own))
            waiting, norms = [norm for norm in found if norm not in own], []
    if not branches:
        return []
    if norms and norms[-1].source is None:  # the model was not run: nobody knows where they stand
        branches[-1].after += norms
    elif norms:
        for branch, following in pairwise(branches):
            branch.behind, following.before = following.before, []
        branches[-1].behind = norms
    joined = [[branches[0]]]
    for before, branch in pairwise(branches):
        if branch.source is not None and branch.source is before.calls[0].source:
            branch.before = before.before  # one norm for both
        if branch.source is not None and branch.source is before.source and not before.behind:
            joined[-1].append(branch)
        else:
            joined.append([branch])
    return joined


# What is written on them

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
