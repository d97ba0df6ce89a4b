"""The modules of a model with weights, in execution order, and how the parts of a block are connected.

A block's residual path follows from that order. A norm starts the branch after it; of two norms between branches, the
first ends the previous branch (Gemma 2). A block that only ends with norms has them after each branch: a LayerNorm
normalises the path after the sum (BERT), an RMSNorm ends the branch (OLMo 2). In a block that begins with a norm, a
branch without one runs parallel to the previous branch (GPT-J).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from llmtune.model.config import linear_shape

ModuleRole = Literal["norm", "attention", "cross-attention", "feed-forward", "experts", "convolution"]
ROLES: Sequence[tuple[ModuleRole, str]] = (
    ("cross-attention", "cross|encdec|encoder_attn"),
    ("attention", "attention|attn"),
    ("experts", "expert|moe|router"),
)
"""Roles by the first pattern in the names and classes of a module and its parents; otherwise feed-forward."""
Place = Literal["", "branch", "beside", "path"]
"""How a part is connected: to the previous part; to the residual path; to the path, parallel to the previous
branch; or it is on the path itself."""
PLAIN = (nn.Linear, nn.Embedding, _ConvNd, Conv1D)
PARALLEL = ("use_parallel_residual", "parallel_attn")
"""Configuration keys for blocks whose branches all read the block's input, each with its own norm."""


class Unit(NamedTuple):
    """A module that has weights or encodes positions."""

    name: str
    module: nn.Module

    @property
    def is_norm(self) -> bool:
        """Whether the module is a norm."""
        return "norm" in type(self.module).__name__.lower()


@dataclass
class Group:
    """Units of a block drawn as one part: a norm, or all units of one role and the norms between them."""

    role: ModuleRole
    units: list[Unit]
    inner: list[Unit] = field(default_factory=list)
    """Norms between its units, such as those of queries and keys."""
    place: Place = ""
    added: bool = False
    """Whether the output is added to the residual path."""


def find_units(model: nn.Module) -> list[Unit]:
    """Return the units of a model in declared order; submodules of a plain layer belong to it."""
    units: list[Unit] = []
    plain = ""
    for name, module in model.named_modules():
        below = {id(weight) for child in module.children() for weight in child.parameters()}
        holds = any(id(weight) not in below for weight in module.parameters(recurse=False))
        computed = "Positional" in type(module).__name__ and not [*module.parameters()]
        if (holds or computed) and not (plain and name.startswith(plain)):
            units.append(Unit(name, module))
            if isinstance(module, PLAIN):
                plain = f"{name}."
    return units


def find_role(model: nn.Module, block: str, unit: Unit) -> ModuleRole:
    """Return the role of a unit within its block."""
    if unit.is_norm:
        return "norm"
    if isinstance(unit.module, _ConvNd):
        return "convolution"
    parts, words = unit.name.removeprefix(f"{block}.").split("."), ""
    for end in range(1, len(parts) + 1):
        owner = model.get_submodule(".".join([block, *parts[:end]]))
        words += f" {parts[end - 1]} {type(owner).__name__}".lower()
    return next((role for role, pattern in ROLES if re.search(pattern, words)), "feed-forward")


def group_units(model: nn.Module, block: str, units: Sequence[Unit], config: PretrainedConfig) -> list[Group]:
    """Return the parts of a block in order, with their connections to its residual path."""
    groups: list[Group] = []
    for unit in units:
        role = find_role(model, block, unit)
        behind = 1 + max((at for at, group in enumerate(groups) if group.role != "norm"), default=-1)
        if role != "norm" and behind and groups[behind - 1].role == role:
            groups[behind - 1].inner += [norm.units[0] for norm in groups[behind:]]
            groups[behind - 1].units.append(unit)
            del groups[behind:]
        else:
            groups.append(Group(role, [unit]))
    if [group.role == "norm" for group in groups] == [True, True, False, False]:  # Falcon computes both norms first
        groups.insert(2, groups.pop(1))
    if groups:
        join_path(groups, parallel=any(getattr(config, key, False) for key in PARALLEL))
    return groups


def join_path(groups: Sequence[Group], *, parallel: bool) -> None:
    """Set where the parts of a block branch off the residual path, and where they are added to it."""
    begins, ends = (groups[at].role == "norm" for at in (0, -1))
    post_norm = ends and not begins
    on_path = post_norm and norm_kind(groups[-1].units[0].module) != "RMSNorm"
    for at, group in enumerate(groups):
        before = groups[at - 1] if at else None
        last = group is groups[-1] or groups[at + 1].role == "norm"
        if group.role == "norm" and before and before.role != "norm":
            ending = post_norm or last
            group.place = ("path" if on_path else "") if ending else "beside" if parallel else "branch"
        elif group.role == "norm":
            group.place = "branch"
        elif before and "convolution" in (before.role, group.role):
            group.place = ""  # a short convolution within the branch (Recurrent Gemma)
        elif before is None or before.role != "norm" or before.place in ("", "path"):
            group.place = "beside" if before and begins else "branch"
    for at, group in enumerate(groups):
        followed = group is groups[-1] or groups[at + 1].place in ("branch", "path")
        group.added = group.place != "path" and followed


def norm_kind(module: nn.Module) -> str:
    """Return the kind of a norm: without a bias it does not subtract the mean, whatever its class name."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return name
    return "RMSNorm" if "RMS" in name or not hasattr(module, "bias") else name


def write_shape(module: nn.Module, parameters: Sequence[nn.Parameter]) -> str:
    """Format the shape of a matrix (inputs → outputs), of a table (rows × width), or of several matrices."""
    if shape := linear_shape(module):
        return f"{shape[0]:,} → {shape[1]:,}"
    sizes = [f"{edge:,}" for edge in parameters[0].shape] if parameters else []
    if isinstance(module, nn.Embedding):
        return " × ".join(sizes)
    if len(sizes) == 3:
        return f"{sizes[0]} × ({sizes[1]} × {sizes[2]})"
    return f"{sizes[1]} → {sizes[0]}" if len(sizes) == 2 else ""
