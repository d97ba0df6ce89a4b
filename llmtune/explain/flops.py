"""What a forward pass costs: floating-point operations by part, exact at every length.

torch's FlopCounterMode counts them at three lengths, on shapes; the cost of each part is the polynomial through these,
a + b L + c L²: products with weights grow with L, those of attention with L². A fourth length must agree. A product of
[M, K] with [K, N] costs 2 M K N; sums, norms and softmax are left out, as is usual. Attention is counted over all pairs
of positions, those that a mask hides as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile

from llmtune.explain.architecture import Architecture, Blocks
from llmtune.explain.meta_device_model import FlopCounts, MetaModel, UntraceableError

COUNTED, CHECKED = (16, 23, 41), 1021
"""Lengths in tokens at which products are counted, and at which the formula is held against the count; odd
ones, which blocks of a fixed size do not divide."""
PAIRS = ("attention", "cross-attention")
"""Parts that multiply activations with one another: queries with keys, weights with values."""
PROJECTIONS = {"attention": "projections", "cross-attention": "cross-projections"}
Polynomial = tuple[int, int, int]
"""a, b and c of a + b L + c L²."""


class UncountableError(Exception):
    """The cost of a model is no polynomial of the length, or it cannot be run on shapes."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one forward pass over L tokens, in both halves of an encoder-decoder."""

    parts: dict[str, dict[str, Polynomial]]
    """By stack and part: attention and cross-attention are products of activations, all others have weights."""

    def sum(self, *, pairs: bool | None = None) -> Polynomial:
        """Add up all parts: attention's own products, all others, or both."""
        chosen = [
            polynomial
            for parts in self.parts.values()
            for part, polynomial in parts.items()
            if pairs in (None, part in PAIRS)
        ]
        a, b, c = (sum(values) for values in zip((0, 0, 0), *chosen, strict=True))
        return a, b, c

    def crossing(self) -> int | None:
        """Return the length from which attention's own products cost more than all else; None where there is none."""
        pairs, others = self.sum(pairs=True), self.sum(pairs=False)
        if value(pairs, 1) >= value(others, 1) or not pairs[2]:
            return None
        return 1 + bisect_left(range(1, 2**62), True, key=lambda length: value(pairs, length) >= value(others, length))

    def to_json(self, lengths: Sequence[int]) -> dict[str, object]:
        """Return all of it as JSON values, with numbers at some lengths."""
        total, pairs = self.sum(), self.sum(pairs=True)
        return {
            "formula": "a + b L + c L^2 floating-point operations over L tokens",
            "parts": {
                stack: {part: list(polynomial) for part, polynomial in parts.items()}
                for stack, parts in self.parts.items()
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


def count_cost(meta: MetaModel, architecture: Architecture) -> Cost:
    """Count what the model costs.

    Raises UncountableError where it cannot be run on shapes, or where the count at a fourth length is another than the
    formula says, as with attention within blocks of a fixed size.
    """
    longest = min(CHECKED, architecture.context or CHECKED)
    lengths = COUNTED if longest > max(COUNTED) else (1, 2, 3)
    try:
        counts = [count_parts(meta.count_flops(tokens), architecture) for tokens in (*lengths, longest)]
    except UntraceableError as error:
        raise UncountableError(str(error)) from error
    parts: dict[str, dict[str, Polynomial]] = {}
    for stack, part in dict.fromkeys(key for count in counts for key in count):
        polynomial = fit(lengths, [count[stack, part] for count in counts[:3]])
        if polynomial is None or value(polynomial, longest) != counts[3][stack, part]:
            raise UncountableError(f"the cost of {part} is no polynomial of the length")
        parts.setdefault(stack, {})[part] = polynomial
    for found in parts.values():
        a, b, c = found.get("attention", (0, 0, 0))
        if c and (a or b):  # products of activations with what is the same for every text, as DeBERTa has them
            found["attention"] = (0, 0, c)
            x, y, z = found["projections"]
            found["projections"] = (x + a, y + b, z)
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


def count_parts(counts: FlopCounts, architecture: Architecture) -> Counter[tuple[str, str]]:
    """Return operations by stack and part, out of those by module."""
    found: Counter[tuple[str, str]] = Counter()
    for stack in architecture.stacks:
        found[stack.name, "entry"] += sum(_total(counts, piece.name) for piece in stack.before)
        for group in stack.blocks:
            for block in group.names():
                parts = _count_block(counts, block, group)
                parts["blocks"] = _total(counts, block) - parts.total()
                found.update({(stack.name, part): size for part, size in parts.items()})
        found[stack.name, "head"] += sum(_total(counts, piece.name) for piece in stack.behind)
    found["model", "other"] = _total(counts, "") - found.total()
    return +found


def _count_block(counts: FlopCounts, block: str, group: Blocks) -> Counter[str]:
    parts: Counter[str] = Counter()
    known = [name for branch in group.branches() for name in branch.modules]
    for branch in group.branches():
        parts[PROJECTIONS.get(branch.kind, branch.kind)] += sum(_total(counts, f"{block}.{n}") for n in branch.modules)
        if branch.kind in PAIRS:  # what its module computes beside the layers in it
            owner = common_owner(branch.modules)
            if owner in branch.modules:
                raise UncountableError(f"{owner} multiplies by weights that are in no layer of their own")
            whole = _total(counts, f"{block}.{owner}" if owner else block)
            inside = [name for name in known if not owner or name.startswith(f"{owner}.")]
            parts[branch.kind] += whole - sum(_total(counts, f"{block}.{name}") for name in inside)
    return parts


def _total(counts: FlopCounts, name: str) -> int:
    """Return the operations of a module; of a list of modules, which is never called, those of its members."""
    if name in counts:
        return sum(counts[name].values())
    members = (member for member in counts if member.rpartition(".")[0] == name)
    return sum(sum(counts[member].values()) for member in members) if name else 0


def common_owner(modules: Sequence[str]) -> str:
    """Return the innermost module that holds all of some; empty where that is the block itself."""
    columns = zip(*(name.split(".") for name in modules), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))


def choose_lengths(context: int | None, longest: int = 8192) -> list[int]:
    """Return the lengths that are shown: powers of two from 64 up to the model's context."""
    most = min(context or longest, longest)
    return [tokens for tokens in (64 * 2**i for i in range(20)) if tokens <= most] or [most]
