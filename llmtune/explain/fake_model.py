"""A model without its weights: built from its configuration and run on shapes alone, to count the cost of a text.

torch counts the operations by length: a product of [M, K] with [K, N] is 2 M K N. Sums, norms and softmax do not
count, as usual. Attention counts over all pairs of positions, including masked ones. One block is
also timed, with real numbers.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from llmtune.display.console import track_items
from llmtune.errors import first_line
from llmtune.explain.explainer import Target
from llmtune.explain.module_tree import Unit, find_units
from llmtune.explain.trained_modules import read_tensor, tensor_files
from llmtune.model.config import architecture_class, find_class
from llmtune.model.device import is_out_of_memory, pick_device
from llmtune.model.processor import count_ids
from llmtune.model.towers import find_towers, remove_towers
from llmtune.records import ModelRef

UNRUNNABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError)
"""Errors of models that read values while they run."""
SHORTEST = 8
"""Tokens of the text; a speech model reads its full window."""
COUNTED, CHECKED = (16, 23, 41), 1021
"""Lengths in tokens for counting products and for checking the formula. They are odd:
blocks of a fixed size do not divide them."""
BATCHED = ("aten.bmm", "aten.baddbmm")
"""Operators that multiply activations with activations."""
LONGEST, MOST_SHOWN = 2048, 8192
BUDGET_SECONDS, RUN_SECONDS = 10.0, 0.25
"""Time limits for all lengths, and for one; the fastest run counts."""
MOST_BYTES = 1 << 30
"""Maximum parameters of a timed block."""
Polynomial = npt.NDArray[np.int64]
"""a, b and c of a + b L + c L²."""
Arguments = tuple[tuple[object, ...], dict[str, object]]
logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it logs unsupported operators before raising


class UntraceableError(Exception):
    """The model cannot be run on shapes alone, or its cost is no polynomial of the length."""


@dataclass(frozen=True)
class FakeModel:
    """A model whose tensors have shapes and no numbers."""

    model: PreTrainedModel
    mode: FakeTensorMode
    towers: Mapping[str, int]
    """Parameters of the modules that it lost, which text does not use."""

    def run(self, tokens: int) -> Any:
        """Return the model's output for a text of `tokens` tokens; raises UntraceableError if it cannot run."""
        try:
            with self.mode, torch.no_grad():
                inputs: dict[str, Any] = {**shape_inputs(self.model, tokens)}
                if "use_cache" in inspect.signature(self.model.forward).parameters:
                    inputs["use_cache"] = False
                return self.model(**inputs)
        except UNRUNNABLE as error:
            raise UntraceableError(first_line(error)) from error

    def record_calls(self) -> tuple[list[Unit], tuple[int, ...]]:
        """Return the units in execution order, and the shape of the logits.

        Raises UntraceableError if the model cannot run on shapes.
        """
        calls: list[Unit] = []
        with ExitStack() as hooks:
            for unit in find_units(self.model):
                hook = unit.module.register_forward_pre_hook(lambda *_, unit=unit: calls.append(unit))
                hooks.callback(hook.remove)
            logits = getattr(self.run(SHORTEST), "logits", None)
        return calls, tuple(getattr(logits, "shape", ()))


def build_fake_model(target: Target) -> FakeModel:
    """Build the target's model without weights, in the class it is loaded in; for a run, its task's class."""
    folder = Path(target.config.name_or_path)
    if target.task is not None and target.recipe is not None:
        model_class, config = find_class(ModelRef(target.name, folder, None, ""), target.recipe, target.task)
    else:
        own_code = not type(target.config).__module__.startswith("transformers.")
        model_class, config = architecture_class(target.config, own_code), copy.deepcopy(target.config)

    def build() -> PreTrainedModel:
        if hasattr(model_class, "from_config"):  # an Auto class
            own_code = bool(getattr(config, "auto_map", None))
            return model_class.from_config(config, trust_remote_code=own_code, attn_implementation="eager")
        return model_class._from_config(config, attn_implementation="eager")

    fake = fake_model(build)
    untied = find_untied(fake.model, folder)
    with fake.mode, torch.no_grad():
        for name in untied:
            owner, _, last = name.rpartition(".")
            weight = fake.model.get_parameter(name)
            setattr(fake.model.get_submodule(owner), last, torch.nn.Parameter(torch.empty(weight.shape)))
        grows = target.recipe is not None and bool(target.recipe.model.add_tokens)
        if grows and (needed := count_ids(target.processor)) > fake.model.get_input_embeddings().weight.shape[0]:
            fake.model.resize_token_embeddings(needed, mean_resizing=False)
    return fake


