"""A model without its weights: built from its configuration in fake tensors, and run on shapes alone."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from llmtune.errors import first_line
from llmtune.explain.target import Target
from llmtune.explain.trained_modules import read_tensor, tensor_files
from llmtune.model.config import architecture_class, find_class, linear_shape
from llmtune.model.processor import count_ids
from llmtune.records import ModelRef

UNRUNNABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError)
"""What models raise that look at numbers as they run."""


class UntraceableError(Exception):
    """The model cannot be run on shapes alone, or its cost is no polynomial of the length."""


@dataclass(frozen=True)
class FakeModel:
    """A model whose tensors have shapes and no numbers."""

    model: PreTrainedModel
    mode: FakeTensorMode

    def run(self, tokens: int) -> Any:
        """Return what the model gives for a text of `tokens` tokens; raises UntraceableError if it cannot be run."""
        try:
            with self.active():
                inputs = make_inputs(self.model, tokens)
                if "use_cache" in inspect.signature(self.model.forward).parameters:
                    return self.model(**inputs, use_cache=False)
                return self.model(**inputs)
        except UNRUNNABLE as error:
            raise UntraceableError(first_line(error)) from error

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make tensors fake, without gradients; torch does not log what cannot be run."""
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        was = logger.disabled
        logger.disabled = True
        try:
            with self.mode, torch.no_grad():
                yield
        finally:
            logger.disabled = was


def build_fake_model(target: Target) -> FakeModel:
    """Build the target's model without weights, in the class that it is loaded in; of a run, that of its task."""
    folder = Path(target.config.name_or_path)
    if target.task is not None and target.recipe is not None:
        model_class, config = find_class(ModelRef(target.name, folder, None, ""), target.recipe, target.task)
    else:
        own_code = not type(target.config).__module__.startswith("transformers.")
        model_class, config = architecture_class(target.config, own_code), copy.deepcopy(target.config)

    def build() -> PreTrainedModel:
        if hasattr(model_class, "from_config"):  # an Auto class
            own_code = bool(getattr(config, "auto_map", None))
            return model_class.from_config(config, trust_remote_code=own_code, attn_implementation="eager")
        return model_class._from_config(config, attn_implementation="eager")

    fake = fake_model(build)
    untied = find_untied(fake.model, folder)
    with fake.active():
        for name in untied:
            owner, _, last = name.rpartition(".")
            weight = fake.model.get_parameter(name)
            setattr(fake.model.get_submodule(owner), last, torch.nn.Parameter(torch.empty(weight.shape)))
        grows = target.recipe is not None and bool(target.recipe.model.add_tokens)
        if grows and (needed := count_ids(target.processor)) > fake.model.get_input_embeddings().weight.shape[0]:
            fake.model.resize_token_embeddings(needed, mean_resizing=False)
    return fake


