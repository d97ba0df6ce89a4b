"""Plan the memory of training, part by part, on the meta device before weights are loaded."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from llmtune.data.task_interface import StepCosts, TaskInterface
from llmtune.display.number_format import size as format_bytes
from llmtune.errors import DataError, EnvironmentProblem
from llmtune.model.chunked_cross_entropy import CHUNK_ELEMENTS
from llmtune.model.config import (
    build_skeleton,
    expert_parameters,
    find_class,
    head_names,
    in_heads,
    linear_shapes,
    trains_in_float32,
)
from llmtune.model.device import device_memory, resolve_dtype
from llmtune.model.quantized_base import BaseQuantization, kept_quantization
from llmtune.model.sharded_plan import divide_plan, fixed_bytes, plan_evaluation, plan_samples
from llmtune.model.towers import find_projectors, find_towers
from llmtune.recipe.adapter_section import MUTATING, AdapterSection
from llmtune.recipe.peft_options import options_of
from llmtune.recipe.schema import Recipe
from llmtune.records import ALONE, Layout, MemoryPlan, ModelRef

_OPTIMIZER_BYTES = {
    "sgd": 0.0,
    "muon": 4.0,
    "adafactor": 0.1,
    "lion": 4.0,
    "adagrad": 4.0,
    "rmsprop": 4.0,
    "ademamix": 12.0,
}
"""State bytes per trained parameter, by prefix of the optimiser's name; AdamW's two moments are 8."""
_SMALL = 4096
"""Matrices below this size keep their state in 32 bits in the 8-bit optimisers of bitsandbytes."""
_QUANTIZED_BYTES = {True: 0.516, False: 0.5625}
"""Bytes per 4-bit weight: blocks of 64 with a float32 scale each, or 8-bit scales with double quantisation."""
USABLE = 0.85
"""Fraction of the device's memory that a plan may fill: the rest is for kernels, fragmentation and the process."""
_LIBRARIES_BYTES = 650_000_000
"""Bytes that Python, torch and transformers take of shared memory, on a CPU; 0.63 GB measured."""
_CPU_TOKENS = 2048
"""Largest first micro-batch on a CPU: above it caches overflow and nothing gets faster."""
_CUDA_TOKENS = 32768


def plan_memory(
    model_ref: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    tokens: int,
    device: str,
    layout: Layout = ALONE,
    costs: StepCosts | None = None,
) -> MemoryPlan:
    """Estimate the bytes of training with `tokens` in a micro-batch, in one of the processes.

    With `costs`, the answers that training samples are planned too.
    Raises RecipeError or EnvironmentProblem if the model cannot do the task or its configuration cannot be read.
    """
    model_class, config = find_class(model_ref, recipe, task)
    skeleton = build_skeleton(model_class, config, recipe, towers=task.model_kind.takes_images)
    plan = plan_skeleton(skeleton, recipe, task, tokens, device, device_memory(device))
    plan = plan_evaluation(plan, skeleton, recipe, tokens)
    plan = plan if costs is None else plan_samples(plan, skeleton, recipe, task, costs)
    return plan if layout == ALONE else divide_plan(plan, skeleton, recipe, layout, tokens)