def fake_model(build: Callable[[], PreTrainedModel]) -> FakeModel:
    """Build a model in fake tensors, without the towers that text does not use."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, no_init_weights():
        model = build().eval()
        parts = {name: model.get_submodule(name) for name in find_towers(model)}
        towers = {name: sum(one.numel() for one in part.parameters()) for name, part in parts.items()}
        remove_towers(model)
    with mode:
        model.tie_weights()
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")  # routes to experts without reading values
    return FakeModel(cast("PreTrainedModel", model), mode, towers)


def find_untied(model: PreTrainedModel, folder: Path) -> list[str]:
    """Return tied weights that the files store separately; transformers unties them on loading too."""
    files = tensor_files(folder)
    return [
        second
        for second, first in (model.all_tied_weights_keys or {}).items()
        if first in files
        and second in files
        and not torch.equal(read_tensor(files[first], first), read_tensor(files[second], second))
    ]


def shape_inputs(model: PreTrainedModel, tokens: int) -> dict[str, torch.Tensor]:
    """Return the inputs for a text of `tokens` tokens: ids, or a recording with that many frames."""
    config = model.config
    ids = torch.ones((1, tokens), dtype=torch.long)
    name = model.main_input_name
    if name == "input_features":  # Whisper reads a window of fixed size
        inputs = {name: torch.zeros((1, config.num_mel_bins, 2 * config.max_source_positions))}
    elif name == "input_values":
        samples = tokens  # enough for that many frames: the convolutions inverted
        for size, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + size
        inputs = {name: torch.zeros((1, samples))}
    else:
        inputs = {"input_ids": ids}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


# Cost of a text


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of one forward pass over L tokens, in both halves of an encoder-decoder."""

    total: Polynomial
    attention: Polynomial
    """Attention's own products: queries with keys, weights with values. All others use model weights."""

    @property
    def others(self) -> Polynomial:
        """All products but attention's own."""
        return self.total - self.attention

    def crossing(self) -> int | None:
        """Return the length from which attention's own products cost more than all others; None if never."""
        more = self.attention - self.others
        if more[2] <= 0 or evaluate_cost(more, 1) >= 0:
            return None
        root = int(max(np.roots(more[::-1]).real))
        return next(n for n in range(max(1, root - 1), root + 3) if evaluate_cost(more, n) >= 0)

    def at(self, tokens: int) -> dict[str, float]:
        """Return the cost of a text of `tokens` tokens."""
        whole = evaluate_cost(self.total, tokens)
        shared = evaluate_cost(self.attention, tokens) / whole
        return {"tokens": tokens, "flops": whole, "flops_per_token": whole / tokens, "attention_share": shared}


def evaluate_cost(polynomial: Polynomial, tokens: int) -> int:
    """Return the polynomial's value for `tokens` tokens."""
    return int(polynomial @ (1, tokens, tokens * tokens))


def count_cost(fake: FakeModel, context: int | None) -> Cost:
    """Count the operations of the model by length.

    Raises UntraceableError if it cannot run on shapes, or if the count at a fourth length differs from the
    formula, as for attention within blocks of a fixed size.
    """
    longest = min(CHECKED, context or CHECKED)
    lengths = COUNTED if longest > max(COUNTED) else (1, 2, 3)
    counts = [count_flops(fake, tokens) for tokens in (*lengths, longest)]
    polynomials = []
    for name, totals in zip(("a text", "attention"), zip(*counts, strict=True), strict=True):
        polynomials.append(np.rint(np.linalg.solve(np.vander(lengths, 3, True), totals[:3])).astype(np.int64))
        if evaluate_cost(polynomials[-1], longest) != totals[3]:
            raise UntraceableError(f"the cost of {name} is no polynomial of the length")
    return Cost(*polynomials)


