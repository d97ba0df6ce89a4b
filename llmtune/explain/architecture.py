"""The parts of a model in the order of their use: embeddings, blocks, norms, head; by its modules and configuration."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from llmtune.explain.fake_model import FakeModel, UntraceableError
from llmtune.explain.module_calls import (
    BIASES,
    PLAIN,
    Branch,
    ModuleCall,
    describe_feed_forward,
    describe_heads,
    describe_window,
    find_branches,
    find_orders,
    find_units,
    is_positions,
    norm_kind,
    record_calls,
    write_shape,
)
from llmtune.explain.target import Target
from llmtune.model.config import linear_shape
from llmtune.model.memory_plan import context_length

TITLES = {
    "attention": "Self-attention",
    "cross-attention": "Cross-attention",
    "feed-forward": "Feed-forward",
    "experts": "Experts",
    "convolution": "Convolution",
}


@dataclass(frozen=True)
class Weights:
    """One module with weights, or one parameter of a module that holds several matrices."""

    name: str
    """Within a block below the block."""
    shape: str
    parameters: int
    """Its own: a weight that another part uses before it is counted there."""


@dataclass(frozen=True)
class Part:
    """A part of a model, as it is drawn."""

    kind: str
    """embedding, positions, norm, linear, convolutions, other, or the role of a branch."""
    title: str
    about: str = ""
    weights: tuple[Weights, ...] = ()
    tied: bool = False
    """Whether it uses the weights of a part before it."""
    added: bool = False
    """Whether it is added to what comes from below."""

    @property
    def parameters(self) -> int:
        """Its own."""
        return sum(weights.parameters for weights in self.weights)


@dataclass(frozen=True)
class Sublayer:
    """Branches that leave the residual path at one point and join it at one; more than one is a parallel block."""

    branches: tuple[tuple[Part, ...], ...]
    behind: tuple[Part, ...] = ()
    """Norms on the residual path, after the sum: a post-norm block."""

    @property
    def parts(self) -> list[Part]:
        """All of its parts in their order."""
        return [*(part for branch in self.branches for part in branch), *self.behind]


@dataclass(frozen=True)
class Blocks:
    """Equal blocks, one after the other."""

    list_name: str
    numbers: tuple[int, ...]
    """Which they are in their list, from 0."""
    runs: int
    """How often a text passes through one of them; more than once where weights are shared."""
    sublayers: tuple[Sublayer, ...]
    typical: int
    """Parameters of one of them."""
    bias_table: int = 0
    """Parameters of the bias by distance that the first one holds for all, as T5's does."""

    @property
    def parameters(self) -> int:
        """Of all of them together."""
        return len(self.numbers) * self.typical + self.bias_table

    @property
    def title(self) -> str:
        """Which blocks they are."""
        first, last = self.numbers[0], self.numbers[-1]
        which = f"block {first}" if first == last else f"blocks {first} to {last}"
        return f"{which}; one holds a bias table" if self.bias_table else which

    def names(self, module: str = "") -> list[str]:
        """Return the names of the blocks, or of one module in each of them."""
        return [f"{self.list_name}.{number}{f'.{module}' if module else ''}" for number in self.numbers]


@dataclass(frozen=True)
class Stack:
    """Blocks with what stands before and behind them."""

    name: str
    """encoder or decoder; of other models the name of the module."""
    orders: tuple[str, ...]
    """How it knows the order of words."""
    before: tuple[Part, ...]
    blocks: tuple[Blocks, ...]
    behind: tuple[Part, ...]
    reads: str
    gives: str
    """What comes out; empty where another stack reads it."""


@dataclass(frozen=True)
class Architecture:
    """A model as its configuration and its modules say."""

    name: str
    model_class: str
    model_type: str
    family: str
    parameters: int
    width: int | None
    vocabulary: int | None
    context: int | None
    """Tokens that its positions reach; None where they have no end."""
    stacks: tuple[Stack, ...]
    other: int
    """Parameters of what is part of no stack, or is not used for a text."""
    untraced: str | None
    """Why the model could not be run on shapes: then its parts stand as they are declared, and no path is drawn."""


def describe_model(target: Target, fake: FakeModel) -> Architecture:
    """Describe the model of `target`; every parameter is counted in exactly one part."""
    model = fake.model
    config, context = model.config.get_text_config(), context_length(model.config)
    reader = _Reader(fake, target.family)
    stacks = tuple(reader.describe_stack(name) for name in reader.lists)
    counted = sum(part.parameters for stack in stacks for part in (*stack.before, *stack.behind))
    counted += sum(blocks.parameters for stack in stacks for blocks in stack.blocks)
    return Architecture(
        name=target.name,
        model_class=type(model).__name__,
        model_type=str(config.model_type),
        family=target.family,
        parameters=model.num_parameters(),
        width=getattr(config, "hidden_size", None),
        vocabulary=getattr(config, "vocab_size", None),
        context=context if context and context > 0 else None,
        stacks=stacks,
        other=model.num_parameters() - counted,
        untraced=reader.untraced,
    )


