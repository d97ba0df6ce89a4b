"""What is written on the parts of a model: titles, shapes, sizes, and what was trained at them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtune.explain.architecture import BIASES, Architecture, Blocks, Piece, Stack
from llmtune.explain.block_wiring import Branch
from llmtune.explain.trained_modules import TrainedModule, TrainedModules
from llmtune.report.number_format import count

TITLES = {
    "attention": "Self-attention",
    "cross-attention": "Cross-attention",
    "feed-forward": "Feed-forward",
    "experts": "Experts",
    "convolution": "Convolution",
}
UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
HEADS = ("lm_head", "score", "classifier", "qa_outputs", "proj_out", "decoder", "vocab_projector", "out_proj")


@dataclass(frozen=True)
class Row:
    """One module with weights: its name, shape and size, and what was trained at it."""

    name: str
    shape: str
    parameters: int
    """Of one block."""
    mark: str = ""
    """What was trained at it, such as `LoRA r 16`; empty where nothing was."""


def briefly(number: float) -> str:
    """Write a number in three digits: 134,515,008 is 135 M."""
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number:g}"


def operations(number: float) -> str:
    """Write a number of floating-point operations."""
    text = briefly(number)
    return f"{text}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"


def brief_size(number: float) -> str:
    """Write a number of parameters in three digits; a thousand million is B, as usual for models."""
    return briefly(number).replace("G", "B")


def title_branch(branch: Branch, stack: Stack) -> str:
    """Name a branch."""
    return "Masked self-attention" if branch.kind == "attention" and stack.causal else TITLES[branch.kind]


def describe_branch(branch: Branch, group: Blocks, stack: Stack) -> list[str]:
    """Describe in a few words a line what a branch does."""
    if branch.kind in ("attention", "cross-attention"):
        return list(_describe_attention(branch, stack))
    words = [branch.activation or "", "gated" if branch.gated else ""]
    shapes = [shape for name in branch.modules for shape in _shapes(name, group)]
    if branch.kind == "experts":
        experts = next((shape[0] for shape in shapes if len(shape) == 3), None)
        return [", ".join(filter(None, [f"{experts} experts, a router" if experts else "a router", *words]))]
    inner = max((shape[1] for shape in shapes if len(shape) == 2), default=0)
    wide = f"{count(inner // 2 if branch.gated and len(branch.modules) == 2 else inner)} wide" if inner else ""
    return [", ".join(filter(None, [wide, *words]))]


def _describe_attention(branch: Branch, stack: Stack) -> Iterator[str]:
    heads = f"{branch.heads} heads of {branch.head_size}" if branch.heads else "attention"
    if branch.kind == "cross-attention":
        yield f"{heads}; keys and values: encoder"
        return
    yield f"{heads}, {stack.kv_heads} for keys and values" if stack.kv_heads else heads
    if branch.inner:
        yield f"{branch.inner[0].kind} on queries and keys"
    if any(order.startswith("rotary") for order in stack.orders):
        yield "rotary: queries and keys are turned"
    if any(order.startswith(("relative", "linear")) for order in stack.orders):
        yield "scores get a bias by distance"
    if stack.window:
        yield stack.window


def rows_of(names: Sequence[str], group: Blocks, trained: TrainedModules | None) -> list[Row]:
    """Return a row for each module of a block."""
    rows = []
    for name in names:
        trained_at = mark(group.names(name), trained)
        if name in group.shapes or not _shapes(name, group):
            shape = _write(group.shapes[name]) if name in group.shapes else ""
            rows.append(Row(shorten(name, names), shape, group.sizes.get(name, 0), trained_at))
            continue
        for key, shape_of in group.shapes.items():
            if key.startswith(f"{name}."):
                rows.append(Row(key.removeprefix(f"{name}."), _write(shape_of), math.prod(shape_of), trained_at))
    return rows


def mark(names: Sequence[str], trained: TrainedModules | None) -> str:
    """Return what was trained at modules that stand for one another in equal blocks; empty where nothing was."""
    found = [trained.modules[name] for name in names if name in trained.modules] if trained else []
    if not found:
        return ""
    kinds = {_describe_trained(module) for module in found}
    word = kinds.pop() if len(kinds) == 1 else found[0].kind
    return word if len(found) == len(names) else f"{word} in {len(found)} of {len(names)}"


def _describe_trained(module: TrainedModule) -> str:
    words = {"whole": "trained whole", "tokens": "new rows trained", "bias": "bias trained"}
    return words.get(module.kind) or f"{module.kind} r {module.rank}"


def _shapes(name: str, group: Blocks) -> list[tuple[int, ...]]:
    if name in group.shapes:
        return [group.shapes[name]]
    return [shape for key, shape in group.shapes.items() if key.startswith(f"{name}.")]


def _write(shape: Sequence[int]) -> str:
    """Inputs and outputs of a matrix; of several matrices, how many."""
    if len(shape) == 3:
        return f"{shape[0]} × ({shape[1]:,} × {shape[2]:,})"
    return " → ".join(f"{edge:,}" for edge in shape)


def shorten(name: str, names: Sequence[str]) -> str:
    """Return the last part of a name, or as many as tell it from the others."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in names) == 1:
            return end
    return name


