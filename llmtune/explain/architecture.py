"""The parts of a model in execution order: embeddings, blocks, norms, head; read from modules and configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig

from llmtune.explain.explainer import Target
from llmtune.explain.fake_model import FakeModel, UntraceableError
from llmtune.explain.module_tree import PLAIN, Group, Place, Unit, find_units, group_units, norm_kind, write_shape
from llmtune.explain.position_encodings import SLOPED
from llmtune.model.config import layer_configs, linear_shape
from llmtune.model.memory_plan import context_length

PART_TITLES = {
    "attention": "Self-attention",
    "cross-attention": "Cross-attention",
    "feed-forward": "Feed-forward",
    "experts": "Experts",
    "convolution": "Convolution",
}
BIASES = ("relative_attention_bias", "rel_embeddings", "relative_attention_bias_embedding")
"""Last parts of the names of modules with a relative position bias."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "activation")
"""Keys of a configuration that name the activation."""


@dataclass(frozen=True)
class Weights:
    """One module with weights, or one parameter of a module with several matrices."""

    name: str
    """In a block: relative to the block."""
    shape: str
    parameters: int
    """Its own parameters; a shared weight counts for the part that uses it first."""


@dataclass(frozen=True)
class ModelPart:
    """One drawn part of a model."""

    kind: str
    """embedding, positions, norm, linear, convolutions, other, or a role within a block."""
    title: str
    about: str = ""
    weights: tuple[Weights, ...] = ()
    place: Place = ""
    """How the part is connected within its block."""
    added: bool = False
    """Whether its output is added to its input from below; in a block, to the residual path."""
    tied: bool = False
    """Whether it shares the weights of an earlier part."""

    @property
    def names(self) -> list[str]:
        """The names of its modules."""
        return [weights.name for weights in self.weights]

    @property
    def parameters(self) -> int:
        """Its own."""
        return sum(weights.parameters for weights in self.weights)


@dataclass(frozen=True)
class Blocks:
    """A run of identical blocks."""

    list_name: str
    numbers: tuple[int, ...]
    """Their indices in the module list, from 0."""
    runs: int
    """How often a text passes through each block; more than once if weights are shared."""
    parts: tuple[ModelPart, ...]
    bias_table: int = 0
    """Parameters of the relative position bias that the first block holds for all, as in T5."""

    @property
    def typical(self) -> int:
        """Parameters of one block."""
        return sum(part.parameters for part in self.parts)

    @property
    def title(self) -> str:
        """The heading, such as "blocks 0 to 29"."""
        first, last = self.numbers[0], self.numbers[-1]
        which = f"block {first}" if first == last else f"blocks {first} to {last}"
        return f"{which}; one holds a bias table" if self.bias_table else which

    def names(self, module: str = "") -> list[str]:
        """Return the names of the blocks, or of one module in each of them."""
        return [f"{self.list_name}.{number}{f'.{module}' if module else ''}" for number in self.numbers]


@dataclass(frozen=True)
class Stack:
    """Blocks, and the parts before and after them."""

    name: str
    """encoder, decoder, or for other models the name of the module."""
    orders: tuple[str, ...]
    """How it represents the order of tokens."""
    before: tuple[ModelPart, ...]
    blocks: tuple[Blocks, ...]
    behind: tuple[ModelPart, ...]
    reads: str
    gives: str
    """Its output in words; empty if another stack reads it."""


@dataclass(frozen=True)
class Architecture:
    """A model as described by its configuration and modules."""

    name: str
    model_class: str
    model_type: str
    family: str
    parameters: int
    width: int | None
    vocabulary: int | None
    context: int | None
    """Maximum number of tokens; None if unlimited."""
    stacks: tuple[Stack, ...]
    other: int
    """Parameters outside every stack, or not used for a text."""
    towers: Mapping[str, int]
    """Parameters of the modules that read images, video or sound. No stack has them."""
    reads_images: bool
    """Whether the model keeps its towers, and their parameters count; otherwise they are left out."""
    untraced: str | None
    """Why the model could not run on shapes. Its parts are then in declared order, and no path is drawn."""


