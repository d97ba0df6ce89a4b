"""How a block of a model is wired: where its residual path is left and joined, and what stands between.

It is read from the graph that autograd records of one forward pass on shapes: the path is followed from the block's
output to its input, and a sum is a residual one where one of its operands is an ancestor of the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

Kind = Literal["attention", "cross-attention", "feed-forward", "experts", "convolution"]
_ACTIVATIONS = {"Silu": "SiLU", "Gelu": "GELU", "Relu": "ReLU", "Sigmoid": "sigmoid", "Tanh": "tanh"}
_SPLITS = ("Split", "Unbind", "Slice", "Chunk")
_PRODUCT = re.compile("(?:Mm|mm|Convolution)Backward")


class UnknownWiringError(Exception):
    """The wiring of a block cannot be read from its graph."""


@dataclass(frozen=True)
class Norm:
    """A layer norm: its module below the block, and its kind."""

    module: str
    kind: str
    """LayerNorm, RMSNorm, or the name of its class."""


@dataclass(frozen=True)
class Branch:
    """What stands between leaving the residual path and joining it: norms, a part with weights, norms."""

    kind: Kind
    modules: tuple[str, ...]
    """Modules with weights that it multiplies by, below the block, in the order of use."""
    before: tuple[Norm, ...] = ()
    inner: tuple[Norm, ...] = ()
    """Norms between its products, such as those of queries and keys."""
    after: tuple[Norm, ...] = ()
    activation: str | None = None
    gated: bool = False
    """Whether it multiplies two projections with one another, as SwiGLU does."""
    heads: int | None = None
    head_size: int | None = None


@dataclass(frozen=True)
class Sublayer:
    """Branches that leave the residual path at one point and join it at one; more than one is a parallel block."""

    branches: tuple[Branch, ...]
    behind: tuple[Norm, ...] = ()
    """Norms on the residual path, after the sum: a post-norm block."""


@dataclass(frozen=True)
class Wiring:
    """A block from its input to its output."""

    sublayers: tuple[Sublayer, ...]
    entry: tuple[Norm, ...] = ()
    """Norms on the residual path before it is left for the first time."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the graph nodes of the tensors that went in and of the one that came out."""

    name: str
    module: nn.Module
    parents: tuple[str, ...]
    """The modules whose calls it is part of, from outside."""
    inputs: tuple[Node, ...]
    """The first is that of the hidden state."""
    output: Node | None
    shape: tuple[int, ...]
    """Of the (first) tensor that came out."""


@dataclass(frozen=True)
class Recording:
    """One forward pass: the calls of all modules in the order in which they began."""

    calls: Sequence[ModuleCall] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    """Of the model's parameters, by their `id`."""
    logits_shape: tuple[int, ...] = ()

    @property
    def norms(self) -> list[ModuleCall]:
        """The calls of norms."""
        return [
            call
            for call in self.calls
            if "norm" in type(call.module).__name__.lower()
            and not any(isinstance(part, nn.Linear) for part in call.module.modules())
        ]