def fake_model(build: Callable[[], PreTrainedModel]) -> FakeModel:
    """Build a model in fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, no_init_weights():
        model = build().eval()
    with mode:
        model.tie_weights()
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")  # experts are chosen without a look at numbers
    return FakeModel(cast("PreTrainedModel", model), mode)


def find_untied(model: PreTrainedModel, folder: Path) -> list[str]:
    """Return what the configuration ties and the files hold as a tensor of its own; so does transformers on loading."""
    files = tensor_files(folder)
    stored = {
        second: first
        for second, first in (model.all_tied_weights_keys or {}).items()
        if first in files and second in files
    }
    return [
        second
        for second, first in stored.items()
        if not torch.equal(read_tensor(files[first], first), read_tensor(files[second], second))
    ]


def make_inputs(model: PreTrainedModel, tokens: int) -> dict[str, torch.Tensor]:
    """Return what the model reads for a text of `tokens` tokens: ids, or as many frames of a recording."""
    config = model.config
    ids = torch.ones((1, tokens), dtype=torch.long)
    name = model.main_input_name
    if name == "input_features":  # Whisper reads a window of one size
        inputs = {name: torch.zeros((1, config.num_mel_bins, 2 * config.max_source_positions))}
    elif name == "input_values":
        samples = tokens  # those that make so many frames: the convolutions turned round
        for size, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + size
        inputs = {name: torch.zeros((1, samples))}
    else:
        inputs = {"input_ids": ids}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


# The modules with weights that a text passes through, in their order, and how those of a block follow one another.
# Where a norm stands is seen from which tensor it reads: a new one is a sum on the residual path, that of the module
# before it is none. What a module is, its name and its class say.


Role = Literal["norm", "attention", "cross-attention", "feed-forward", "experts", "convolution"]
ROLES: Sequence[tuple[Role, str]] = (
    ("cross-attention", "cross|encdec|encoder_attn"),
    ("attention", "attention|attn"),
    ("experts", "expert|moe|router"),
)
"""By the first pattern that is found in the names and classes of a module and those around it; else feed-forward."""
Place = Literal["", "branch", "beside", "path"]
"""How a part is reached: from the one before it; from the residual path; from there too, beside the branch before it;
or it stands on the path itself."""
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


@dataclass(eq=False)
class Group:
    """Calls of a block that are drawn as one part: a norm, or all of a role with the norms between them."""

    role: Role
    calls: list[ModuleCall]
    inner: list[ModuleCall] = field(default_factory=list)
    """Norms between its calls, such as those of queries and keys."""
    place: Place = ""
    added: bool = False
    """Whether what it gives is added to the residual path."""

    @property
    def source(self) -> torch.Tensor | None:
        """What it reads."""
        return self.calls[0].source

    def follows(self, before: Group) -> bool:
        """Whether it reads what another one gives."""
        return self.source is not None and self.source is before.calls[-1].output


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
    if call.is_norm:
        return "norm"
    if isinstance(call.module, _ConvNd):
        return "convolution"
    parts, words = call.name.removeprefix(f"{block}.").split("."), ""
    for end in range(1, len(parts) + 1):
        owner = model.get_submodule(".".join([block, *parts[:end]]))
        words += f" {parts[end - 1]} {type(owner).__name__}".lower()
    return next((role for role, pattern in ROLES if re.search(pattern, words)), "feed-forward")


def group_calls(model: nn.Module, block: str, calls: Sequence[ModuleCall]) -> list[Group]:
    """Return the parts of a block in their order, and how they are joined to its residual path."""
    groups: list[Group] = []
    waiting: list[Group] = []  # norms of a branch that comes later
    for call in calls:
        role = find_role(model, block, call)
        behind = 1 + max((at for at, group in enumerate(groups) if group.role != "norm"), default=-1)
        if role == "norm":
            groups.append(Group(role, [call]))
        elif behind and groups[behind - 1].role == role:
            groups[behind - 1].inner += [norm.calls[0] for norm in groups[behind:]]
            groups[behind - 1].calls.append(call)
            del groups[behind:]
        else:
            after = [norm for norm in groups[behind : behind + 1] if behind and norm.follows(groups[behind - 1])]
            found = [*waiting, *groups[behind + len(after) :]]
            own = [norm for norm in found if norm.calls[0].output is call.source] or found
            waiting = [norm for norm in found if norm not in own]
            groups[behind:] = [*after, *own, Group(role, [call])]
    join_path(groups)
    return groups


def join_path(groups: Sequence[Group]) -> None:
    """State where the parts of a block leave its residual path, and where they are added to it.

    A block that ends with a norm of a sum has its norms on the path; another has them within its branches.
    """
    post_norm = bool(groups) and groups[-1].role == "norm" and not (groups[1:] and groups[-1].follows(groups[-2]))
    sources: list[torch.Tensor | None] = []  # of the branch
    for before, group in pairwise((None, *groups)):
        assert group is not None
        if group.role == "norm" and not (before and group.follows(before)):
            group.place = "path" if post_norm else "branch"
        elif group.role != "norm" and not (before and before.role == "norm" and before.place in ("branch", "beside")):
            group.place = "branch"
        if before and group.place:
            before.added = before.place != "path"
        if group.place == "branch":
            beside = group.source is not None and any(group.source is source for source in sources)
            if before and beside:
                group.place, before.added = "beside", False
            sources = sources if beside else []
        sources.append(group.source)
    if groups:
        groups[-1].added = groups[-1].place != "path"


def norm_kind(module: nn.Module) -> str:
    """Return the kind of a norm: those that take no mean away have no bias, whatever their class is called."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return name
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