def count_flops(fake: FakeModel, tokens: int) -> tuple[int, int]:
    """Return the operations of a forward pass over `tokens` tokens, and those of attention's own products."""
    with fake.mode, FlopCounterMode(display=False) as counter:
        fake.run(tokens)
    attends = [name for name, part in fake.model.named_modules() if "attention" in type(part).__name__.lower()]
    outer = [name for name in attends if not any(name.startswith(f"{other}.") for other in attends)]
    counts, whole = counter.get_flop_counts(), type(fake.model).__name__
    products = (counts.get(f"{whole}.{name}", {}).items() for name in outer)
    attention_flops = sum(
        flops for layer_counts in products for operation, flops in layer_counts if str(operation) in BATCHED
    )
    return counter.get_total_flops(), attention_flops


def choose_lengths(context: int | None) -> list[int]:
    """Return the lengths to show: powers of two from 64 up to the model's context."""
    most = min(context or MOST_SHOWN, MOST_SHOWN)
    return [tokens for tokens in (64 * 2**i for i in range(20)) if tokens <= most] or [most]


# Seconds


@dataclass(frozen=True)
class BlockTiming:
    """The time of one block for a text of `tokens` tokens."""

    tokens: int
    block_seconds: float
    attention_seconds: float


@dataclass(frozen=True)
class MeasuredBlock:
    """A block's time by length, on this machine."""

    block: str
    attention: str
    """The name of its self-attention module, relative to the block."""
    device: str
    threads: int
    points: tuple[BlockTiming, ...]
    """One timing per length, until the time limit."""


def measure_block(
    fake: FakeModel, name: str, context: int | None, console: Console, *, budget_seconds: float = BUDGET_SECONDS
) -> MeasuredBlock | str:
    """Run the block `name` over longer and longer texts, in float32 and with plain attention.

    Return its timings, or the reason why it could not run.
    """
    block, device = fake.model.get_submodule(name), pick_device()
    parameters = sum(parameter.numel() for parameter in block.parameters())
    if 4 * parameters > MOST_BYTES:
        return f"a block has {parameters:,} parameters, too many to time it here"
    attention = next((name for name, part in block.named_modules() if type(part).__name__.endswith("Attention")), "")
    lengths = choose_lengths(min(context or LONGEST, LONGEST))
    points: list[BlockTiming] = []
    try:
        modules = [block, block.get_submodule(attention)]
        arguments = {tokens: capture_arguments(fake, modules, tokens) for tokens in lengths}
        block._apply(lambda fake: _filled(fake, 0.02, device))
        ends, least = time.perf_counter() + budget_seconds, min(RUN_SECONDS, budget_seconds / 20)
        for tokens in track_items(console, lengths, "measuring"):
            if points and time.perf_counter() + 5 * points[-1].block_seconds > ends:
                break
            seconds = [time_module(*pair, device, least) for pair in zip(modules, arguments[tokens], strict=True)]
            points.append(BlockTiming(tokens, *seconds))
    except (UntraceableError, RuntimeError, TypeError, ValueError, KeyError) as error:
        if is_out_of_memory(error):
            return "not enough memory for one block"
        return f"a block cannot run alone: {error}"
    return MeasuredBlock(name, attention, device, torch.get_num_threads(), tuple(points))


def capture_arguments(fake: FakeModel, modules: Sequence[torch.nn.Module], tokens: int) -> list[Arguments]:
    """Return the arguments of calls to `modules`, as fake tensors."""
    arguments: dict[torch.nn.Module, Arguments] = {}

    def keep(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        arguments[module] = (args, kwargs)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        fake.run(tokens)
    return [arguments[module] for module in modules]


def time_module(module: torch.nn.Module, arguments: Arguments, device: str, least_seconds: float) -> float:
    """Return the seconds of the fastest run; synchronises a GPU."""

    def fill(part: object) -> object:
        return _filled(part, 1, device) if isinstance(part, torch.Tensor) else part

    args, kwargs = tree_map(fill, arguments)
    timer = Timer(
        "with torch.inference_mode():\n    module(*args, **kwargs)",
        globals={"torch": torch, "module": module, "args": args, "kwargs": kwargs},
        num_threads=torch.get_num_threads(),
    )
    return float(min(timer.blocked_autorange(min_run_time=least_seconds).times))


def _filled(fake: torch.Tensor, value: float, device: str) -> torch.Tensor:
    return torch.full(fake.shape, value, dtype=fake.dtype, device=device)
