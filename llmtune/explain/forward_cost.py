"""What a forward pass costs by the length of a text: operations, counted by torch on shapes; and a block's seconds.

A product of [M, K] with [K, N] counts as 2 M K N; sums, norms and softmax are left out, as is usual. Attention is
counted over all pairs of positions, those that a mask hides as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from llmtune.explain.architecture import Architecture
from llmtune.explain.fake_model import FakeModel, UntraceableError
from llmtune.model.device import is_out_of_memory, pick_device
from llmtune.report.render_terminal import follow

COUNTED, CHECKED = (16, 23, 41), 1021
"""Lengths in tokens at which products are counted, and at which the formula is held against the count; odd
ones, which blocks of a fixed size do not divide."""
BATCHED = ("aten.bmm", "aten.baddbmm")
"""Products of activations with one another."""
LONGEST, MOST_SHOWN = 2048, 8192
BUDGET_SECONDS, RUN_SECONDS = 10.0, 0.25
"""Of all lengths, and of one; the quickest run counts."""
MOST_BYTES = 1 << 30
"""Of a block's parameters."""
Polynomial = npt.NDArray[np.int64]
"""a, b and c of a + b L + c L²."""
Arguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one forward pass over L tokens, in both halves of an encoder-decoder."""

    total: Polynomial
    attention: Polynomial
    """Attention's own products: queries with keys, weights with values. All others have weights."""

    @property
    def others(self) -> Polynomial:
        """All but attention's own."""
        return self.total - self.attention

    def crossing(self) -> int | None:
        """Return the length from which attention's own products cost more than all else; None where there is none."""
        more = self.attention - self.others
        if more[2] <= 0 or evaluate_cost(more, 1) >= 0:
            return None
        root = int(max(np.roots(more[::-1]).real))
        return next(n for n in range(max(1, root - 1), root + 3) if evaluate_cost(more, n) >= 0)

    def at(self, tokens: int) -> dict[str, float]:
        """Return what a text of so many tokens costs."""
        whole = evaluate_cost(self.total, tokens)
        shared = evaluate_cost(self.attention, tokens) / whole
        return {"tokens": tokens, "flops": whole, "flops_per_token": whole / tokens, "attention_share": shared}


def evaluate_cost(polynomial: Polynomial, tokens: int) -> int:
    """Return what a part costs over `tokens` tokens."""
    return int(polynomial @ (1, tokens, tokens * tokens))


def count_cost(fake: FakeModel, context: int | None) -> Cost:
    """Count what the model costs.

    Raises UntraceableError where it cannot be run on shapes, or where the count at a fourth length is another than the
    formula says, as with attention within blocks of a fixed size.
    """
    longest = min(CHECKED, context or CHECKED)
    lengths = COUNTED if longest > max(COUNTED) else (1, 2, 3)
    counts = [count_flops(fake, tokens) for tokens in (*lengths, longest)]
    polynomials = []
    for name, found in zip(("a text", "attention"), zip(*counts, strict=True), strict=True):
        polynomials.append(np.rint(np.linalg.solve(np.vander(lengths, 3, True), found[:3])).astype(np.int64))
        if evaluate_cost(polynomials[-1], longest) != found[3]:
            raise UntraceableError(f"the cost of {name} is no polynomial of the length")
    return Cost(*polynomials)


def count_flops(fake: FakeModel, tokens: int) -> tuple[int, int]:
    """Return the operations of a forward pass over so many tokens, and those of attention's own products."""
    with fake.mode, FlopCounterMode(display=False) as counter:
        fake.run(tokens)
    attends = [name for name, part in fake.model.named_modules() if "attention" in type(part).__name__.lower()]
    outer = [name for name in attends if not any(name.startswith(f"{other}.") for other in attends)]
    counts, whole = counter.get_flop_counts(), type(fake.model).__name__
    products = (counts.get(f"{whole}.{name}", {}).items() for name in outer)
    own = sum(flops for found in products for operation, flops in found if str(operation) in BATCHED)
    return counter.get_total_flops(), own


