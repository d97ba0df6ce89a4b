"""The modules with weights that a text passes through, in their order, and how those of a block follow one another.

Where a norm stands is seen from which tensor it reads: a new one is a sum on the residual path, that of the module
before it is none. What a module is, its name and its class say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from llmtune.explain.fake_model import FakeModel

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