def describe_architecture(target: Target, fake: FakeModel) -> Architecture:
    """Describe the model of `target`; each parameter counts for exactly one part."""
    model = fake.model
    config, context = model.config.get_text_config(), context_length(model.config)
    reader = _Reader(fake, target.family)
    stacks = tuple(reader.describe_stack(name) for name in reader.lists)
    towers = sum(fake.towers.values()) if target.takes_images else 0
    used = {value for unit in reader.units for value in unit.module.parameters()} if stacks else set()
    return Architecture(
        name=target.name,
        model_class=type(model).__name__,
        model_type=str(config.model_type),
        family=target.family,
        parameters=model.num_parameters() + towers,
        width=getattr(config, "hidden_size", None),
        vocabulary=getattr(config, "vocab_size", None),
        context=context if context and context > 0 else None,
        stacks=stacks,
        other=model.num_parameters() - sum(value.numel() for value in used),
        towers=fake.towers,
        reads_images=target.takes_images,
        untraced=reader.untraced,
    )


class _Reader:
    """A model with its units in execution order, and the weights counted so far."""

    def __init__(self, fake: FakeModel, family: str) -> None:
        self.model, self.family = fake.model, family
        self.config = fake.model.config.get_text_config()
        self.counted: set[int] = set()
        self.logits_shape: tuple[int, ...] = ()
        self.untraced: str | None = None
        try:
            calls, self.logits_shape = fake.record_calls()
        except UntraceableError as error:
            self.untraced = str(error)
            calls = find_units(fake.model)
        self.runs = Counter(unit.name for unit in calls)
        self.units = list(dict.fromkeys(calls))
        self.lists = self._find_lists()

    def _find_lists(self) -> list[str]:
        """Return the names of the outermost block lists, in execution order."""
        attends = {
            name
            for name, part in self.model.named_modules()
            if isinstance(part, nn.ModuleList)
            and any("attention" in type(module).__name__.lower() for module in part.modules())
        }
        names: list[str] = []
        for unit in self.units:
            parents = [unit.name[: match.start()] for match in re.finditer(r"\.\d+\.", unit.name)]
            names += [name for name in parents if name in attends][:1]
        return list(dict.fromkeys(names))

    def describe_stack(self, name: str) -> Stack:
        """Describe the stack with the block list `name`."""
        owner = name.rpartition(".")[0]
        role = next((half for half in ("encoder", "decoder") if half in owner.split(".")), None)
        word = role if self.family == "encoder-decoder" and role else self.family if len(self.lists) == 1 else owner
        stack_units = [unit for unit in self.units if self._stack_of(unit.name) == name]
        start = next(at for at, unit in enumerate(stack_units) if unit.name.startswith(f"{name}."))
        outside = [unit for unit in stack_units[start:] if not unit.name.startswith(f"{name}.")]
        config = getattr(self.model.get_submodule(owner), "config", None) or self.config
        orders = tuple(dict.fromkeys(find_orders(config, self.model.get_submodule(owner), stack_units[:start])))
        before, blocks = self._describe_pieces(stack_units[:start]), tuple(self._group_blocks(name, word, orders))
        behind = self._describe_pieces(outside, len(before))
        final = name == self.lists[-1]
        if final and behind and behind[-1].title == "Linear":
            behind = (*behind[:-1], replace(behind[-1], title="Head"))
        reads = "recording" if any(part.kind == "convolutions" for part in before) else "words"
        if self.family == "encoder-decoder" and word == "decoder":
            reads = "words written so far"
        return Stack(word, orders, before, blocks, behind, reads, self._describe_output(behind) if final else "")

    def _stack_of(self, module: str) -> str:
        """Return the stack of a module: that of its half, else the last."""
        halves = (name for name in self.lists if module.startswith(f"{name.rpartition('.')[0]}."))
        return next(halves, self.lists[-1])

    def _describe_output(self, behind: Sequence[ModelPart]) -> str:
        vocabulary, width = getattr(self.config, "vocab_size", None), getattr(self.config, "hidden_size", None)
        if not self.logits_shape:
            pooled = any("once" in part.about for part in behind)
            return f"{width:,} numbers for each word{', and as many for the text' if pooled else ''}" if width else ""
        outputs = self.logits_shape[-1]
        if outputs == vocabulary:
            return f"a score for each of {outputs:,} tokens"
        return f"{outputs:,} scores for {'the text' if len(self.logits_shape) == 2 else 'each token'}"

    # Blocks

    def _group_blocks(self, name: str, stack: str, orders: Sequence[str]) -> list[Blocks]:
        """Group consecutive blocks with the same structure."""
        blocks: list[Blocks] = []
        inside = [unit for unit in self.units if unit.name.startswith(f"{name}.")]
        for number in sorted({int(unit.name[len(name) + 1 :].split(".")[0]) for unit in inside}):
            block = f"{name}.{number}"
            units = [unit for unit in inside if unit.name.startswith(f"{block}.")]
            tables = [unit for unit in units if unit.name.endswith(BIASES)]
            groups = group_units(self.model, block, [unit for unit in units if unit not in tables], self.config)
            parts = tuple(self._describe_part(block, group, stack, orders) for group in groups)
            bias = sum(weights.parameters for unit in tables for weights in self._read_weights(unit, block))
            runs = min(self.runs[unit.name] for unit in units)
            before = blocks[-1] if blocks else None
            if before and (before.parts, before.runs) == (parts, runs):
                blocks[-1] = replace(before, numbers=(*before.numbers, number), bias_table=before.bias_table + bias)
            else:
                blocks.append(Blocks(name, (number,), runs, parts, bias))
        return blocks

    def _describe_part(self, block: str, group: Group, stack: str, orders: Sequence[str]) -> ModelPart:
        """Describe a part of a block."""
        weights = tuple(
            unit_weights for unit in (*group.units, *group.inner) for unit_weights in self._read_weights(unit, block)
        )
        kind, details = group.role, [""]
        title = norm_kind(group.units[0].module) if kind == "norm" else PART_TITLES[kind]
        if "attention" in kind:
            layers = layer_configs(self.config)
            details = [describe_heads(layers[min(int(block.rpartition(".")[2]), len(layers) - 1)], stack)]
            if group.inner:
                details.append(f"{norm_kind(group.inner[0].module)} on queries and keys")
            if kind == "cross-attention":
                details.append("keys and values: encoder")
            else:
                title = f"Masked {title.lower()}" if stack == "decoder" else title
                details += [order for order in orders if order.startswith(("rotary", "relative", "linear"))]
                details.append(describe_window(self.config, causal=stack == "decoder"))
        elif kind != "norm":
            details = [describe_feed_forward(self.config, group.units)]
        return ModelPart(kind, title, "; ".join(filter(None, details)), weights, group.place, group.added)

    def _read_weights(self, unit: Unit, block: str = "") -> Iterator[Weights]:
        """Yield the weights of a module; shared parameters count for their first user."""
        module = unit.module
        groups = {unit.name: list(module.parameters())}
        if not isinstance(module, PLAIN) and not unit.is_norm:
            parts = module.named_parameters(recurse=False)
            groups = {f"{unit.name}.{key}".removesuffix(".weight"): [value] for key, value in parts}
        for name, parameters in groups.items():
            size = sum(value.numel() for value in parameters if id(value) not in self.counted)
            self.counted |= {id(value) for value in parameters}
            yield Weights(name.removeprefix(f"{block}."), write_shape(module, parameters), size)

    # Outside the blocks

    def _describe_pieces(self, units: Sequence[Unit], before: int = 0) -> tuple[ModelPart, ...]:
        """Describe the parts before or after the blocks; draw a list of convolutions as one part."""
        pieces: dict[str, ModelPart] = {}
        for unit in units:
            listed = re.match(r"(.+?)\.\d+\.", unit.name)
            if listed is None:
                pieces[unit.name] = self._describe_piece(unit, first=not before and not pieces)
                continue
            together = [one for one in units if one.name.startswith(f"{listed[1]}.")]
            sizes = sum(weights.parameters for weights in self._read_weights(unit))
            sizes += pieces[listed[1]].parameters if listed[1] in pieces else 0
            title = f"{sum(isinstance(one.module, _ConvNd) for one in together)} convolutions"
            pieces[listed[1]] = ModelPart("convolutions", title, "", (Weights(listed[1], "", sizes),))
        return tuple(pieces.values())

    def _describe_piece(self, unit: Unit, *, first: bool) -> ModelPart:
        """Describe a part outside the blocks; positions and token types are added to the previous part."""
        module, last = unit.module, unit.name.rpartition(".")[2]
        shared = any(id(value) in self.counted for value in module.parameters())
        weights = tuple(self._read_weights(unit))
        if unit.is_norm:
            return ModelPart("norm", norm_kind(module), "", weights)
        if isinstance(module, _ConvNd) and not is_positions(unit):
            description = f"over {module.kernel_size[0]}, every {module.stride[0]}"
            return ModelPart("convolutions", "Convolution", description, weights)
        tied = shared and not isinstance(module, _ConvNd)
        description = weights[0].shape if weights else "computed"
        description += (", the embedding’s weights" if linear_shape(module) else ", same weights") if tied else ""
        if is_positions(unit):
            return ModelPart("positions", "Positions", description, weights, added=not first, tied=tied)
        if isinstance(module, nn.Embedding):
            title = "Token types" if "type" in last else "Embedding"
            return ModelPart("embedding", title, description, weights, added="type" in last, tied=tied)
        if not linear_shape(module):
            return ModelPart("other", type(module).__name__, description, weights, tied=tied)
        pooler = "pooler" in unit.name
        once = pooler or ("classifier" in unit.name and len(self.logits_shape) == 2)
        return ModelPart(
            "linear", "Pooler" if pooler else "Linear", description + ", once for the text" * once, weights, tied=tied
        )


