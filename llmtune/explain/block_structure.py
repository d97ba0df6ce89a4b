"""How a block of a model is wired: where its residual path is left and joined, and what stands between.

Read off a trace, not off names: a sum is a residual one where one of its operands is an ancestor of another by way of a
product with weights. A norm stands before a part, behind it, or on the residual path itself.

Sets of operations are integers: bit i stands for the operation at `start + i`, higher bits for what comes from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from llmtune.explain.op_trace import Call, Operation, Trace

Kind = Literal["attention", "cross-attention", "feed-forward", "experts", "convolution"]
_ADDITIONS = ("aten.add", "aten.add_")
_SAME = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten._to_copy", "aten.clone", "aten.alias", "aten.detach")
_SCALED = ("aten.mul", "aten.mul_", "aten.div", "aten.div_")
_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.unbind", "aten.slice")
_ACTIVATIONS = {
    "aten.silu": "SiLU",
    "aten.gelu": "GELU",
    "aten.relu": "ReLU",
    "aten.sigmoid": "sigmoid",
    "aten.tanh": "tanh",
}


class UnknownWiringError(Exception):
    """The wiring of a block cannot be told from what it computes."""


@dataclass(frozen=True)
class Norm:
    """A layer norm: where it is in its block, and of which kind."""

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

    @property
    def shared(self) -> tuple[Norm, ...]:
        """The norms that all branches have before them, where these are the same."""
        first = self.branches[0].before
        return first if all(branch.before == first for branch in self.branches) else ()


@dataclass(frozen=True)
class Wiring:
    """A block from its input to its output."""

    sublayers: tuple[Sublayer, ...]
    entry: tuple[Norm, ...] = ()
    """Norms on the residual path before it is left for the first time."""


@dataclass(frozen=True)
class _Sum:
    """Where branches join the residual path; all three are operations."""

    at: int
    stream: int
    branches: tuple[int, ...]


class _Block:
    """The operations of one call of a block, with the ancestors of each."""

    def __init__(self, trace: Trace, call: Call) -> None:
        self.trace, self.name, self.start, self.end = trace, call.module, call.start, call.end
        self.outside: dict[int, int] = {}
        self.ancestors: list[int] = []
        self.heavy: list[int] = []
        """Ancestors from which the way leads through a product with weights."""
        for operation in trace.operations[self.start : self.end]:
            above = heavy = 0
            for source in operation.sources:
                above |= self.above(source)
                heavy |= self.heavy[source - self.start] if source >= self.start else 0
            self.ancestors.append(above)
            self.heavy.append(above if operation.product == "weights" else heavy)
        self.norms = list(_find_norms(self))
        self.normal = {i for _, inside in self.norms for i in inside}

    def __getitem__(self, operation: int) -> Operation:
        return self.trace.operations[operation]

    def bit(self, operation: int) -> int:
        """The set that holds one operation."""
        if operation >= self.start:
            return 1 << (operation - self.start)
        return 1 << (self.end - self.start + self.outside.setdefault(operation, len(self.outside)))

    def above(self, operation: int) -> int:
        """An operation and its ancestors as far as they lie in this block, and what it reads from outside."""
        return self.bit(operation) | (self.ancestors[operation - self.start] if operation >= self.start else 0)

    def members(self, within: int) -> list[int]:
        """Return the operations of a set that lie in this block, in their order."""
        return [i for i in range(self.start, self.end) if within & self.bit(i)]

    def first_product(self, within: int) -> int:
        """Return the first product with weights of a set, or the end of the block."""
        return next((i for i in self.members(within) if self[i].product == "weights"), self.end)

    def resolve(self, operation: int, names: Sequence[str]) -> int:
        """Go up through operations that only pass on what they are given, but not into a norm."""
        while operation >= self.start and operation not in self.normal:
            step = self[operation]
            if step.name not in names or len(step.sources) != 1:
                break
            operation = step.sources[0]
        return operation

    def leads(self, first: int, last: int) -> bool:
        """Whether the way from one operation to another leads through weights."""
        origin = self.resolve(first, (*_SAME, *_SCALED))
        return last >= self.start and bool(self.heavy[last - self.start] & self.bit(origin))


def read_wiring(trace: Trace, call: Call) -> Wiring:
    """Return the wiring of the block that `call` ran.

    Raises UnknownWiringError where there is no residual path, or something with weights stands beside it.
    """
    block = _Block(trace, call)
    sums = _find_sums(block)
    spans = [
        sorted((block.above(branch) & ~block.above(found.stream) for branch in found.branches), key=block.first_product)
        for found in sums
    ]
    covered = 0
    for span in (span for group in spans for span in group):
        covered |= span
    for i in range(block.start, block.end):
        if block[i].product is not None and block[i].live and not covered & block.bit(i):
            raise UnknownWiringError(f"{', '.join(block[i].weights) or 'a product'} stands beside the residual path")
    entry, behind = _place_norms(block, sums, covered)
    sublayers = [
        Sublayer(tuple(_read_branch(block, found.stream, span) for span in group), tuple(norms))
        for found, group, norms in zip(sums, spans, behind, strict=True)
    ]
    return Wiring(tuple(sublayers), tuple(entry))


def _find_norms(block: _Block) -> Iterator[tuple[Norm, list[int]]]:
    end = 0
    for call in block.trace.calls:
        if not (block.start <= call.start and call.end <= block.end) or "norm" not in call.kind.lower():
            continue
        live = [i for i in range(call.start, call.end) if block[i].live]
        layer = any(block[i].product for i in live)  # Wav2Vec2EncoderLayerStableLayerNorm is none
        if live and not layer and call.start >= end:  # else it is a part of the one before
            end = call.end
            yield Norm(call.module.removeprefix(f"{block.name}."), name_norm(call.kind, block.trace, live)), live


def name_norm(kind: str, trace: Trace, operations: Sequence[int]) -> str:
    """Name a norm by what it computes: whether the mean is taken away before it divides."""
    names = {trace.operations[i].name for i in operations}
    if "aten.native_layer_norm" in names:
        return "LayerNorm"
    if not names & {"aten.rsqrt", "aten.pow", "aten._fused_rms_norm"}:
        return kind
    return "LayerNorm" if "aten.sub" in names else "RMSNorm"


def _find_sums(block: _Block) -> list[_Sum]:
    """Find the sums at which branches join the residual path, in their order; sums of several steps count as one.

    Raises UnknownWiringError where they do not follow one another on one path.
    """
    found: list[_Sum] = []
    taken: set[int] = set()
    for at in range(block.end - 1, block.start - 1, -1):
        if at in taken or not _adds(block, at):
            continue
        operands = _flatten(block, at, taken)
        streams = [a for a in operands if any(block.leads(a, b) for b in operands if b != a)]
        if not streams:
            continue
        branches = tuple(operand for operand in operands if operand != streams[0])
        if len(streams) > 1 or not all(block.leads(streams[0], branch) for branch in branches):
            raise UnknownWiringError("a sum joins more than one path")
        found.insert(0, _Sum(at, streams[0], branches))
    if not found:
        raise UnknownWiringError("no residual path was found")
    for before, after in pairwise(found):
        if not block.above(after.stream) & block.bit(before.at):
            raise UnknownWiringError("there is more than one residual path")
    return found


def _adds(block: _Block, at: int) -> bool:
    step = block[at]
    same = len(step.inputs) == 2 and step.inputs[0] == step.inputs[1] == step.shape
    return step.name in _ADDITIONS and len(step.sources) == 2 and same and at not in block.normal


def _flatten(block: _Block, at: int, taken: set[int]) -> list[int]:
    """Return what a sum adds up; a sum that only this one reads is a step of it, and is marked as taken."""
    operands = []
    for source in block[at].sources:
        origin, uses = source, block.trace.uses
        while origin >= block.start and uses[origin] == 1 and block[origin].name in _SAME:
            (origin,) = block[origin].sources
        if origin >= block.start and uses[origin] == 1 and _adds(block, origin):
            taken.add(origin)
            operands += _flatten(block, origin, taken)
        else:
            operands.append(source)
    return operands


def _place_norms(block: _Block, sums: Sequence[_Sum], covered: int) -> tuple[list[Norm], list[list[Norm]]]:
    """Return the norms on the residual path: those before the first sum, and those behind each."""
    entry: list[Norm] = []
    behind: list[list[Norm]] = [[] for _ in sums]
    for norm, inside in block.norms:
        if covered & block.bit(inside[0]):
            continue
        above = block.above(inside[0])
        passed = sum(bool(above & block.bit(found.at)) for found in sums)
        if passed < len(sums) and not block.above(sums[passed].stream) & block.bit(inside[-1]):
            raise UnknownWiringError(f"{norm.module} stands beside the residual path")
        (behind[passed - 1] if passed else entry).append(norm)
    return entry, behind


def _read_branch(block: _Block, stream: int, span: int) -> Branch:
    steps = block.members(span)
    products = [i for i in steps if block[i].product == "weights"]
    names = dict.fromkeys(name for i in products for name in block[i].weights if name.startswith(f"{block.name}."))
    modules = dict.fromkeys(name.removeprefix(f"{block.name}.").rpartition(".")[0] for name in names)
    before, inner, after = _sort_norms(block, span, products)
    attends = [i for i in steps if block[i].product == "activations"]
    plain = [i for i in steps if i not in block.normal]
    if not products:
        raise UnknownWiringError("a branch has no weights")
    if attends:
        origin = block.bit(block.resolve(stream, (*_SAME, *_SCALED)))
        elsewhere = any(not block.above(i) & origin for i in products)
        heads = next((_count_heads(block[i].shape) for i in steps if block[i].name == "aten._softmax"), None)
        kind: Kind = "cross-attention" if elsewhere else "attention"
        return Branch(kind, (*modules,), before, inner, after, None, False, heads, block[attends[0]].inputs[-2][-1])
    kind = "feed-forward"
    if any("convolution" in block[i].name for i in products):
        kind = "convolution"
    elif any("bmm" in block[i].name for i in products):
        kind = "experts"
    return Branch(
        kind, (*modules,), before, inner, after, _find_activation(block, plain), _is_gated(block, plain, products)
    )


def _find_activation(block: _Block, steps: Sequence[int]) -> str | None:
    used = {block[i].name for i in steps}
    found = next((word for name, word in _ACTIVATIONS.items() if name in used), None)
    if found == "tanh" and any(
        block[i].name == "aten.add" and block[source].name == "aten.tanh" for i in steps for source in block[i].sources
    ):
        return "GELU"  # 1 + tanh(...), as GPT-2 approximates it
    return found


def _count_heads(shape: tuple[int, ...]) -> int:
    """Of weights [1, heads, T, S], or [heads, T, S] where a model folds its heads into the batch, which is one text."""
    return shape[-3]


def _sort_norms(block: _Block, span: int, products: Sequence[int]) -> tuple[tuple[Norm, ...], ...]:
    """Return the norms of a branch: before all of its products with weights, between them, behind all of them."""
    sorted_norms: tuple[list[Norm], ...] = ([], [], [])
    for norm, inside in block.norms:
        if span & block.bit(inside[0]):
            fed = any(block.above(inside[0]) & block.bit(product) for product in products)
            feeds = any(block.above(product) & block.bit(inside[-1]) for product in products)
            sorted_norms[0 if not fed else 1 if feeds else 2].append(norm)
    return tuple(map(tuple, sorted_norms))


def _is_gated(block: _Block, steps: Sequence[int], products: Sequence[int]) -> bool:
    """Whether two projections are multiplied, be they of two matrices or the halves of one."""
    weighed = halves = 0
    for i in steps:
        if i in products:
            weighed |= block.bit(i)
        elif block[i].name in _SPLITS and block.above(i) & weighed:
            halves |= block.bit(i)
    for i in steps:
        step = block[i]
        if step.name in _SCALED and len(step.sources) == 2 and step.inputs[0] == step.inputs[1]:
            first, second = (block.above(source) for source in step.sources)
            if first & weighed and second & weighed and ((first ^ second) & weighed or (first & second) & halves):
                return True
            if (first ^ second) & halves:
                return True
    return False
