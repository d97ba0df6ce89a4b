"""The memory plan of one of several processes, with the complete model or a shard of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmtune.data.task_interface import StepCosts, TaskInterface
from llmtune.errors import RecipeError
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import head_names, in_heads, layer_configs, linear_shapes
from llmtune.model.device import resolve_dtype
from llmtune.model.quantized_base import kept_quantization
from llmtune.recipe.schema import Recipe
from llmtune.records import Layout, MemoryPlan

_WHOLE = {"libraries", "activations", "logits", "samples"}
"""Parts of a plan that are not sharded."""
_PICKED_BYTES = 28
"""Bytes per row and vocabulary entry while a token is sampled: logits, scores, probabilities, their sums and logs."""


def divide_plan(plan: MemoryPlan, skeleton: PreTrainedModel, recipe: Recipe, layout: Layout, tokens: int) -> MemoryPlan:
    """Return the plan of one of several processes; on a machine without cards they share its memory.

    Raises RecipeError for a model that stays quantised in another way than bitsandbytes' 4 bits.

    Under DDP, gradients are summed in buckets, which together are a copy of the gradients. Under FSDP, each process
    has a shard, in main memory with `offload_params`. While a layer computes, it and the next are complete; weights
    outside layers are complete for a pass. The gradients of one layer, and of weights outside layers, are complete
    until they are summed. `tokens` is the length of a row, for the cache of keys and values.
    """
    limit = plan.limit // layout.of_machine if plan.limit and plan.device == "cpu" else plan.limit
    plan = replace(plan, limit=limit, processes=layout.processes)
    if not layout.sharded:
        buckets = plan.parts["gradients"]
        return replace(plan, parts=plan.parts | {"buckets": buckets}, lower_bound=plan.lower_bound + buckets)
    kept = kept_quantization(skeleton.config)
    if kept is not None and (kept.method, kept.bits) != ("bitsandbytes", 4):
        what = f"the base's files are quantised ({kept.method}), and packed weights cannot be sharded"
        raise RecipeError.of(what, "model.name", "Use --strategy ddp, or name the original model.")
    units = _Units.of(plan, skeleton, recipe)
    moved = ("weights", "adapter", "gradients", "optimizer", "reference") if layout.offload_params else ()
    moved = moved if plan.device != "cpu" else ()
    parts = {name: size if name in _WHOLE else size // layout.processes for name, size in plan.parts.items()}
    host = sum(parts.pop(name, 0) for name in moved)
    parts["gathered"] = units.gathered
    shard = 0 if moved else units.stored // layout.processes
    evaluated = shard + units.computing + _cache_bytes(skeleton, units.compute_bytes) * tokens
    evaluated += parts.get("libraries", 0)
    logit_row = plan.lower_bound - fixed_bytes(plan.parts) + plan.parts.get("loading", 0)
    parts["evaluation"] = max(0, evaluated - sum(parts.values()))
    bound = max(fixed_bytes(parts) + logit_row, evaluated)
    return replace(plan, parts=parts, lower_bound=bound, host=host, evaluated=evaluated)


def plan_evaluation(plan: MemoryPlan, skeleton: PreTrainedModel, recipe: Recipe, tokens: int) -> MemoryPlan:
    """Return the plan of one process with what evaluation needs: the model, and the cache of `tokens` tokens."""
    units = _Units.of(plan, skeleton, recipe)
    cache = _cache_bytes(skeleton, units.compute_bytes) * tokens
    return replace(plan, evaluated=units.stored + cache + plan.parts.get("libraries", 0))


def plan_samples(
    plan: MemoryPlan, skeleton: PreTrainedModel, recipe: Recipe, task: TaskInterface, costs: StepCosts
) -> MemoryPlan:
    """Return the plan with the answers that training samples: the KV cache of a batch, and what picks its tokens."""
    column = _cache_bytes(skeleton, torch.finfo(resolve_dtype(recipe.model.dtype, plan.device)).bits // 8)
    rows, length = task.sampled_batch(recipe, costs, plan.device, column)
    vocabulary = int(getattr(skeleton.config.get_text_config(), "vocab_size", 0))
    samples = rows * (length * column + _PICKED_BYTES * vocabulary)
    return replace(plan, parts=plan.parts | {"samples": samples}) if samples else plan


@dataclass(frozen=True)
class _Units:
    """Bytes of the parts of a sharded model that are complete while they compute."""

    compute_bytes: int
    """Of a number that is computed with."""
    gathered: int
    """In training: the weights outside layers, two layers, and their complete gradients."""
    computing: int
    """The same without gradients, in the dtype of evaluation."""
    stored: int
    """The complete weights in the dtype of evaluation."""

    @classmethod
    def of(cls, plan: MemoryPlan, skeleton: PreTrainedModel, recipe: Recipe) -> _Units:
        """Measure the largest layer and the weights outside layers."""
        full = recipe.adapter.method == "full"
        compute_bytes = torch.finfo(resolve_dtype(recipe.model.dtype, plan.device)).bits // 8
        sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in kept_together(skeleton)]
        total, largest = sum(parameter.numel() for parameter in skeleton.parameters()), max(sizes, default=0)
        rest = total - sum(sizes)
        stored = compute_bytes * total if full else plan.parts["weights"]
        layer = (stored - compute_bytes * rest) * largest // max(1, sum(sizes))
        heads = head_names(skeleton)
        inner = [shape for name, shape in linear_shapes(skeleton).items() if not in_heads(name, heads)]
        matrix = max((rows * columns for rows, columns in inner), default=0)
        unpacked = compute_bytes * matrix if stored < compute_bytes * total else 0  # 4 bits, one matrix at a time
        computing = compute_bytes * rest + 2 * layer + unpacked
        # Layers are gathered, and have gradients, in the dtype of their products; these are summed in float32.
        masters = 4 * rest + 2 * layer + 4 * rest + (4 + compute_bytes) * largest
        return cls(compute_bytes, masters if full else computing, computing, stored)


def _cache_bytes(skeleton: PreTrainedModel, compute_bytes: int) -> int:
    """Return the bytes of keys and values that a token leaves in all layers while answers are generated."""
    text = skeleton.config.get_text_config(decoder=True)
    layers = layer_configs(text)
    width = sum(map(_cached_numbers, layers)) * int(getattr(text, "num_hidden_layers", 0)) // len(layers)
    return 2 * width * compute_bytes


def _cached_numbers(layer: PreTrainedConfig) -> int:
    """Return the numbers in the keys of a token in one layer."""
    heads = int(getattr(layer, "num_attention_heads", 0) or 0)
    keys = int(getattr(layer, "num_key_value_heads", None) or heads)
    return keys * int(getattr(layer, "head_dim", None) or int(getattr(layer, "hidden_size", 0)) // max(1, heads))


def fixed_bytes(parts: Mapping[str, int]) -> int:
    """Add up the parts that are in memory during a micro-batch and do not grow with it."""
    return sum(size for part, size in parts.items() if part not in ("activations", "logits", "evaluation", "samples"))


def kept_together(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that a model must not be split within (`_no_split_modules`), which FSDP shards as units."""
    names = set(getattr(unwrap(model), "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return [child for one in lists for child in one if type(child).__name__ in names]
