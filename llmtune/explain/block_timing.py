"""How the time of a block grows with the length of a text, measured on this machine.

What is measured is one block of the model with random weights, in float32 and with plain attention, on inputs of the
shapes that the model gives it; so no more than a block is ever in memory.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer

from llmtune.explain.architecture import Architecture, Blocks, Stack
from llmtune.explain.flops import PAIRS, Cost, Polynomial, choose_lengths, common_owner, value
from llmtune.explain.meta_device_model import Arguments, MetaModel, UntraceableError
from llmtune.model.device import pick_device
from llmtune.model.oom import is_out_of_memory

LONGEST = 2048
BUDGET_SECONDS = 10.0
RUN_SECONDS = 0.25
"""How long a length is run again; the quickest run counts."""
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

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON values."""
        return asdict(self)

    def speed(self, block: Polynomial) -> float:
        """Return FLOPs a second of a block that costs so much, the geometric mean over its lengths."""
        logs = [math.log(value(block, point.tokens) / point.block_seconds) for point in self.points]
        return math.exp(sum(logs) / len(logs))


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
    meta: MetaModel, architecture: Architecture, console: Console, *, budget_seconds: float = BUDGET_SECONDS
) -> Measured | str:
    """Run one block over longer and longer texts; return how long it took, or why it could not be run."""
    chosen = choose_stack(architecture)
    if chosen is None:
        return "no blocks were found"
    stack, group = chosen
    if 4 * group.typical > MOST_BYTES:
        return f"a block has {group.typical:,} parameters: too many to try it here"
    name, attention, device = group.names()[-1], find_attention(group), pick_device()
    lengths = choose_lengths(min(architecture.context or LONGEST, LONGEST))
    heads = max((branch.heads or 1 for branch in group.branches("attention")), default=1)
    points: list[Point] = []
    stopped, ends = None, time.perf_counter() + budget_seconds
    try:
        block = _materialise(meta.model.get_submodule(name), device)
        for tokens in track(lengths, "measuring", console=console, transient=True, disable=not console.is_terminal):
            if 4 * heads * tokens * tokens > MOST_BYTES:
                stopped = f"attention's weights over {tokens:,} tokens take more than {MOST_BYTES >> 20} MiB"
            elif points and time.perf_counter() + 5 * points[-1].block_seconds > ends:
                stopped = f"the {budget_seconds:g} seconds for measuring were over"
            if stopped is not None:
                break
            seconds = [
                _time(
                    block.get_submodule(part),
                    _fill(meta.arguments_of(f"{name}.{part}".strip("."), tokens), device),
                    min(RUN_SECONDS, budget_seconds / 20),
                )
                for part in ("", *([attention] if attention else []))
            ]
            points.append(Point(tokens, seconds[0], seconds[1] if attention else None))
    except (UntraceableError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            return "there is not enough memory for one block"
        return f"a block could not be run by itself: {error}"
    return Measured(name, stack.name, attention, device, torch.get_num_threads(), tuple(points), stopped)


def _materialise(block: torch.nn.Module, device: str) -> torch.nn.Module:
    """Copy a block from the meta device, with random weights of a usual size."""
    made = copy.deepcopy(block).float().to_empty(device=device).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            drawn = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor.copy_(drawn if tensor.is_floating_point() else torch.ones_like(drawn))
    return made


def _fill(arguments: Arguments, device: str) -> Arguments:
    """Give the arguments of a call random numbers: the time does not depend on them."""

    def fill(part: object) -> object:
        if not isinstance(part, torch.Tensor):
            return part
        if part.is_floating_point():
            return torch.randn(part.shape, device=device)
        return torch.ones(part.shape, dtype=part.dtype, device=device)

    args, kwargs = arguments
    return tree_map(fill, args), tree_map(fill, kwargs)


def find_attention(group: Blocks) -> str | None:
    """Return the module that holds self-attention and nothing else, or None."""
    branches = group.branches("attention")
    if not branches:
        return None
    owner = common_owner(branches[0].modules)
    others = [name for branch in group.branches() if branch is not branches[0] for name in branch.modules]
    return owner if owner and not any(other.startswith(f"{owner}.") for other in others) else None


def _time(module: torch.nn.Module, arguments: Arguments, run_seconds: float) -> float:
    """Return the seconds of the quickest run; a GPU is waited for."""
    args, kwargs = arguments
    timer = Timer(
        "with torch.inference_mode():\n    module(*args, **kwargs)",
        globals={"torch": torch, "module": module, "args": args, "kwargs": kwargs},
        num_threads=torch.get_num_threads(),
    )
    return float(min(timer.blocked_autorange(min_run_time=run_seconds).times))
