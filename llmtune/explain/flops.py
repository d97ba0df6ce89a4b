"""What a forward pass costs: floating-point operations by part, exact at every length.

A trace on shapes counts them at three lengths; the cost of each part is the polynomial through these, a + b L + c L²:
products with weights grow with L, those of attention with L². A fourth length must agree. A product of [M, K] with
[K, N] costs 2 M K N, as torch's FlopCounterMode counts; sums, norms and softmax are left out, as is usual. Attention is
counted over all pairs of positions, those that a mask hides as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile
from typing import Any

from llmtune.explain.architecture import Architecture, branches_of
from llmtune.explain.meta_model import Blueprint, UntraceableError
from llmtune.explain.op_trace import Operation, Trace

COUNTED, CHECKED = (16, 23, 41), 1021
"""Lengths in tokens at which products are counted, and at which the formula is held against the count; odd
ones, which blocks of a fixed size do not divide."""
PAIRS = ("attention", "cross-attention")
"""Parts that multiply activations with one another: queries with keys, weights with values."""
Polynomial = tuple[int, int, int]
"""a, b and c of a + b L + c L²."""
NOTHING: Polynomial = (0, 0, 0)


class UncountableError(Exception):
    """The cost of a model is no polynomial of the length, or it cannot be run on shapes."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one forward pass over L tokens, in both halves of an encoder-decoder."""

    parts: dict[str, dict[str, Polynomial]]
    """By stack and part: attention and cross-attention are products of activations, all others have weights."""

    def sum(self, stack: str | None = None, *, pairs: bool | None = None) -> Polynomial:
        """Add up parts: of one stack or all, of attention's own products, of all others, or both."""
        chosen = [
            polynomial
            for name, parts in self.parts.items()
            for part, polynomial in parts.items()
            if stack in (None, name) and pairs in (None, part in PAIRS)
        ]
        a, b, c = (sum(values) for values in zip(NOTHING, *chosen, strict=True))
        return a, b, c

    def crossing(self) -> int | None:
        """Return the length from which attention's own products cost more than all else; None where there is none."""
        pairs, others = self.sum(pairs=True), self.sum(pairs=False)
        if value(pairs, 1) >= value(others, 1) or not pairs[2]:
            return None
        low, high = 1, 2
        while value(pairs, high) < value(others, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if value(pairs, middle) < value(others, middle) else (low, middle)
        return high

    def as_facts(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Return all of it as JSON values, with numbers at some lengths."""
        total, pairs = self.sum(), self.sum(pairs=True)
        return {
            "formula": "a + b L + c L^2 floating-point operations over L tokens",
            "parts": {
                stack: {part: list(found) for part, found in parts.items()} for stack, parts in self.parts.items()
            },
            "total": list(total),
            "crossing": self.crossing(),
            "at": [
                {
                    "tokens": tokens,
                    "flops": value(total, tokens),
                    "flops_per_token": value(total, tokens) / tokens,
                    "attention_share": value(pairs, tokens) / value(total, tokens),
                }
                for tokens in lengths
            ],
        }


def value(polynomial: Polynomial, tokens: int) -> int:
    """Return what a part costs over `tokens` tokens."""
    a, b, c = polynomial
    return a + b * tokens + c * tokens * tokens


def count_cost(blueprint: Blueprint, architecture: Architecture) -> Cost:
    """Count what the model costs.

    Raises UncountableError where it cannot be run on shapes, or where the count at a fourth length is another than the
    formula says, as with attention within blocks of a fixed size.
    """
    known = name_parts(architecture)
    longest = min(CHECKED, architecture.context or CHECKED)
    lengths = COUNTED if longest > max(COUNTED) else (1, 2, 3)
    try:
        counts = [_count(blueprint.run(tokens), known) for tokens in lengths]
        check = _count(blueprint.run(longest), known)
    except UntraceableError as error:
        raise UncountableError(str(error)) from error
    parts: dict[str, dict[str, Polynomial]] = {}
    for stack, part in dict.fromkeys(key for count in (*counts, check) for key in count):
        found = fit(lengths, [count.get((stack, part), 0) for count in counts])
        if found is None or value(found, longest) != check.get((stack, part), 0):
            raise UncountableError(f"the cost of {part} is no polynomial of the length")
        parts.setdefault(stack, {})[part] = found
    return Cost(parts)


def fit(lengths: Sequence[int], counts: Sequence[int]) -> Polynomial | None:
    """Return the polynomial of degree two through three counts, or None where its coefficients are no whole numbers."""
    (x, y, z), (f, g, h) = lengths, counts
    first, second = Fraction(g - f, y - x), Fraction(h - g, z - y)
    c = (second - first) / (z - x)
    b = first - c * (x + y)
    a = f - b * x - c * x * x
    if any(part.denominator != 1 for part in (a, b, c)):
        return None
    return int(a), int(b), int(c)


def name_parts(architecture: Architecture) -> dict[str, tuple[str, str]]:
    """Return stack and part by the name of a module: of a block, of a layer in it, of a part beside the blocks."""
    known: dict[str, tuple[str, str]] = {}
    for stack in architecture.stacks:
        for piece in stack.before:
            known[piece.name] = (stack.name, "entry")
        for piece in stack.behind:
            known[piece.name] = (stack.name, "head")
        for group in stack.blocks:
            for number in group.numbers:
                block = f"{group.first.rpartition('.')[0]}.{number}"
                known[block] = (stack.name, "blocks")
                for branch in branches_of(group):
                    part = {"attention": "projections", "cross-attention": "cross-projections"}.get(branch.kind)
                    known |= {f"{block}.{name}": (stack.name, part or branch.kind) for name in branch.modules}
    return known


def _count(trace: Trace, known: Mapping[str, tuple[str, str]]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for step in trace.operations:
        if step.flops:
            key = _attribute(trace, step, known)
            counts[key] = counts.get(key, 0) + step.flops
    return counts


def _attribute(trace: Trace, step: Operation, known: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """Say which part a product belongs to: by the module that computes it, the innermost that is known."""
    path = [trace.calls[call].module for call in trace.path(step.call)]
    owners = [name.rpartition(".")[0] for name in step.weights]
    names = [name for name in (*path[:1], *owners, *path, *_outer(path[0])) if name in known]
    if not names:
        return "model", "other"
    stack, part = known[names[0]]
    if step.product == "activations":
        block = next((name for name in path if known.get(name, ("", ""))[1] == "blocks"), "")
        return stack, _name_attention(path[0], {n: p for n, (_, p) in known.items() if n.startswith(f"{block}.")})
    return stack, part


def _outer(module: str) -> Iterator[str]:
    """Yield the names of what a module lies in: lists are never called."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


def _name_attention(module: str, parts: Mapping[str, str]) -> str:
    """Tell self-attention from cross-attention by the projections that lie nearest."""
    near = {"projections": 0, "cross-projections": 0}
    for name, part in parts.items():
        if part in near:
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(module, name, strict=False)))
            near[part] = max(near[part], shared)
    return "cross-attention" if near["cross-projections"] > near["projections"] else "attention"


def choose_lengths(context: int | None, longest: int = 8192) -> list[int]:
    """Return lengths to tell of: powers of two from 64 up to the model's context."""
    most = min(context or longest, longest)
    lengths: Iterable[int] = (64 * 2**i for i in range(20))
    return [tokens for tokens in lengths if tokens <= most] or [most]
