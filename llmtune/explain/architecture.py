"""The parts of a model: embeddings, positions, stacks of blocks, norms, heads; read from its modules and one run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.modules.conv import _ConvNd

from llmtune.explain.block_wiring import (
    Branch,
    ModuleCall,
    Norm,
    Recording,
    UnknownWiringError,
    Wiring,
    norm_kind,
    read_wiring,
)
from llmtune.explain.meta_device_model import MetaModel, UntraceableError
from llmtune.explain.position_encodings import SLOPED
from llmtune.explain.target import Target
from llmtune.model.config import linear_shapes
from llmtune.model.memory_plan import context_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Kind = Literal["embedding", "positions", "norm", "linear", "convolutions", "other"]
BIASES = ("relative_attention_bias", "rel_embeddings", "relative_attention_bias_embedding")
"""Last parts of the names of modules that hold a bias by distance."""
PLAIN = (torch.nn.Linear, torch.nn.Embedding, _ConvNd)


@dataclass(frozen=True)
class Piece:
    """A part outside of the blocks."""

    name: str
    kind: Kind
    about: str
    """What it is in a few words: a norm's kind, the class of what is no usual part."""
    shape: tuple[int, ...]
    """Of a linear layer inputs and outputs, of an embedding rows and width."""
    parameters: int
    """Its own; a weight that another part holds as well is counted there."""
    tied_to: str | None = None
    """The part whose weights it uses."""
    once: bool = False
    """Whether it works once for a text, as a pooling layer does, and not for each token."""


@dataclass(frozen=True)
class Blocks:
    """Equal blocks, one after the other."""

    first: str
    """Name of the first one's module."""
    numbers: tuple[int, ...]
    """Which they are in their list, from 0."""
    runs: int
    """How often a text passes through one of them; more than that many where weights are shared."""
    wiring: Wiring | None
    unknown: str | None
    """Why there is no wiring."""
    shapes: dict[str, tuple[int, ...]]
    """Inputs and outputs of the linear modules in one of them, by their name below the block; of experts, [experts,
    inputs, outputs] or the like, by the name of the parameter."""
    sizes: dict[str, int]
    """Parameters of each module with weights in one of them."""
    parameters: int
    """Of all of them together."""
    typical: int
    """Of one of them; where one holds something more, of the others."""
    extras: tuple[str, ...] = ()
    """Modules with weights that only some of them hold, such as T5's table of distances."""

    def branches(self, kind: str | None = None) -> list[Branch]:
        """Return the branches of a block, in their order; those of one kind where it is named."""
        sublayers = self.wiring.sublayers if self.wiring else ()
        return [branch for sublayer in sublayers for branch in sublayer.branches if kind in (None, branch.kind)]

    def norms(self) -> list[Norm]:
        """Return the norms of a block; one that two branches share comes twice."""
        if self.wiring is None:
            return []
        inner = [norm for b in self.branches() for norm in (*b.before, *b.inner, *b.after)]
        return [*self.wiring.entry, *inner, *(norm for sublayer in self.wiring.sublayers for norm in sublayer.behind)]

    def names(self, module: str = "") -> list[str]:
        """Return the names of the blocks, or of one module in each of them."""
        owner = self.first.rpartition(".")[0]
        return [f"{owner}.{number}{f'.{module}' if module else ''}" for number in self.numbers]


@dataclass(frozen=True)
class Stack:
    """Blocks with what stands before and behind them."""

    name: str
    """encoder or decoder; of other models the name of the module."""
    causal: bool
    """Whether a position sees only those before it."""
    orders: tuple[str, ...]
    """How it knows the order of words."""
    before: tuple[Piece, ...]
    blocks: tuple[Blocks, ...]
    behind: tuple[Piece, ...]
    window: str | None = None
    """How far attention reaches where that is less than everything."""
    kv_heads: int | None = None
    """Heads for keys and values, where they are fewer."""


@dataclass(frozen=True)
class Architecture:
    """A model as its configuration and its modules say."""

    name: str
    model_class: str
    model_type: str
    family: str
    parameters: int
    width: int | None
    vocabulary: int | None
    context: int | None
    """Tokens that its positions reach; None where they have no end."""
    tied_head: bool
    stacks: tuple[Stack, ...]
    other: dict[str, int] = field(default_factory=dict)
    """Parameters of what is not part of a stack, or is not used for a text, by name."""
    scores_text: bool = False
    """Whether scores come out once for a text, and not for each token."""
    untraced: str | None = None
    """Why the model could not be run on shapes: then there is no order of parts."""