# Texts of the boxes


def describe_heads(config: PretrainedConfig, half: str) -> str:
    """Describe the number and size of heads, and the number of key-value heads if smaller."""
    keys = (f"{half}_attention_heads", "num_attention_heads", "num_heads", "n_head")
    heads = next((number for key in keys if isinstance(number := getattr(config, key, None), int)), 0)
    if not heads:
        return ""
    width = getattr(config, "hidden_size", None)
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or (width and width // heads)
    fewer = getattr(config, "num_key_value_heads", None) or heads
    return f"{heads} heads of {size}" + (f", {fewer} for keys and values" if fewer < heads else "")


def describe_feed_forward(config: PretrainedConfig, units: Sequence[Unit]) -> str:
    """Describe width, number of experts, activation, and whether the layer is gated."""
    shapes = [shape for unit in units if (shape := linear_shape(unit.module))]
    experts = [part.shape[0] for unit in units for part in unit.module.parameters() if part.ndim == 3]
    wide = shapes[-1][0] if shapes else 0
    gated = bool(experts) or len(shapes) > 2 or (wide and shapes[0][1] == 2 * wide)
    size = f"{experts[0]} experts, a router" if experts else f"{wide:,} wide" if wide else ""
    activation = next((str(getattr(config, key)) for key in ACTIVATIONS if getattr(config, key, None)), "")
    return ", ".join(filter(None, [size, activation, "gated" if gated else ""]))


def describe_window(config: PretrainedConfig, *, causal: bool) -> str:
    """Describe the sliding window of a configuration, if it has one."""
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or [])
    sliding = sum(bool(re.search("sliding|local|chunked", kind)) for kind in kinds)
    if not window or (kinds and not sliding) or getattr(config, "use_sliding_window", True) is False:
        return ""
    reach = f"window {window:,} tokens back" if causal else f"window {window:,} each way"
    return f"{reach} in {sliding} of {len(kinds)} layers" if kinds and sliding < len(kinds) else reach


def is_positions(unit: Unit) -> bool:
    """Whether a module adds positions to its input."""
    last = unit.name.rpartition(".")[2].lower()
    return "pos" in last or last == "wpe" or "Positional" in type(unit.module).__name__ or "pos_conv" in unit.name


def find_orders(config: PretrainedConfig, owner: nn.Module, before: Sequence[Unit]) -> Iterator[str]:
    """Yield a stack's position encodings, from its modules and configuration."""
    for unit in filter(is_positions, before):
        weight = getattr(unit.module, "weight", None)
        if "pos_conv" in unit.name:
            yield "a convolution over neighbours"
        else:
            sines = "sinus" in type(unit.module).__name__.lower() or weight is None or not weight.requires_grad
            yield "sines, fixed" if sines else "a learned table"
    inside = dict(owner.named_modules())
    rotary = any("rotary" in type(module).__name__.lower() for module in inside.values())
    if rotary or getattr(config, "rotary_dim", None):
        yield "rotary: queries and keys are turned by their position"
    if any(name.endswith(BIASES) for name in inside):
        yield "relative: a learned bias by distance"
    if config.model_type in SLOPED or getattr(config, "alibi", False):
        yield "linear biases by distance (ALiBi)"