def choose_lengths(context: int | None) -> list[int]:
    """Return the lengths that are shown: powers of two from 64 up to the model's context."""
    most = min(context or MOST_SHOWN, MOST_SHOWN)
    return [tokens for tokens in (64 * 2**i for i in range(20)) if tokens <= most] or [most]


# Seconds


@dataclass(frozen=True)
class BlockTiming:
    """What one block took for a text of so many tokens."""

    tokens: int
    block_seconds: float
    attention_seconds: float


@dataclass(frozen=True)
class MeasuredBlock:
    """A block's time by length, on this machine."""

    block: str
    attention: str
    """The module of its self-attention, below the block."""
    device: str
    threads: int
    points: tuple[BlockTiming, ...]
    """Up to the length at which the time for measuring was over."""


def measure_block(
    fake: FakeModel, architecture: Architecture, console: Console, *, budget_seconds: float = BUDGET_SECONDS
) -> MeasuredBlock | str:
    """Run one block over longer and longer texts, in float32 and with plain attention.

    Returns how long it took, or why it could not be run.
    """
    if not architecture.stacks:
        return "no blocks were found"
    blocks = max(architecture.stacks[-1].blocks, key=lambda blocks: len(blocks.numbers))
    if 4 * blocks.typical > MOST_BYTES:
        return f"a block has {blocks.typical:,} parameters: too many to try it here"
    name, device = blocks.names()[-1], pick_device()
    block = fake.model.get_submodule(name)
    attention = next((name for name, part in block.named_modules() if type(part).__name__.endswith("Attention")), "")
    lengths = choose_lengths(min(architecture.context or LONGEST, LONGEST))
    points: list[BlockTiming] = []
    try:
        modules = [block, block.get_submodule(attention)]
        arguments = {tokens: capture_arguments(fake, modules, tokens) for tokens in lengths}
        block._apply(lambda fake: _constant(fake, 0.02, device))
        ends, least = time.perf_counter() + budget_seconds, min(RUN_SECONDS, budget_seconds / 20)
        for tokens in follow(console, lengths, "measuring"):
            if points and time.perf_counter() + 5 * points[-1].block_seconds > ends:
                break
            seconds = [time_module(*pair, device, least) for pair in zip(modules, arguments[tokens], strict=True)]
            points.append(BlockTiming(tokens, *seconds))
    except (UntraceableError, RuntimeError, TypeError, ValueError, KeyError) as error:
        if is_out_of_memory(error):
            return "there is not enough memory for one block"
        return f"a block could not be run by itself: {error}"
    return MeasuredBlock(name, attention, device, torch.get_num_threads(), tuple(points))


def capture_arguments(fake: FakeModel, modules: Sequence[torch.nn.Module], tokens: int) -> list[Arguments]:
    """Return the arguments that some modules are called with, in fake tensors."""
    found: dict[torch.nn.Module, Arguments] = {}

    def keep(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found[module] = (args, kwargs)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        fake.run(tokens)
    return [found[module] for module in modules]


def time_module(module: torch.nn.Module, arguments: Arguments, device: str, least_seconds: float) -> float:
    """Return the seconds of the quickest run; a GPU is waited for."""

    def fill(part: object) -> object:
        return _constant(part, 1, device) if isinstance(part, torch.Tensor) else part

    args, kwargs = tree_map(fill, arguments)
    timer = Timer(
        "with torch.inference_mode():\n    module(*args, **kwargs)",
        globals={"torch": torch, "module": module, "args": args, "kwargs": kwargs},
        num_threads=torch.get_num_threads(),
    )
    return float(min(timer.blocked_autorange(min_run_time=least_seconds).times))


def _constant(fake: torch.Tensor, value: float, device: str) -> torch.Tensor:
    return torch.full(fake.shape, value, dtype=fake.dtype, device=device)