def record(model: nn.Module, inputs: Mapping[str, object]) -> Recording:
    """Run a model once, with autograd's graph; it may be on the meta device."""
    calls: list[ModuleCall] = []
    running: list[tuple[int, tuple[Node, ...]]] = []

    def begin(name: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nodes = [part.grad_fn for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        parents = tuple(calls[index].name for index, _ in running)
        running.append((len(calls), tuple(node for node in nodes if node is not None)))
        calls.append(ModuleCall(name, module, parents, (), None, ()))

    def end(output: object) -> None:
        index, nodes = running.pop()
        tensor = next((part for part in tree_leaves(output) if isinstance(part, torch.Tensor)), None)
        if tensor is not None:
            calls[index] = replace(calls[index], inputs=nodes, output=tensor.grad_fn, shape=tuple(tensor.shape))

    with ExitStack() as hooks, torch.enable_grad():
        for name, module in model.named_modules():
            before = partial(begin, name)
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(lambda module, args, output: end(output)).remove)
        output = model(**inputs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Recording(calls, names, tuple(getattr(getattr(output, "logits", None), "shape", ())))


def norm_kind(call: ModuleCall) -> str:
    """Return the kind of a norm by what it computes: whether the mean is taken away before it divides."""
    names = {node.name() for node in _between(call)}
    if any(name.startswith(("NativeLayerNorm", "Sub")) for name in names):
        return "LayerNorm"
    rms = any(name.startswith(("Rsqrt", "Pow", "FusedRmsNorm")) for name in names)
    return "RMSNorm" if rms else type(call.module).__name__


def _between(call: ModuleCall) -> list[Node]:
    """Return the nodes of a call, those that came first in front; its inputs are not among them."""
    found: dict[Node, None] = {}
    stack = [call.output] if call.output is not None else []
    while stack:
        node = stack.pop()
        if node not in found and node not in call.inputs:
            found[node] = None
            stack += [source for source, _ in node.next_functions if source is not None]
    return sorted(found, key=lambda node: -1 if hasattr(node, "variable") else node._sequence_nr())


class _Graph:
    """The nodes of one call of a block, with the ancestors of each."""

    def __init__(self, call: ModuleCall, recording: Recording, encoder: Sequence[Node]) -> None:
        self.call, self.nodes = call, _between(call)
        self.encoder = [node for node in encoder if node is not call.inputs[0]]
        known = set(self.nodes)
        self.norms = {norm.output: norm for norm in recording.norms if norm.output is not None and norm.output in known}
        inside = {node for norm in self.norms.values() for node in _between(norm)}
        self.plain = [node for node in self.nodes if node not in inside]
        self.uses = Counter(source for node in self.nodes for source in sources_of(node))
        self.above: dict[Node, frozenset[Node]] = {}
        self.weights: dict[Node, str] = {}
        """The products with weights, and the module that holds these."""
        for node in self.nodes:
            sources = sources_of(node)
            self.above[node] = frozenset(sources).union(*(self.above.get(source, ()) for source in sources))
            if _PRODUCT.search(node.name()):
                origins = [getattr(_origin(source), "variable", None) for source in sources]
                names = [recording.names.get(id(origin), "") for origin in origins if origin is not None]
                own = [name.removeprefix(f"{call.name}.") for name in names if name.startswith(f"{call.name}.")]
                if own:  # the bias comes first, the matrix last
                    self.weights[node] = own[-1].rpartition(".")[0]

    def norm_at(self, node: Node) -> Norm:
        """Return the norm whose output a node is."""
        call = self.norms[node]
        return Norm(call.name.removeprefix(f"{self.call.name}."), norm_kind(call))

    def products(self, nodes: Collection[Node]) -> list[Node]:
        """Return the products with weights among nodes that depend on what the block reads, in their order."""
        return [n for n in self.nodes if n in nodes and n in self.weights and self.reads(n, self.call.inputs)]

    def reads(self, node: Node, sources: Sequence[Node]) -> bool:
        """Whether a node depends on one of the others."""
        return any(source in self.above[node] for source in sources)


def sources_of(node: Node) -> list[Node]:
    """Return the nodes that one reads."""
    return [source for source, _ in node.next_functions if source is not None]


def _origin(node: Node) -> Node:
    """Go up through operations that have one operand, such as a transposition."""
    while len(sources := sources_of(node)) == 1:
        (node,) = sources
    return node


def read_wiring(call: ModuleCall, recording: Recording, *, crosses: bool = False) -> Wiring:
    """Return the wiring of the block that `call` ran; `crosses`: whether it may read what an encoder gives.

    Raises UnknownWiringError where there is no single residual path from input to output.
    """
    if call.output is None or not call.inputs:
        raise UnknownWiringError("it computes nothing from what it reads")
    graph, at = _Graph(call, recording, call.inputs[1:] if crosses else ()), call.output
    sublayers: list[Sublayer] = []
    behind: list[Norm] = []
    while at is not call.inputs[0]:
        sources = sources_of(at)
        if at in graph.norms:
            behind.insert(0, graph.norm_at(at))
            at = graph.norms[at].inputs[0]
        elif at.name().startswith("Add") and len(sources) == 2:
            stream, branches = _split_sum(graph, at)
            passed = graph.above.get(stream, frozenset()) | {stream}
            spans = [(graph.above[branch] | {branch}) - passed for branch in branches]
            spans.sort(key=lambda span: graph.nodes.index(next(iter(graph.products(span)), at)))
            sublayers.insert(0, Sublayer(tuple(_read_branch(graph, stream, span) for span in spans), tuple(behind)))
            at, behind = stream, []
        elif len(sources) == 1 and at in graph.above:
            (at,) = sources
        else:
            what = f"{graph.weights[at]} stands in the way" if at in graph.weights else "there is more than one path"
            raise UnknownWiringError(f"no residual path was found: {what}")
    if not sublayers:
        raise UnknownWiringError("no residual path was found")
    return Wiring(tuple(sublayers), tuple(behind))


def _split_sum(graph: _Graph, at: Node) -> tuple[Node, list[Node]]:
    """Return the residual path and the branches that a sum joins; a sum that only this one reads is a part of it."""
    operands = _flatten(graph, at)
    streams = [one for one in operands if all(_passed(graph, one, other) for other in operands if other is not one)]
    if len(streams) != 1:
        raise UnknownWiringError("no residual path was found: a sum joins more than one path")
    return streams[0], [one for one in operands if one is not streams[0]]


def _passed(graph: _Graph, first: Node, last: Node) -> bool:
    """Whether the way from one node to another leads through a product with weights."""
    while first not in graph.norms and first not in graph.call.inputs and len(sources_of(first)) == 1:
        (first,) = sources_of(first)
    return any(first in graph.above[product] for product in graph.products(graph.above.get(last, frozenset()) | {last}))


def _flatten(graph: _Graph, at: Node) -> list[Node]:
    operands: list[Node] = []
    for source in sources_of(at):
        whole = source.name().startswith("Add") and len(sources_of(source)) == 2 and graph.uses[source] == 1
        part = whole and source in graph.plain and bool(graph.products(graph.above[source]))
        operands += _flatten(graph, source) if part else [source]
    return operands


def _read_branch(graph: _Graph, stream: Node, span: frozenset[Node]) -> Branch:
    products = graph.products(span)
    if not products:
        raise UnknownWiringError("a branch has no weights")
    modules = tuple(dict.fromkeys(graph.weights[node] for node in products))
    before, inner, after = _sort_norms(graph, span, products)
    steps = [node for node in graph.plain if node in span]
    scores = [node for node in steps if _PRODUCT.search(node.name()) and node not in graph.weights]
    if scores:  # products of activations
        crosses = any(graph.reads(node, graph.encoder) and not graph.reads(node, [stream]) for node in products)
        kind: Kind = "cross-attention" if crosses else "attention"
        softmax = next((node for node in steps if node.name().startswith("Softmax")), None)
        heads = None if softmax is None else _shape(softmax)[-3]
        return Branch(kind, modules, before, inner, after, None, False, heads, _shape(sources_of(scores[0])[0])[-1])
    kind = "feed-forward"
    if any(node.name().startswith("Convolution") for node in products):
        kind = "convolution"
    elif any(node.name().startswith("Bmm") for node in products):
        kind = "experts"
    return Branch(kind, modules, before, inner, after, _find_activation(steps), _is_gated(graph, steps, set(products)))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _find_activation(steps: Sequence[Node]) -> str | None:
    used = {node.name() for node in steps}
    found = next((word for name, word in _ACTIVATIONS.items() if f"{name}Backward0" in used), None)
    if found == "tanh" and any(
        node.name().startswith("Add") and any(source.name().startswith("Tanh") for source in sources_of(node))
        for node in steps
    ):
        return "GELU"  # 1 + tanh(...), as GPT-2 approximates it
    return found


def _sort_norms(graph: _Graph, span: frozenset[Node], products: Sequence[Node]) -> tuple[tuple[Norm, ...], ...]:
    """Return the norms of a branch: before all of its products with weights, between them, behind all of them."""
    places: tuple[list[Norm], ...] = ([], [], [])
    for node in (node for node in graph.nodes if node in graph.norms and node in span):
        fed = any(product in graph.above[node] for product in products)
        feeds = any(node in graph.above[product] for product in products)
        places[0 if not fed else 1 if feeds else 2].append(graph.norm_at(node))
    return tuple(map(tuple, places))


def _is_gated(graph: _Graph, steps: Sequence[Node], products: set[Node]) -> bool:
    """Whether two projections are multiplied, be they of two matrices or the halves of one."""
    halves = {node for node in steps if node.name().startswith(_SPLITS) and graph.above[node] & products}
    for node in (node for node in steps if node.name().startswith("Mul") and len(sources_of(node)) == 2):
        first, second = (graph.above.get(source, frozenset()) | {source} for source in sources_of(node))
        if first & products and second & products and ((first ^ second) & products or (first | second) & halves):
            return True
    return False