class _Reader:
    """A model with its calls, and what was counted of it."""

    def __init__(self, fake: FakeModel, family: str) -> None:
        self.model, self.family = fake.model, family
        self.config = fake.model.config.get_text_config()
        self.counted: set[int] = set()
        self.logits_shape: tuple[int, ...] = ()
        self.untraced: str | None = None
        try:
            calls, self.logits_shape = record_calls(fake)
        except UntraceableError as error:
            self.untraced = str(error)
            calls = [ModuleCall(name, module) for name, module in find_units(fake.model).items()]
        self.runs = Counter(call.name for call in calls)
        self.calls = {call.name: call for call in reversed(calls)}  # the first of each
        self.calls = dict(reversed(self.calls.items()))
        self.lists = self._find_lists()

    def _find_lists(self) -> list[str]:
        """Return the names of the lists of blocks in the order of their use; the outermost alone."""
        attends = {
            name
            for name, part in self.model.named_modules()
            if isinstance(part, nn.ModuleList)
            and any("attention" in type(module).__name__.lower() for module in part.modules())
        }
        found: list[str] = []
        for call in self.calls:
            parents = [call[: match.start()] for match in re.finditer(r"\.\d+\.", call)]
            found += [name for name in parents if name in attends][:1]
        return list(dict.fromkeys(found))

    def describe_stack(self, name: str) -> Stack:
        """Describe the stack whose blocks are in the list `name`."""
        owner = name.rpartition(".")[0]
        role = next((half for half in ("encoder", "decoder") if half in owner.split(".")), None)
        word = role if self.family == "encoder-decoder" and role else self.family if len(self.lists) == 1 else owner
        own = [call for call in self.calls.values() if self._stack_of(call.name) == name]
        inside = [at for at, call in enumerate(own) if call.name.startswith(f"{name}.")]
        first = own[: inside[0]]
        last = [call for at, call in enumerate(own) if at > inside[0] and at not in inside]
        config = getattr(self.model.get_submodule(owner), "config", None) or self.config
        orders = tuple(dict.fromkeys(find_orders(config, self.model.get_submodule(owner), first)))
        before, blocks = self._describe_pieces(first), tuple(self._group_blocks(name, word, orders))
        behind = self._describe_pieces(last, len(before))
        final = name == self.lists[-1]
        if final and behind and behind[-1].title == "Linear":
            behind = (*behind[:-1], replace(behind[-1], title="Head"))
        reads = "recording" if any(part.kind == "convolutions" for part in before) else "words"
        if self.family == "encoder-decoder" and word == "decoder":
            reads = "words written so far"
        return Stack(word, orders, before, blocks, behind, reads, self._describe_output(behind) if final else "")

    def _stack_of(self, module: str) -> str:
        """Return the stack that a module belongs to: that of the half that it is part of, else the last."""
        halves = (name for name in self.lists if module.startswith(f"{name.rpartition('.')[0]}."))
        return next(halves, self.lists[-1])

    def _describe_output(self, behind: Sequence[Part]) -> str:
        vocabulary, width = getattr(self.config, "vocab_size", None), getattr(self.config, "hidden_size", None)
        outputs = self.logits_shape[-1] if self.logits_shape else None
        if outputs is None:
            pooled = any("once" in part.about for part in behind)
            return f"{width:,} numbers for each word{', and as many for the text' if pooled else ''}" if width else ""
        if outputs == vocabulary:
            return f"a score for each of {outputs:,} tokens"
        return f"{outputs:,} scores for {'the text' if len(self.logits_shape) == 2 else 'each token'}"

    # Blocks

    def _group_blocks(self, name: str, stack: str, orders: Sequence[str]) -> Iterator[Blocks]:
        """Yield runs of blocks that are built alike."""
        blocks: list[Blocks] = []
        for number in sorted(
            {int(call[len(name) + 1 :].split(".")[0]) for call in self.calls if call.startswith(f"{name}.")}
        ):
            block = f"{name}.{number}"
            calls = [call for call in self.calls.values() if call.name.startswith(f"{block}.")]
            tables = [call for call in calls if call.name.endswith(BIASES)]
            branches = find_branches(self.model, block, [call for call in calls if call not in tables])
            sublayers = tuple(self._describe_sublayer(block, joined, stack, orders) for joined in branches)
            bias = sum(weights.parameters for call in tables for weights in self._read_weights(call, block))
            size = sum(part.parameters for sublayer in sublayers for part in sublayer.parts)
            runs = min(self.runs[call.name] for call in calls)
            before = blocks[-1] if blocks else None
            if before and (before.sublayers, before.runs) == (sublayers, runs):
                blocks[-1] = replace(before, numbers=(*before.numbers, number), bias_table=before.bias_table + bias)
            else:
                blocks.append(Blocks(name, (number,), runs, sublayers, size, bias))
        yield from blocks

    def _describe_sublayer(self, block: str, branches: Sequence[Branch], stack: str, orders: Sequence[str]) -> Sublayer:
        def norms(calls: Sequence[ModuleCall]) -> tuple[Part, ...]:
            return tuple(self._describe_norm(call, block) for call in calls)

        described = tuple(
            (*norms(branch.before), self._describe_branch(block, branch, stack, orders), *norms(branch.after))
            for branch in branches
        )
        return Sublayer(described, norms(branches[-1].behind))

    def _describe_norm(self, call: ModuleCall, block: str = "") -> Part:
        return Part("norm", norm_kind(call.module), "", tuple(self._read_weights(call, block)))

    def _describe_branch(self, block: str, branch: Branch, stack: str, orders: Sequence[str]) -> Part:
        weights = [found for call in (*branch.calls, *branch.inner) for found in self._read_weights(call, block)]
        title = TITLES[branch.role]
        if "attention" not in branch.role:
            return Part(branch.role, title, describe_feed_forward(self.config, branch.calls), tuple(weights))
        about = [describe_heads(self.config, stack)]
        if branch.inner:
            about.append(f"{norm_kind(branch.inner[0].module)} on queries and keys")
        if branch.role == "cross-attention":
            about.append("keys and values: encoder")
        else:
            title = "Masked self-attention" if stack == "decoder" else title
            about += [order for order in orders if order.startswith(("rotary", "relative", "linear"))]
            about.append(describe_window(self.config, causal=stack == "decoder"))
        return Part(branch.role, title, "; ".join(filter(None, about)), tuple(weights))

    def _read_weights(self, call: ModuleCall, block: str = "") -> Iterator[Weights]:
        """Yield the weights of a module; parameters count for the part that uses them first."""
        module = call.module
        groups = {call.name: list(module.parameters())}
        if not isinstance(module, PLAIN) and not call.is_norm:
            own = module.named_parameters(recurse=False)
            groups = {f"{call.name}.{key}".removesuffix(".weight"): [value] for key, value in own}
        for name, parameters in groups.items():
            size = sum(value.numel() for value in parameters if id(value) not in self.counted)
            self.counted |= {id(value) for value in parameters}
            yield Weights(name.removeprefix(f"{block}."), write_shape(module, parameters), size)

    # Beside the blocks

    def _describe_pieces(self, calls: Sequence[ModuleCall], before: int = 0) -> tuple[Part, ...]:
        """Describe what stands before or behind the blocks; a list of convolutions is drawn as one."""
        pieces: list[Part] = []
        lists: Counter[str] = Counter()
        for call in calls:
            listed = re.match(r"(.+?)\.\d+\.", call.name)
            if listed is None:
                pieces.append(self._describe_piece(call, first=not before and not pieces))
                continue
            size = sum(weights.parameters for weights in self._read_weights(call))
            if listed[1] not in lists:
                pieces.append(Part("convolutions", "", "", ()))
            lists[listed[1]] += isinstance(call.module, _ConvNd)
            whole = sum(found.parameters for found in pieces[-1].weights) + size
            title = f"{lists[listed[1]]} convolutions"
            pieces[-1] = replace(pieces[-1], title=title, weights=(Weights(listed[1], "", whole),))
        return tuple(pieces)

    def _describe_piece(self, call: ModuleCall, *, first: bool) -> Part:
        """Describe a part beside the blocks; positions and types of tokens are added to what comes before them."""
        if call.is_norm:
            return self._describe_norm(call)
        module, last = call.module, call.name.rpartition(".")[2]
        known = any(id(value) in self.counted for value in module.parameters())
        weights = tuple(self._read_weights(call))
        about = weights[0].shape if weights else "computed"
        tied = known and not isinstance(module, _ConvNd)
        about += (", the embedding’s weights" if linear_shape(module) else ", same weights") if tied else ""
        if is_positions(call):
            return Part("positions", "Positions", about, weights, tied, added=not first)
        if isinstance(module, nn.Embedding):
            types = "type" in last
            return Part("embedding", "Token types" if types else "Embedding", about, weights, tied, added=types)
        if isinstance(module, _ConvNd):
            about = f"over {module.kernel_size[0]}, every {module.stride[0]}"
            return Part("convolutions", "Convolution", about, weights)
        if not linear_shape(module):
            return Part("other", type(module).__name__, about, weights, tied)
        if call.output is not None and math.prod(call.output.shape[:-1]) == 1:
            about += ", once for the text"
        return Part("linear", "Pooler" if "pooler" in call.name else "Linear", about, weights, tied)
