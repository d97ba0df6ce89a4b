"""What a model computes, operation by operation: who reads whose result, in which module, at what cost.

Nothing of it needs weights: shapes are enough, so a model on the meta device is traced in milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

Product = Literal["weights", "activations"]
_PICKS = ("aten.index", "aten.index_select", "aten.gather")
"""Operations that take a part of their first operand, such as the experts that a token is sent to."""


@dataclass(frozen=True)
class Operation:
    """One operation of a forward pass."""

    name: str
    """As torch names it, without the overload: `aten.addmm`."""
    call: int
    """Index of the innermost module call that it is part of."""
    live: bool
    """Whether it depends on what the model reads; if not, it is the same for every text."""
    sources: tuple[int, ...]
    """Indices of the live operations whose results it reads."""
    weights: tuple[str, ...]
    """Names of the parameters that it reads, be it through operations that are not live, such as a transposition."""
    shape: tuple[int, ...]
    """Of its (first) result."""
    inputs: tuple[tuple[int, ...], ...]
    """Shapes of what it reads."""
    product: Product | None
    """A product with weights, or of two activations, as in attention; None where it is no matrix product."""
    flops: int


@dataclass
class Call:
    """One call of a module; `start` and `end` are a half-open range of operations."""

    module: str
    kind: str
    """Name of the module's class."""
    parent: int
    start: int
    end: int = 0


@dataclass
class Trace:
    """A forward pass: its operations and module calls, in the order in which they began."""

    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    scores: tuple[int, ...] = ()
    """Shape of the `logits` that came out, if any did."""

    @cached_property
    def uses(self) -> Counter[int]:
        """How many operations read the result of each."""
        return Counter(source for operation in self.operations for source in operation.sources)

    def path(self, call: int) -> Iterator[int]:
        """Yield a call, and those that it is part of, from within."""
        while call >= 0:
            yield call
            call = self.calls[call].parent


def trace_forward(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], **settings: Any) -> Trace:
    """Run `model` once, without gradients, and return what it did.

    Args:
        model: on the meta device or a real one, in eval mode.
        inputs: what it reads, by the names of its forward; everything that follows from these is live.
        settings: other arguments of its forward.

    Raises whatever the model raises where it cannot be run like this.
    """
    trace = Trace()
    recorder = _Recorder(trace, dict(model.named_parameters()), inputs.values())
    with torch.no_grad(), _following(model, trace), recorder:
        out = model(**inputs, **settings)
    trace.scores = tuple(getattr(getattr(out, "logits", None), "shape", ()))
    return trace


@contextmanager
def _following(model: torch.nn.Module, trace: Trace) -> Iterator[None]:
    """Write down each call of a module while it runs."""
    stack: list[int] = []

    def begin(name: str, module: torch.nn.Module) -> None:
        parent = stack[-1] if stack else -1
        trace.calls.append(Call(name, type(module).__name__, parent, len(trace.operations)))
        stack.append(len(trace.calls) - 1)

    def end() -> None:
        trace.calls[stack.pop()].end = len(trace.operations)

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _, name=name: begin(name, module)))
        hooks.append(module.register_forward_hook(lambda *_: end()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation. All tensors are kept until the end, so that no identity is used twice."""

    def __init__(self, trace: Trace, parameters: Mapping[str, torch.Tensor], inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.kept: list[torch.Tensor] = []
        self.maker: dict[int, int] = {}
        self.weights: dict[int, tuple[str, ...]] = {id(tensor): (name,) for name, tensor in parameters.items()}
        for tensor in inputs:
            self._append(tensor, Operation("input", 0, True, (), (), tuple(tensor.shape), (), None, 0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            whole = func.decompose(*args, **kwargs)
        if whole is not NotImplemented:
            return whole
        out = func(*args, **kwargs)
        read = [part for part in tree_iter((args, kwargs)) if isinstance(part, torch.Tensor)]
        results = [part for part in tree_iter(out) if isinstance(part, torch.Tensor)]
        if results:
            self._record(func, args, kwargs, out, read, results)
        return out

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        read: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        packet = func._overloadpacket
        weights = tuple(dict.fromkeys(name for part in read for name in self.weights.get(id(part), ())))
        sources = tuple(dict.fromkeys(self.maker[id(part)] for part in read if id(part) in self.maker))
        if str(packet) in _PICKS and read and self.weights.get(id(read[0])):
            sources = ()
        product: Product | None = None
        flops = 0
        if packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
            operands = read[-2:] if len(read) > 2 and "convolution" not in str(packet) else read[:2]
            product = "activations" if all(id(part) in self.maker for part in operands) else "weights"
        operation = Operation(
            str(packet),
            self._innermost(),
            bool(sources),
            sources,
            weights,
            tuple(results[0].shape),
            tuple(tuple(part.shape) for part in read),
            product,
            flops,
        )
        for result in results:
            self._append(result, operation, new=result is results[0])

    def _append(self, tensor: torch.Tensor, operation: Operation, new: bool = True) -> None:
        if new:
            self.trace.operations.append(operation)
        self.kept.append(tensor)
        if operation.live:
            self.maker[id(tensor)] = len(self.trace.operations) - 1
            self.weights.pop(id(tensor), None)
        elif operation.weights:
            self.weights[id(tensor)] = operation.weights

    def _innermost(self) -> int:
        """The last call that has not ended: an end is written when the call is over, and is 0 before."""
        call = len(self.trace.calls) - 1
        while call >= 0 and self.trace.calls[call].end:
            call = self.trace.calls[call].parent
        return call
