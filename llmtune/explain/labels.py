"""What is written on the parts of a model: titles, shapes, sizes, and what was trained at them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtune.explain.adapter_weights import Carrier, Carriers
from llmtune.explain.architecture import Architecture, Blocks, Piece, Stack
from llmtune.explain.block_structure import Branch
from llmtune.explain.orders import BIASES
from llmtune.report.number_format import count

TITLES = {
    "attention": "Self-attention",
    "cross-attention": "Cross-attention",
    "feed-forward": "Feed-forward",
    "experts": "Experts",
    "convolution": "Convolution",
}
UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


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
    told = briefly(number)
    return f"{told}FLOPs" if told[-1].isalpha() else f"{told} FLOPs"


def brief_size(number: float) -> str:
    """Write a number of parameters in three digits; a thousand million is B, as people say of models."""
    return briefly(number).replace("G", "B")


def title_branch(branch: Branch, stack: Stack) -> str:
    """Name a branch."""
    if branch.kind == "attention" and stack.causal:
        return "Masked self-attention"
    return TITLES[branch.kind]


def describe_branch(branch: Branch, group: Blocks, stack: Stack) -> list[str]:
    """Say in a few words a line what a branch does."""
    if branch.kind in ("attention", "cross-attention"):
        return list(_describe_attention(branch, stack))
    words = [f"{branch.activation}" if branch.activation else "", "gated" if branch.gated else ""]
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


def rows_of(names: Sequence[str], group: Blocks, carriers: Carriers | None) -> list[Row]:
    """Return a row for each module of a block."""
    owner = group.first.rpartition(".")[0]
    rows = []
    for name in names:
        told = mark([f"{owner}.{number}.{name}" for number in group.numbers], carriers)
        short = shorten(name, names)
        if name in group.shapes or not _shapes(name, group):
            shape = _write(group.shapes[name]) if name in group.shapes else ""
            rows.append(Row(short, shape, group.sizes.get(name, 0), told))
            continue
        for key, shape_of in group.shapes.items():
            if key.startswith(f"{name}."):
                rows.append(Row(key.removeprefix(f"{name}."), _write(shape_of), math.prod(shape_of), told))
    return rows


def mark(names: Sequence[str], carriers: Carriers | None) -> str:
    """Say what was trained at modules that stand for one another in equal blocks; empty where nothing was."""
    if carriers is None or not carriers.modules:
        return ""
    found = [carriers.modules[name] for name in names if name in carriers.modules]
    if not found:
        return ""
    kinds = {_name_carrier(carrier) for carrier in found}
    word = kinds.pop() if len(kinds) == 1 else found[0].kind
    return word if len(found) == len(names) else f"{word} in {len(found)} of {len(names)}"


def _name_carrier(carrier: Carrier) -> str:
    words = {"whole": "trained whole", "tokens": "new rows trained", "bias": "bias trained"}
    return words.get(carrier.kind) or f"{carrier.kind} r {carrier.rank}"


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
    if piece.kind == "norm":
        return piece.about
    if piece.kind == "positions":
        return "Positions"
    if piece.kind == "embedding":
        return "Token types" if "type" in last else "Embedding"
    if piece.kind == "convolutions":
        return piece.about.capitalize()
    return "Head" if piece.kind == "linear" and last in HEADS else piece.about


HEADS = ("lm_head", "score", "classifier", "qa_outputs", "proj_out", "decoder", "vocab_projector", "out_proj")


def describe_piece(piece: Piece) -> str:
    """Say of a part beside the blocks what shape it has, and whose weights it uses."""
    shape = ""
    if piece.kind == "linear" or (piece.kind == "convolutions" and piece.shape):
        ends = piece.shape if piece.kind == "linear" else (piece.shape[1], piece.shape[0])
        shape = _write(ends)
    elif piece.kind in ("embedding", "positions") and len(piece.shape) == 2:
        shape = f"{piece.shape[0]:,} × {piece.shape[1]:,}"
    if piece.once:
        return f"{shape}, once for the text"
    return f"{shape}, {'embedding’s' if piece.kind == 'linear' else 'same'} weights" if piece.tied_to else shape


def tell_inputs(architecture: Architecture, stack: Stack) -> str:
    """What goes into a stack."""
    if any(piece.kind == "convolutions" for piece in stack.before):
        return "recording"
    return "words written so far" if architecture.family == "encoder-decoder" and stack.causal else "words"


def tell_outputs(architecture: Architecture, stack: Stack) -> str:
    """What comes out of a stack."""
    last = next((piece for piece in reversed(stack.behind) if piece.kind == "linear"), None)
    if last is not None and len(last.shape) == 2 and last.shape[1] == architecture.vocabulary:
        return f"a score for each of {last.shape[1]:,} tokens"
    if last is not None and len(last.shape) == 2 and last.shape[1] != architecture.width:
        return f"{last.shape[1]:,} scores for {'the text' if architecture.scores_text else 'each token'}"
    if architecture.family == "encoder-decoder" and stack is not architecture.stacks[-1]:
        return ""
    if not architecture.width:
        return ""
    both = ", and as many for the text" if last is not None and last.once else ""
    return f"{architecture.width:,} numbers for each word{both}"


def number_blocks(group: Blocks) -> str:
    """Say which blocks a group is."""
    first, last = group.numbers[0], group.numbers[-1]
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def tell_extras(group: Blocks) -> str:
    """Say what only some of a group's blocks hold; empty where they are all alike."""
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in group.extras))
    if not names:
        return ""
    return "one holds a bias table" if set(names) <= set(BIASES) else f"some hold {', '.join(names)}"