def describe_model(target: Target, meta: MetaModel) -> Architecture:
    """Describe the model of `target`; every parameter is counted in exactly one part."""
    model = meta.model
    config, context = model.config.get_text_config(), context_length(model.config)
    try:
        recording, reason = meta.recording, None
    except UntraceableError as error:
        recording, reason = Recording(), str(error)
    reader = _Reader(model, recording)
    stacks, rest = reader.adopt_shared([reader.describe_stack(name, target.family) for name in reader.lists])
    return Architecture(
        name=target.name,
        model_class=type(model).__name__,
        model_type=str(config.model_type),
        family=target.family,
        parameters=model.num_parameters(),
        width=getattr(config, "hidden_size", None),
        vocabulary=getattr(config, "vocab_size", None),
        context=context if context and context > 0 else None,
        tied_head=any(piece.tied_to for stack in stacks for piece in stack.behind),
        stacks=stacks,
        other=rest,
        scores_text=len(recording.logits_shape) == 2,
        untraced=reason,
    )


class _Reader:
    """A model and its recording, with the owner of each parameter."""

    def __init__(self, model: PreTrainedModel, recording: Recording) -> None:
        self.model, self.recording, self.calls = model, recording, recording.calls
        self.modules = dict(model.named_modules())
        self.sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.first = {id(parameter): name for name, parameter in model.named_parameters()}
        self.linears = linear_shapes(model)
        self.lists = self._find_lists()

    def _find_lists(self) -> list[str]:
        """Return the names of the lists of blocks, in the order in which they run; the outermost alone."""
        lists = {name: module for name, module in self.modules.items() if isinstance(module, torch.nn.ModuleList)}
        if not self.calls:  # a model that could not be run: its longest list
            return [max(lists, key=lambda name: len(lists[name]), default="")]
        found: list[str] = []
        for call in self.calls:
            parent = call.name.rpartition(".")[0]
            inside = any(f"{parent}.".startswith(f"{outer}.") for outer in found)
            attends = any("attention" in type(module).__name__.lower() for module in call.module.modules())
            if parent in lists and not inside and attends:
                found.append(parent)
        return found

    def describe_stack(self, name: str, family: str) -> Stack:
        """Describe the stack whose blocks are in the list `name`."""
        owner = name.rpartition(".")[0]
        role = next((half for half in ("encoder", "decoder") if half in owner.split(".")), None)
        word = role if family == "encoder-decoder" and role else family if len(self.lists) == 1 else owner
        before, behind = self._find_pieces(name)
        blocks = tuple(self._group_blocks(name))
        config = getattr(self.modules.get(owner), "config", None) or self.model.config.get_text_config()
        return Stack(
            name=word,
            causal=word == "decoder",
            orders=tuple(dict.fromkeys(self._find_orders(config, owner, before))),
            before=before,
            blocks=blocks,
            behind=behind,
            window=describe_window(config, word == "decoder"),
            kv_heads=_count_kv_heads(blocks),
        )

    def _group_blocks(self, name: str) -> Iterator[Blocks]:
        """Yield runs of blocks that are wired alike, with matrices of the same shapes."""
        calls: dict[str, list[ModuleCall]] = {}
        for call in self.calls:
            calls.setdefault(call.name, []).append(call)
        groups: list[tuple[tuple[Wiring | None, str | None, dict[str, tuple[int, ...]], int], list[int]]] = []
        for number in range(len(self.modules[name]) if name else 0):
            block = f"{name}.{number}"
            runs = calls.get(block, [])
            key = (*self._read_wiring(runs), self._shapes_of(block), len(runs))
            if not groups or groups[-1][0] != key:
                groups.append((key, []))
            groups[-1][1].append(number)
        for (wiring, unknown, shapes, count), numbers in groups:
            own = [self._weights_of(f"{name}.{number}") for number in numbers]
            common = set.intersection(*map(set, own))
            extras = sorted({weight.rpartition(".")[0] for weights in own for weight in set(weights) - common})
            totals = [sum(weights.values()) for weights in own]
            sizes: dict[str, int] = {}
            for weight, size in own[-1].items():
                owner = weight.rpartition(".")[0]
                sizes[owner] = sizes.get(owner, 0) + size
            first = f"{name}.{numbers[0]}"
            yield Blocks(first, (*numbers,), count, wiring, unknown, shapes, sizes, sum(totals), totals[-1], (*extras,))

    def _read_wiring(self, runs: Sequence[ModuleCall]) -> tuple[Wiring | None, str | None]:
        if not runs:
            return None, "it is not run for a text"
        try:
            crosses = bool(self.model.config.is_encoder_decoder)
            return read_wiring(runs[0], self.recording, crosses=crosses), None
        except UnknownWiringError as error:
            return None, str(error)

    def _shapes_of(self, block: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self.linears.items():
            if name.startswith(f"{block}."):
                shapes[name.removeprefix(f"{block}.")] = shape
        for name, parameter in self.modules[block].named_parameters():
            owner, _, last = name.rpartition(".")
            if parameter.ndim == 3:  # experts: one matrix each
                shapes[name] = tuple(parameter.shape)
            elif parameter.ndim == 2 and last == "weight" and owner not in shapes and not owner.endswith(BIASES):
                shapes[owner] = (parameter.shape[1], parameter.shape[0])  # a router
        return shapes

    def _weights_of(self, prefix: str) -> dict[str, int]:
        start = f"{prefix}."
        return {name.removeprefix(start): size for name, size in self.sizes.items() if name.startswith(start)}

    def _find_pieces(self, name: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Return the parts of a stack before its first block and behind its last one."""
        before: dict[str, Piece] = {}
        behind: dict[str, Piece] = {}
        places = before
        for index, call in enumerate(self.calls):
            if call.name.rpartition(".")[0] == name:
                places = behind
            if self._stack_of(call) == name and self._is_leaf(index):
                piece = self._describe_piece(call)
                if piece is not None and piece.name not in before:
                    places.setdefault(piece.name, piece)
        return tuple(before.values()), tuple(behind.values())

    def _stack_of(self, call: ModuleCall) -> str | None:
        """Return the stack that a call belongs to: that of the half it is part of, else the last; None in a block."""
        path = (*call.parents, call.name)
        if any(name.rpartition(".")[0] in self.lists for name in path):
            return None
        for name in self.lists[:-1]:
            owner = name.rpartition(".")[0]
            if owner in path and not any(other.startswith(f"{owner}.") for other in self.lists if other != name):
                return name
        return self.lists[-1]

    def _is_leaf(self, index: int) -> bool:
        """Whether a call is drawn as one: a known kind of layer, or a module without calls of its own."""
        call = self.calls[index]
        if any(isinstance(self.modules[parent], PLAIN) for parent in call.parents):
            return False
        later = self.calls[index + 1] if index + 1 < len(self.calls) else None
        return isinstance(call.module, PLAIN) or later is None or len(later.parents) <= len(call.parents)

    def _describe_piece(self, call: ModuleCall) -> Piece | None:
        """Describe a leaf; None for what has no weights and is no matter of positions, such as an activation."""
        name, module = call.name, call.module
        lists = [i for i, part in enumerate(name.split(".")) if part.isdigit()]
        if lists and isinstance(module, _ConvNd | torch.nn.LayerNorm | torch.nn.GroupNorm):
            parent = ".".join(name.split(".")[: lists[0]])  # convolutions before the blocks are drawn as one
            size = sum(self._weights_of(parent).values())
            return Piece(parent, "convolutions", f"{len(self.modules[parent])} convolutions", (), size)
        own = {f"{name}.{key}": value for key, value in module.named_parameters()}
        last, kind = name.rpartition(".")[2].lower(), type(module).__name__
        positions = "pos" in last or last in ("wpe", "rel_embeddings") or "rotary" in kind.lower()
        if not own and not positions:
            return None
        held = {key: self.first.get(id(value), key) for key, value in own.items()}
        tied = next((first for key, first in held.items() if first != key), None)
        size = sum(self.sizes.get(key, 0) for key in own)
        shape = self.linears.get(name) or tuple(getattr(module, "weight", torch.empty(0)).shape)
        once = name in self.linears and math.prod(call.shape[:-1]) == 1
        tied_to = tied.rpartition(".")[0] if tied else None
        return Piece(name, *self._kind_of(call, positions), shape, size, tied_to, once)

    def _kind_of(self, call: ModuleCall, positions: bool) -> tuple[Kind, str]:
        module, kind = call.module, type(call.module).__name__
        if positions:
            return "positions", kind
        if "norm" in kind.lower():
            return "norm", norm_kind(call)
        if call.name in self.linears:
            return "linear", kind
        if isinstance(module, _ConvNd):
            return "convolutions", f"convolution over {module.kernel_size[0]}, every {module.stride[0]}"
        return ("embedding", kind) if isinstance(module, torch.nn.Embedding) else ("other", kind)

    def _find_orders(self, config: PretrainedConfig, owner: str, before: Sequence[Piece]) -> Iterator[str]:
        """Yield how a stack knows the order of words, from its modules and its configuration."""
        for piece in before:
            module, last = self.modules[piece.name], piece.name.rpartition(".")[2].lower()
            if "pos_conv" in piece.name:
                yield "a convolution over neighbours"
            elif "sinus" in type(module).__name__.lower():
                yield "sines, fixed"
            elif isinstance(module, torch.nn.Embedding) and ("pos" in last or last == "wpe"):
                yield "a learned table" if module.weight.requires_grad else "sines, fixed"
        inside = [name for name in self.modules if name.startswith(f"{owner}.")] if owner else list(self.modules)
        rotary = any("rotary" in type(self.modules[name]).__name__.lower() for name in inside)
        if rotary or getattr(config, "rotary_dim", None):
            yield "rotary: queries and keys are turned by their position"
        if any(name.rpartition(".")[2] in BIASES for name in inside):
            yield "relative: a learned bias by distance"
        if config.model_type in SLOPED or getattr(config, "alibi", False):
            yield "linear biases by distance (ALiBi)"

    def adopt_shared(self, stacks: Sequence[Stack]) -> tuple[tuple[Stack, ...], dict[str, int]]:
        """Give a table that only others use (T5's `shared`) to the first part that does; return the rest as well."""
        rest = self._count_rest(stacks)
        owners: dict[str, str] = {}

        def adopt(piece: Piece) -> Piece:
            held = piece.tied_to
            if held in rest:
                owners[held] = piece.name
                return replace(piece, parameters=piece.parameters + rest.pop(held), tied_to=None)
            return replace(piece, tied_to=owners.get(held or "", held))

        adopted = []
        for stack in stacks:
            before, behind = (tuple(map(adopt, pieces)) for pieces in (stack.before, stack.behind))
            adopted.append(replace(stack, before=before, behind=behind))
        return tuple(adopted), rest

    def _count_rest(self, stacks: Sequence[Stack]) -> dict[str, int]:
        """Return the parameters that stand in no part, by the module that holds them."""
        prefixes = [piece.name for stack in stacks for piece in (*stack.before, *stack.behind)]
        prefixes += [name for stack in stacks for group in stack.blocks for name in group.names()]
        rest: dict[str, int] = {}
        for name, size in self.sizes.items():
            if not any(name.startswith(f"{prefix}.") for prefix in prefixes):
                owner = name.rpartition(".")[0] or name
                rest[owner] = rest.get(owner, 0) + size
        return rest


def _count_kv_heads(blocks: Iterable[Blocks]) -> int | None:
    """Keys and values are what the first projections are wide beyond the queries; None where that is no number."""
    for group in blocks:
        for branch in group.branches("attention"):
            if branch.heads and branch.head_size:
                wide = sum(group.shapes[name][1] for name in branch.modules[:-1] if name in group.shapes)
                heads, rest = divmod(wide - branch.heads * branch.head_size, 2 * branch.head_size)
                return heads if not rest and 0 < heads < branch.heads else None
    return None


def describe_window(config: PretrainedConfig, causal: bool) -> str | None:
    """Return how far attention reaches where a configuration has a sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or [])
    sliding = sum(bool(re.search("sliding|local|chunked", kind)) for kind in kinds)
    if not window or (kinds and not sliding) or getattr(config, "use_sliding_window", True) is False:
        return None
    reach = f"window {window:,} tokens back" if causal else f"window {window:,} each way"
    return f"{reach} in {sliding} of {len(kinds)} layers" if kinds and sliding < len(kinds) else reach