def title_piece(piece: Piece) -> str:
    """Name a part beside the blocks."""
    last = piece.name.rpartition(".")[2]
    titles = {"positions": "Positions", "convolutions": piece.about.capitalize()}
    if piece.kind == "embedding":
        return "Token types" if "type" in last else "Embedding"
    if piece.kind == "linear" and last in HEADS:
        return "Head"
    return titles.get(piece.kind, piece.about)


def describe_piece(piece: Piece) -> str:
    """Return the shape of a part beside the blocks, and whose weights it uses."""
    shape = ""
    if piece.kind == "linear":
        shape = _write(piece.shape)
    elif piece.kind == "convolutions" and piece.shape:
        shape = _write((piece.shape[1], piece.shape[0]))
    elif piece.kind in ("embedding", "positions") and len(piece.shape) == 2:
        shape = f"{piece.shape[0]:,} × {piece.shape[1]:,}"
    if piece.once:
        return f"{shape}, once for the text"
    return f"{shape}, {'embedding’s' if piece.kind == 'linear' else 'same'} weights" if piece.tied_to else shape


def describe_inputs(architecture: Architecture, stack: Stack) -> str:
    """Return what goes into a stack."""
    if any(piece.kind == "convolutions" for piece in stack.before):
        return "recording"
    return "words written so far" if architecture.family == "encoder-decoder" and stack.causal else "words"


def describe_outputs(architecture: Architecture, stack: Stack) -> str:
    """Return what comes out of a stack; empty where another stack reads it."""
    last = next((piece for piece in reversed(stack.behind) if piece.kind == "linear"), None)
    if last is not None and len(last.shape) == 2 and last.shape[1] == architecture.vocabulary:
        return f"a score for each of {last.shape[1]:,} tokens"
    if last is not None and len(last.shape) == 2 and last.shape[1] != architecture.width:
        return f"{last.shape[1]:,} scores for {'the text' if architecture.scores_text else 'each token'}"
    inner = architecture.family == "encoder-decoder" and stack is not architecture.stacks[-1]
    if inner or not architecture.width:
        return ""
    both = ", and as many for the text" if last is not None and last.once else ""
    return f"{architecture.width:,} numbers for each word{both}"


def number_blocks(group: Blocks) -> str:
    """Return which blocks a group is."""
    first, last = group.numbers[0], group.numbers[-1]
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def describe_extras(group: Blocks) -> str:
    """Return what only some of a group's blocks hold; empty where they are all alike."""
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in group.extras))
    if not names:
        return ""
    return "one holds a bias table" if set(names) <= set(BIASES) else f"some hold {', '.join(names)}"
