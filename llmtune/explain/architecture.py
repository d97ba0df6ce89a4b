"""The parts of a model as a person draws them: embeddings, positions, stacks of blocks, norms, heads."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.modules.conv import _ConvNd

from llmtune.explain.block_structure import Branch, Norm, UnknownWiringError, Wiring, name_norm, read_wiring
from llmtune.explain.meta_model import Blueprint, UntraceableError
from llmtune.explain.op_trace import Call, Trace
from llmtune.explain.orders import BIASES, find_orders
from llmtune.explain.target import Subject
from llmtune.model.config import linear_shapes
from llmtune.model.memory_plan import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["embedding", "positions", "norm", "linear", "convolutions", "other"]


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
    """A model, drawn from its configuration and from what it computes."""

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

    def as_facts(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def describe_model(subject: Subject, blueprint: Blueprint) -> Architecture:
    """Describe the model of `subject`; every parameter is counted in exactly one part."""
    model = blueprint.model
    config, context = model.config.get_text_config(), context_length(model.config)
    try:
        trace, reason = blueprint.trace, None
    except UntraceableError as error:
        trace, reason = Trace(), str(error)
    survey = _Survey(model, trace)
    stacks, rest = survey.adopt_shared([survey.describe_stack(name, subject.family) for name in survey.lists])
    return Architecture(
        name=subject.name,
        model_class=type(model).__name__,
        model_type=str(config.model_type),
        family=subject.family,
        parameters=model.num_parameters(),
        width=getattr(config, "hidden_size", None),
        vocabulary=getattr(config, "vocab_size", None),
        context=context if context and context > 0 else None,
        tied_head=any(piece.tied_to for stack in stacks for piece in stack.behind),
        stacks=stacks,
        other=rest,
        scores_text=len(trace.scores) == 2,
        untraced=reason,
    )


class _Survey:
    """A model and its trace, with who owns which parameter."""

    def __init__(self, model: PreTrainedModel, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.modules = dict(model.named_modules())
        self.sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.first = {id(parameter): name for name, parameter in model.named_parameters()}
        self.linears = linear_shapes(model)
        self.lists = self._find_lists()

    def _find_lists(self) -> list[str]:
        """Return the names of the lists of blocks, in the order in which they run; the outermost alone."""
        attending = {call.module for call in self.trace.calls if self._attends(call)}
        found: list[str] = []
        for call in self.trace.calls:
            parent, _, number = call.module.rpartition(".")
            blocks = isinstance(self.modules.get(parent), torch.nn.ModuleList) and number.isdigit()
            inside = any(f"{parent}.".startswith(f"{outer}.") for outer in found)
            if blocks and call.module in attending and not inside:
                found.append(parent)
        return found or ([] if self.trace.calls else [self._longest_list()])

    def _attends(self, call: Call) -> bool:
        return any(step.product == "activations" for step in self.trace.operations[call.start : call.end])

    def _longest_list(self) -> str:
        """The blocks of a model that could not be run: its longest list."""
        lists = {name: len(found) for name, found in self.modules.items() if isinstance(found, torch.nn.ModuleList)}
        return max(lists, key=lambda name: lists[name], default="")

    def calls_of(self, name: str) -> list[Call]:
        """Return the calls of a list's blocks."""
        return [call for call in self.trace.calls if call.module.rpartition(".")[0] == name]

    def describe_stack(self, name: str, family: str) -> Stack:
        """Describe the stack whose blocks are in the list `name`."""
        owner = name.rpartition(".")[0]
        role = next((half for half in ("encoder", "decoder") if half in owner.split(".")), None)
        word = role if family == "encoder-decoder" and role else family if len(self.lists) == 1 else owner
        before, behind = self._find_pieces(name)
        blocks = tuple(self._group_blocks(name))
        config = self._config_of(owner)
        return Stack(
            name=word,
            causal=word == "decoder",
            orders=find_orders(self.model, config, owner, [piece.name for piece in before]),
            before=before,
            blocks=blocks,
            behind=behind,
            window=describe_window(config, word == "decoder"),
            kv_heads=self._count_kv_heads(blocks),
        )

    def _config_of(self, owner: str) -> Any:
        module = self.modules.get(owner)
        return getattr(module, "config", None) or self.model.config.get_text_config()

    def _group_blocks(self, name: str) -> Iterator[Blocks]:
        """Yield runs of blocks that are wired alike, with matrices of the same shapes."""
        blocks = self.modules[name] if name else []
        calls: dict[str, list[Call]] = {}
        for call in self.calls_of(name):
            calls.setdefault(call.module, []).append(call)
        groups: list[tuple[Any, list[int]]] = []
        for number in range(len(blocks)):
            block = f"{name}.{number}"
            key = (*self._read_wiring(calls.get(block, [])), self._shapes_of(block), len(calls.get(block, [])))
            if not groups or groups[-1][0] != key:
                groups.append((key, []))
            groups[-1][1].append(number)
        for (wiring, unknown, shapes, runs), numbers in groups:
            own = [self._weights_of(f"{name}.{number}") for number in numbers]
            common = set.intersection(*map(set, own))
            extras = sorted({weight.rpartition(".")[0] for weights in own for weight in set(weights) - common})
            totals = [sum(weights.values()) for weights in own]
            sizes: dict[str, int] = {}
            for weight, size in own[-1].items():
                sizes[weight.rpartition(".")[0]] = sizes.get(weight.rpartition(".")[0], 0) + size
            first = f"{name}.{numbers[0]}"
            yield Blocks(first, (*numbers,), runs, wiring, unknown, shapes, sizes, sum(totals), totals[-1], (*extras,))

    def _read_wiring(self, calls: Sequence[Call]) -> tuple[Wiring | None, str | None]:
        if not calls:
            return None, "it is not run for a text"
        try:
            return read_wiring(self.trace, calls[0]), None
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
            elif (
                parameter.ndim == 2 and last == "weight" and owner not in shapes and owner.split(".")[-1] not in BIASES
            ):
                shapes[owner] = (parameter.shape[1], parameter.shape[0])  # a router
        return shapes

    def _weights_of(self, prefix: str) -> dict[str, int]:
        start = f"{prefix}."
        return {name.removeprefix(start): size for name, size in self.sizes.items() if name.startswith(start)}

    def _count_kv_heads(self, blocks: Iterable[Blocks]) -> int | None:
        """Keys and values are what the first projections are wide beyond the queries; None where that is no number."""
        for group in blocks:
            for branch in branches_of(group, "attention"):
                if branch.heads and branch.head_size:
                    wide = sum(group.shapes[name][1] for name in branch.modules[:-1] if name in group.shapes)
                    heads, rest = divmod(wide - branch.heads * branch.head_size, 2 * branch.head_size)
                    return heads if not rest and 0 < heads < branch.heads else None
        return None

    def _find_pieces(self, name: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Return the parts of a stack before its first block and behind its last one."""
        blocks = self.calls_of(name)
        if not blocks:
            return (), ()
        found: dict[str, tuple[Piece, bool]] = {}
        for index, call in enumerate(self.trace.calls):
            if self._stack_of(index) != name or not self._is_leaf(index):
                continue
            piece = self._describe_piece(call)
            if piece is not None and piece.name not in found:
                found[piece.name] = (piece, call.start < blocks[0].start)
        before, behind = ([piece for piece, early in found.values() if early is side] for side in (True, False))
        return tuple(before), tuple(behind)

    def _stack_of(self, index: int) -> str | None:
        """Say which stack a call belongs to: that of the half it is part of, else the last one; blocks are apart."""
        path = [self.trace.calls[call].module for call in self.trace.path(index)]
        for name in self.lists:
            if any(module.rpartition(".")[0] == name for module in path):
                return None
        for name in self.lists:
            owner = name.rpartition(".")[0]
            if (
                len(self.lists) > 1
                and owner in path
                and not any(o.startswith(f"{owner}.") for o in self.lists if o != name)
            ):
                return name
        return self.lists[-1] if len(self.lists) > 0 else None

    def _is_leaf(self, index: int) -> bool:
        """Whether a call is drawn as one: a known kind of layer, or a module without calls of its own."""
        call = self.trace.calls[index]
        module = self.modules[call.module]
        plain = (torch.nn.Linear, torch.nn.Embedding, _ConvNd)
        above = [self.modules[self.trace.calls[i].module] for i in list(self.trace.path(index))[1:]]
        if any(isinstance(found, plain) for found in above):
            return False
        return isinstance(module, plain) or all(later.parent != index for later in self.trace.calls[index + 1 :])

    def _describe_piece(self, call: Call) -> Piece | None:
        """Describe a leaf; None for what has no weights and is no matter of positions, such as an activation."""
        name, module = call.module, self.modules[call.module]
        lists = [i for i, part in enumerate(name.split(".")) if part.isdigit()]
        if lists and isinstance(module, _ConvNd | torch.nn.LayerNorm | torch.nn.GroupNorm):
            parent = ".".join(name.split(".")[: lists[0]])  # convolutions before the blocks are drawn as one
            count, size = len(self.modules[parent]), sum(self._weights_of(parent).values())
            return Piece(parent, "convolutions", f"{count} convolutions", (), size)
        own = {f"{name}.{key}": value for key, value in module.named_parameters()}
        last = name.rpartition(".")[2].lower()
        positions = "pos" in last or last in ("wpe", "rel_embeddings") or "rotary" in call.kind.lower()
        if not own and not positions:
            return None
        held = {key: self.first.get(id(value), key) for key, value in own.items()}
        tied = next((first for key, first in held.items() if first != key), None)
        size = sum(self.sizes.get(key, 0) for key in own)
        shape = self.linears.get(name) or tuple(getattr(module, "weight", torch.empty(0)).shape)
        kind, about = self._name_kind(call, module, positions)
        steps = self.trace.operations[call.start : call.end]
        once = any(step.product == "weights" and math.prod(step.shape[:-1]) == 1 for step in steps)
        return Piece(name, kind, about, shape, size, tied.rpartition(".")[0] if tied else None, once)

    def _name_kind(self, call: Call, module: torch.nn.Module, positions: bool) -> tuple[Kind, str]:
        if positions:
            return "positions", call.kind
        if "norm" in call.kind.lower():
            live = [i for i in range(call.start, call.end) if self.trace.operations[i].live]
            return "norm", name_norm(call.kind, self.trace, live)
        if call.module in self.linears:
            return "linear", call.kind
        if isinstance(module, _ConvNd):
            return "convolutions", f"convolution over {module.kernel_size[0]}, every {module.stride[0]}"
        return ("embedding", call.kind) if isinstance(module, torch.nn.Embedding) else ("other", call.kind)

    def adopt_shared(self, stacks: Sequence[Stack]) -> tuple[tuple[Stack, ...], dict[str, int]]:
        """Give a table that only others use (T5's `shared`) to the first part that does; return the rest as well."""
        rest = self._count_rest(stacks)
        owners: dict[str, str] = {}

        def settle(piece: Piece) -> Piece:
            held = piece.tied_to
            if held in rest:
                owners[held] = piece.name
                return replace(piece, parameters=piece.parameters + rest.pop(held), tied_to=None)
            return replace(piece, tied_to=owners.get(held or "", held))

        settled = []
        for stack in stacks:
            before, behind = (tuple(map(settle, pieces)) for pieces in (stack.before, stack.behind))
            settled.append(replace(stack, before=before, behind=behind))
        return tuple(settled), rest

    def _count_rest(self, stacks: Sequence[Stack]) -> dict[str, int]:
        """Return the parameters that stand in no part, by the module that holds them."""
        prefixes = [piece.name for stack in stacks for piece in (*stack.before, *stack.behind)]
        prefixes += [
            f"{group.first.rpartition('.')[0]}.{number}"
            for stack in stacks
            for group in stack.blocks
            for number in group.numbers
        ]
        rest: dict[str, int] = {}
        for name, size in self.sizes.items():
            if not any(name.startswith(f"{prefix}.") for prefix in prefixes):
                owner = name.rpartition(".")[0] or name
                rest[owner] = rest.get(owner, 0) + size
        return rest


def branches_of(group: Blocks, kind: str | None = None) -> list[Branch]:
    """Return the branches of a group's blocks, in their order; those of one kind where it is named."""
    sublayers = group.wiring.sublayers if group.wiring else ()
    return [branch for sublayer in sublayers for branch in sublayer.branches if kind in (None, branch.kind)]


def norms_of(group: Blocks) -> list[Norm]:
    """Return the norms of a group's blocks; one that two branches share comes twice."""
    if group.wiring is None:
        return []
    found = list(group.wiring.entry)
    for sublayer in group.wiring.sublayers:
        for branch in sublayer.branches:
            found += [*branch.before, *branch.inner, *branch.after]
        found += sublayer.behind
    return found


def describe_window(config: Any, causal: bool) -> str | None:
    """Say how far attention reaches where a configuration has a sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or [])
    sliding = sum(bool(re.search("sliding|local|chunked", kind)) for kind in kinds)
    if not window or (kinds and not sliding) or getattr(config, "use_sliding_window", True) is False:
        return None
    reach = f"window {window:,} tokens back" if causal else f"window {window:,} each way"
    return f"{reach} in {sliding} of {len(kinds)} layers" if kinds and sliding < len(kinds) else reach