def plan_skeleton(
    skeleton: PreTrainedModel, recipe: Recipe, task: TaskInterface, tokens: int, device: str, limit: int | None
) -> MemoryPlan:
    """Do the same for a model without weights, and a device with `limit` bytes, this machine's or another."""
    config = skeleton.config
    weight_bytes = torch.finfo(resolve_dtype(recipe.model.dtype, device)).bits // 8
    inner, trained = _trained_sizes(skeleton, recipe, task)
    trained_total = sum(trained)
    text = config.get_text_config()
    # A classifier's few logits are negligible.
    vocabulary = int(getattr(text, "vocab_size", 0)) if task.model_kind.predicts_tokens else 0
    logits_at_once = tokens
    if task.model_kind.decodes and vocabulary:  # a decoder's loss keeps the logits of one chunk in memory
        logits_at_once = min(tokens, max(1, CHUNK_ELEMENTS // vocabulary))
    logit_bytes = 3 * vocabulary * weight_bytes  # the logits, the gradient kept for them and the one passed on
    full, kept = recipe.adapter.method == "full", kept_quantization(config)
    small = 0 if full else sum(size for size in trained if size < _SMALL)
    optimizer = (trained_total - small) * optimizer_bytes(recipe.train.optim)
    optimizer += small * optimizer_bytes(recipe.train.optim, small=True)
    parts = {
        **({"libraries": _LIBRARIES_BYTES} if device == "cpu" else {}),
        "weights": 4 * sum(parameter.numel() for parameter in skeleton.parameters())
        if trains_in_float32(recipe, task, config)
        else _weight_bytes(skeleton, inner, recipe.adapter, weight_bytes, kept),
        "adapter": 0 if full else 4 * trained_total,
        "gradients": 4 * trained_total,
        "optimizer": int(optimizer),
        "activations": tokens * weight_bytes * _kept_activations(text, inner, recipe, device, kept is not None),
        "logits": logits_at_once * logit_bytes,
    }
    if task.model_kind.takes_images:
        parts["activations"] += tokens * weight_bytes * _tower_activations(skeleton)
    if recipe.adapter.method == "qlora" and device == "cpu":  # the weights before quantisation, in the same memory
        parts["loading"] = weight_bytes * _quantized(skeleton, inner)
    if task.needs_reference_model(recipe) and (full or recipe.adapter.start_from is not None):
        parts["reference"] = 4 * trained_total
    lower_bound = fixed_bytes(parts) + logit_bytes - parts.get("loading", 0)  # loading ends before training begins
    if recipe.train.optim.startswith("paged_"):
        lower_bound -= parts["optimizer"]  # moves to the host if necessary
    return MemoryPlan(parts, lower_bound, limit, device, base_quantization=kept.method if kept else None)


def plan_training(
    model_ref: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    longest: int,
    device: str,
    lengths: npt.NDArray[np.int32] | None = None,
    layout: Layout = ALONE,
) -> MemoryPlan:
    """Plan the first micro-batches of rows with at most `longest` tokens; `tokens` is their budget.

    With the `lengths` of encoded rows, a step is planned with the longest rows that packing can join, else with all
    rows as long as the longest. Raises as `plan_memory` does.
    """
    budget = micro_batch_tokens(plan_memory(model_ref, recipe, task, longest, device, layout), longest, longest)
    step_tokens = recipe.train.batch_tokens or longest * recipe.train.batch_size
    if lengths is not None and len(lengths) and recipe.data.packing and recipe.train.batch_tokens is None:
        step_tokens = int(np.sort(lengths)[-recipe.train.batch_size :].sum())
    step_tokens = max(longest, -(-step_tokens // layout.processes))
    epoch = None if lengths is None else max(step_tokens, -(-int(lengths.sum()) // layout.processes))
    costs = StepCosts(longest, step_tokens, epoch)
    plan = plan_memory(model_ref, recipe, task, min(budget, step_tokens), device, layout, costs)
    return replace(plan, tokens=budget)


def resolve_checkpointing(
    model_ref: ModelRef, recipe: Recipe, task: TaskInterface, longest: int, device: str, layout: Layout = ALONE
) -> bool:
    """Resolve `gradient_checkpointing: auto`: on only if one row of `longest` tokens does not fit without it.

    Off for a model that does not support it. Raises as `plan_memory` does.
    """
    model_class, _ = find_class(model_ref, recipe, task)
    if not getattr(model_class, "supports_gradient_checkpointing", True):
        return False
    plan = plan_memory(model_ref, recipe, task, longest, device, layout)
    return plan.limit is not None and plan.total > USABLE * plan.limit


def check_context(model_ref: ModelRef, recipe: Recipe, task: TaskInterface, longest: int) -> None:
    """Raise DataError if a row of `longest` tokens is longer than the model's context."""
    _, config = find_class(model_ref, recipe, task)
    context = context_length(config)
    virtual = recipe.adapter.virtual_tokens
    if context is not None and longest + virtual > context:
        prepended = f" after {virtual:,} virtual tokens" if virtual else ""
        what = f"a row has {longest:,} tokens{prepended}, but the context of {model_ref.name} is {context:,}"
        fix = f"Set data.max_length: {context - virtual} and choose in data.on_overlong how to treat longer rows."
        raise DataError.of(what, "data.max_length", fix)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that a model's positions cover; None if unlimited or not stated.

    RoBERTa and its relatives number positions from the padding token's id plus one.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    if positions and getattr(text, "model_type", "") in FROM_PADDING:
        positions -= (text.pad_token_id or 0) + 1
    return positions


FROM_PADDING = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "xmod"),
    *("mpnet", "longformer", "ibert", "luke", "esm"),
)
"""Model types whose first position follows the padding token's id."""


def _trained_sizes(
    skeleton: PreTrainedModel, recipe: Recipe, task: TaskInterface
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Return the linear shapes outside the heads, and the sizes of all trained matrices."""
    heads, towers = head_names(skeleton), find_towers(skeleton)
    inner = {name: shape for name, shape in linear_shapes(skeleton).items() if not in_heads(name, [*heads, *towers])}
    frozen = find_projectors(skeleton) if recipe.adapter.train_projector else []
    projector = [one.numel() for name in frozen for one in skeleton.get_submodule(name).parameters()]
    if recipe.adapter.method == "full":
        whole = [one.numel() for name, one in skeleton.named_parameters() if not in_heads(name, towers)]
        return inner, [*whole, *projector]
    adapter = [*_adapter_sizes(inner, recipe.adapter), *projector]
    head = [parameter.numel() for name, parameter in skeleton.named_parameters() if in_heads(name, heads)]
    return inner, [*adapter, *(head if task.model_kind.has_head else [])]


def optimizer_bytes(optim: str, small: bool = False) -> float:
    """Return the optimiser's state bytes per trained parameter, by its name in transformers.

    8-bit optimisers have a float32 scale per block of 256; a `small` matrix (below 4,096) keeps 32 bits.
    """
    kind = optim.removeprefix("paged_")
    full = next((size for name, size in _OPTIMIZER_BYTES.items() if kind.startswith(name)), 8.0)
    return full / 4 * (1 + 4 / 256) if "8bit" in kind and not small else full


def check_memory(plan: MemoryPlan, recipe: Recipe, console: Console | None = None) -> None:
    """Print the plan; raise EnvironmentProblem if its lower bound exceeds the device, warn if its total does.

    `model.check_memory: false` turns the refusal into a warning.
    """
    console = console or Console(stderr=True)
    console.print(_draw_plan(plan))
    if plan.limit is None or plan.total <= plan.limit:
        return
    if plan.lower_bound <= plan.limit:
        saving = (
            "" if recipe.train.gradient_checkpointing is True else " train.gradient_checkpointing: true saves most."
        )
        console.print(
            f"[yellow]The plan exceeds the memory of {plan.device}:[/yellow] "
            f"micro-batches will be made smaller where rows allow it.{saving}"
        )
        return
    each = "" if plan.processes == 1 else " in each process" if plan.device == "cpu" else " on each card"
    what = (
        f"{recipe.model.name or 'the model'} needs at least {format_bytes(plan.lower_bound)}{each} to train with "
        f"adapter.method {recipe.adapter.method}, but {plan.device} has {format_bytes(plan.limit)}{each}"
    )
    if recipe.model.check_memory:
        fix = suggest_recipe(plan, recipe) if plan.processes == 1 else _MORE
        fix = f"{fix} Set model.check_memory: false to try anyway."
        raise EnvironmentProblem.of(what, "model.name", fix)
    console.print(f"[yellow]{what}[/yellow]; continuing, because model.check_memory is false.")


_MORE = "Use --strategy fsdp, with --fsdp-offload-params or on more cards; or choose a smaller model."


def suggest_recipe(plan: MemoryPlan, recipe: Recipe) -> str:
    """Name the smallest change of the recipe whose lower bound should fit, by arithmetic on the plan's parts."""
    assert plan.limit is not None
    weights, optimizer, full = plan.parts["weights"], plan.parts["optimizer"], recipe.adapter.method == "full"
    libraries = plan.parts.get("libraries", 0)
    compute_bytes = torch.finfo(resolve_dtype(recipe.model.dtype, plan.device)).bits // 8
    parameters = weights // (4 if full else compute_bytes)
    rest = libraries + parameters // 5 if full else plan.lower_bound - weights  # adapter, its gradients, optimiser
    if full and "8bit" not in recipe.train.optim and plan.lower_bound - 0.74 * optimizer <= plan.limit:
        return "Set train.optim: adamw_8bit, which should fit."
    if full and compute_bytes * parameters + rest <= plan.limit:
        return "Set adapter.method: lora, which should fit."
    # In 4 bits, with a tenth of the weights, the embedding, not quantised.
    quantized = recipe.adapter.method == "qlora" or plan.base_quantization is not None
    if not quantized and (0.55 + 0.1 * compute_bytes) * parameters + rest <= plan.limit:
        return "Set adapter.method: qlora, which should fit."
    return f"Choose a smaller model: {plan.device} has {format_bytes(plan.limit)}."


def micro_batch_tokens(plan: MemoryPlan, tokens: int, longest: int) -> int:
    """Return the first token budget of a micro-batch, a function of hardware and recipe, not of memory free now.

    `tokens` is the plan's budget; `longest` is the longest row, the minimum for a budget.
    """
    cap = _CPU_TOKENS if plan.device == "cpu" else _CUDA_TOKENS
    per_token = max(1, (plan.parts["activations"] + plan.parts["logits"]) // tokens)
    if plan.limit is None:
        return max(longest, min(cap, _CPU_TOKENS))
    room = int(USABLE * plan.limit) - fixed_bytes(plan.parts)
    return max(longest, min(cap, room // per_token))


def _weight_bytes(
    skeleton: PreTrainedModel,
    inner: dict[str, tuple[int, int]],
    adapter: AdapterSection,
    weight_bytes: int,
    kept: BaseQuantization | None,
) -> int:
    parameters: int = sum(parameter.numel() for parameter in skeleton.parameters())
    if kept is not None:
        whole = {name: shape for name, shape in inner.items() if not any(part in name for part in kept.skipped)}
        quantized = sum(inputs * outputs for inputs, outputs in whole.values())
        return int(quantized * kept.bytes_per_weight) + weight_bytes * (parameters - quantized)
    if adapter.method != "qlora":
        return weight_bytes * parameters
    quantized = _quantized(skeleton, inner)
    packed = int(quantized * _QUANTIZED_BYTES[adapter.bnb_4bit_use_double_quant])
    return packed + weight_bytes * (parameters - quantized)


def _quantized(skeleton: PreTrainedModel, inner: dict[str, tuple[int, int]]) -> int:
    """Count the quantised weights."""
    kept = set(getattr(skeleton, "_keep_in_fp32_modules", None) or ())  # T5's `wo`, not quantised by transformers
    linear = sum(inputs * outputs for name, (inputs, outputs) in inner.items() if not kept & {*name.split(".")})
    return linear + sum(shape.numel() for shape in expert_parameters(skeleton).values())


_FEW_WEIGHTS = ("ia3", "ln_tuning", "beft", "trainable_tokens", "adaption_prompt")
"""Methods that train almost nothing."""


def _adapter_sizes(inner: dict[str, tuple[int, int]], adapter: AdapterSection) -> list[int]:
    """Return the sizes of the low-rank matrices; exact targets are resolved when the adapter is created.

    Methods other than LoRA are assumed to train about as much as LoRA with their rank, or with 16.
    """
    targeted = adapter.target_modules
    if targeted == "all-linear":
        targets = list(inner.values())
    elif isinstance(targeted, str):
        try:
            targets = [shape for name, shape in inner.items() if re.fullmatch(targeted, name)]
        except re.error:  # reported when the adapter is created
            targets = []
    else:
        targets = [shape for name, shape in inner.items() if name.split(".")[-1] in targeted or name in targeted]
    if "target_modules" not in options_of(adapter.method) or adapter.method in _FEW_WEIGHTS:
        return []
    rank = adapter.r * (2 if str(adapter.init_lora_weights).startswith(MUTATING) else 1)
    return [rank * size for shape in targets for size in shape]


def _kept_activations(
    text: PreTrainedConfig, inner: dict[str, tuple[int, int]], recipe: Recipe, device: str, kept: bool
) -> int:
    """Estimate the numbers per token kept for the backward pass: about 10 hidden and 4 intermediate vectors per layer.

    With a quantised base it is 6 intermediate ones. On a CPU the process keeps the memory that checkpointing frees:
    docs/memory.md has the measurements.
    """
    layers = int(getattr(text, "num_hidden_layers", 1) + getattr(text, "decoder_layers", 0))
    hidden = int(getattr(text, "hidden_size", 0))
    intermediate = max((max(shape) for shape in inner.values()), default=4 * hidden)
    layer = 10 * hidden + (6 if kept or recipe.adapter.method == "qlora" else 4) * intermediate
    saves = recipe.train.gradient_checkpointing is True and device != "cpu"
    return layers * hidden + layer if saves else layers * layer


def _tower_activations(skeleton: PreTrainedModel) -> int:
    """Estimate the numbers that towers need at once per token, if all tokens are those of pictures.

    Towers are frozen, so only the states of their layers are kept, for models that read several, and the work of one.
    A token stands for several patches if the model joins them, each with its pixels in float32.
    """
    config = skeleton.config
    vision = getattr(config, "vision_config", None)
    stated = {**vars(vision or config), **vars(config)}
    shapes = [shape for name in find_towers(skeleton) for shape in linear_shapes(skeleton.get_submodule(name)).values()]
    widest, width = max(map(max, shapes), default=0), max(map(min, shapes), default=0)
    layers = int(stated.get("depth") or getattr(vision, "num_hidden_layers", 0) or 1)
    sides = [stated[name] for name in _JOINED if isinstance(stated.get(name), int)]
    sides += [round(1 / stated[name]) for name in _RATIOS if isinstance(stated.get(name), float)]
    joined = max(sides, default=1) ** 2
    if per_picture := stated.get("mm_tokens_per_image"):
        joined = (int(stated["image_size"]) // int(stated["patch_size"])) ** 2 // per_picture
    patch = stated.get("patch_size") or 16
    pixels = 3 * int(patch[0] if isinstance(patch, list | tuple) else patch) ** 2
    return joined * ((layers + 8) * width + 2 * widest + 2 * pixels)


_JOINED = ("spatial_merge_size", "scale_factor", "pooling_kernel_size", "downsample_factor")
_RATIOS = ("downsample_ratio", "pixel_shuffle_ratio")
"""Names in configurations of how many patches, in each direction, make a token of a picture."""


def _draw_plan(plan: MemoryPlan) -> Table:
    each = f", each of {plan.processes} processes" if plan.processes > 1 else ""
    table = Table(title=f"Memory plan ({plan.device}{each})", title_justify="left", show_footer=True)
    table.add_column("part", footer="total")
    table.add_column("memory", justify="right", footer=format_bytes(plan.total))
    for part, size in plan.parts.items():
        table.add_row(part, format_bytes(size))
    table.add_section()
    table.add_row("lower bound", format_bytes(plan.lower_bound))
    table.add_row("evaluation needs", format_bytes(plan.evaluated))
    if plan.host:
        table.add_row("in main memory", format_bytes(plan.host))
    table.add_row("device has", format_bytes(plan.limit) if plan.limit is not None else "unknown")
    return table
