"""How the time of a block grows with the length of a text, measured on this machine.

What is measured is one block of the model with random weights, in float32 and with plain attention, on inputs of the
shapes that the model gives it; so no more than a block is ever in memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils._pytree import tree_map

from llmtune.explain.architecture import Architecture, Blocks, Stack, branches_of
from llmtune.explain.flops import PAIRS, Cost, Polynomial, choose_lengths
from llmtune.explain.meta_model import Blueprint, UntraceableError
from llmtune.model import is_out_of_memory, pick_device

LONGEST = 2048
BUDGET_SECONDS = 10.0
ENOUGH_SECONDS, MOST_RUNS = 0.25, 30
"""A length is run until one of the two is reached; the quickest run counts."""
MOST_BYTES = 1 << 30
"""Of a block's parameters, and of attention's weights at one length."""


@dataclass(frozen=True)
class Point:
    """What one block took for a text of so many tokens."""

    tokens: int
    block_seconds: float
    attention_seconds: float | None
    """Of its self-attention with the projections around it; None where these lie in no module of their own."""


@dataclass(frozen=True)
class Measured:
    """A block's time by length."""

    block: str
    stack: str
    attention: str | None
    """The module of its self-attention, below the block."""
    device: str
    threads: int
    points: tuple[Point, ...]
    stopped: str | None = None
    """Why there are no longer texts."""

    def as_facts(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def choose_stack(architecture: Architecture) -> tuple[Stack, Blocks] | None:
    """Return the stack whose blocks are measured, the last one, and the largest group of blocks in it."""
    if not architecture.stacks or not architecture.stacks[-1].blocks:
        return None
    stack = architecture.stacks[-1]
    return stack, max(stack.blocks, key=lambda group: len(group.numbers))


def cost_of_block(cost: Cost, stack: Stack) -> dict[str, Polynomial]:
    """Return what one block of a stack costs, on the mean: attention's products, all of attention, everything."""
    runs = sum(len(group.numbers) * group.runs for group in stack.blocks)
    parts = {part: found for part, found in cost.parts[stack.name].items() if part not in ("entry", "head", "other")}

    def mean(*names: str) -> Polynomial:
        a, b, c = (sum(parts[name][i] for name in names if name in parts) // runs for i in range(3))
        return a, b, c

    return {"pairs": mean(*PAIRS), "attention": mean("projections", "attention"), "block": mean(*parts)}


def measure_block(
    blueprint: Blueprint, architecture: Architecture, console: Console, *, budget_seconds: float = BUDGET_SECONDS
) -> Measured | str:
    """Run one block over longer and longer texts; return how long it took, or why it could not be run."""
    chosen = choose_stack(architecture)
    if chosen is None:
        return "no blocks were found"
    stack, group = chosen
    name = f"{group.first.rpartition('.')[0]}.{group.numbers[-1]}"
    if 4 * group.typical > MOST_BYTES:
        return f"a block has {group.typical:,} parameters: too many to try it here"
    device = pick_device()
    try:
        block = _materialise(blueprint.model.get_submodule(name), device)
        attention = _find_attention(group)
        lengths = choose_lengths(min(architecture.context or LONGEST, LONGEST))
        points, stopped = _measure(blueprint, block, name, attention, lengths, group, budget_seconds, console)
    except (UntraceableError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            return "there is not enough memory for one block"
        return f"a block could not be run by itself: {error}"
    return Measured(name, stack.name, attention, device, torch.get_num_threads(), tuple(points), stopped)


def _measure(
    blueprint: Blueprint,
    block: torch.nn.Module,
    name: str,
    attention: str | None,
    lengths: Sequence[int],
    group: Blocks,
    budget_seconds: float,
    console: Console,
) -> tuple[list[Point], str | None]:
    heads = max((branch.heads or 1 for branch in branches_of(group, "attention")), default=1)
    points: list[Point] = []
    ends = time.perf_counter() + budget_seconds
    columns = (TextColumn("measuring {task.fields[at]:>5} tokens"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=len(lengths), at=lengths[0])
        for tokens in lengths:
            bars.update(bar, at=tokens)
            if 4 * heads * tokens * tokens > MOST_BYTES:
                return points, f"attention's weights over {tokens:,} tokens take more than {MOST_BYTES >> 20} MiB"
            if points and time.perf_counter() + 5 * points[-1].block_seconds > ends:
                return points, f"the {budget_seconds:g} seconds for measuring were over"
            points.append(_time(block, attention, *_fill(blueprint.inputs_of(name, tokens), block), tokens, ends))
            bars.advance(bar)
    return points, None


def _materialise(block: torch.nn.Module, device: str) -> torch.nn.Module:
    """Copy a block from the meta device, with random weights of a usual size."""
    made = copy.deepcopy(block).float().to_empty(device=device).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            drawn = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor.copy_(drawn if tensor.is_floating_point() else torch.ones_like(drawn))
    return made


def _fill(
    called: tuple[tuple[Any, ...], dict[str, Any]], block: torch.nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the arguments of a call random numbers: the time does not depend on them."""
    device = next(block.parameters()).device

    def fill(part: Any) -> Any:
        if not isinstance(part, torch.Tensor):
            return part
        if part.is_floating_point():
            return torch.randn(part.shape, device=device)
        return torch.ones(part.shape, dtype=part.dtype, device=device)

    args, kwargs = tree_map(fill, called)
    return args, kwargs


def _find_attention(group: Blocks) -> str | None:
    """Return the module that holds self-attention and nothing else, or None."""
    found = branches_of(group, "attention")
    if not found:
        return None
    names = [name.split(".") for name in found[0].modules]
    shared = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    others = [name for branch in branches_of(group) if branch is not found[0] for name in branch.modules]
    name = ".".join(shared)
    return name if name and not any(other.startswith(f"{name}.") for other in others) else None


def _time(
    block: torch.nn.Module,
    attention: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tokens: int,
    ends: float,
) -> Point:
    runs: list[tuple[float, float]] = []
    with torch.inference_mode(), _watching(block, attention) as watched:
        block(*args, **kwargs)
        begun = time.perf_counter()
        while len(runs) < MOST_RUNS:
            watched.clear()
            start = _now(block)
            block(*args, **kwargs)
            runs.append((_now(block) - start, sum(watched)))
            now = time.perf_counter()
            if (now - begun > ENOUGH_SECONDS and len(runs) > 2) or now > ends:
                break
    whole, part = min(run[0] for run in runs), min(run[1] for run in runs)
    return Point(tokens, whole, part if attention is not None else None)


@contextmanager
def _watching(block: torch.nn.Module, attention: str | None) -> Iterator[list[float]]:
    """Note how long each call of the block's attention takes."""
    seconds: list[float] = []
    started: list[float] = []
    if attention is None:
        yield seconds
        return
    module = block.get_submodule(attention)
    hooks = [
        module.register_forward_pre_hook(lambda *_: started.append(_now(block))),
        module.register_forward_hook(lambda *_: seconds.append(_now(block) - started.pop())),
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _now(block: torch.nn.Module) -> float:
    device = next(block.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
