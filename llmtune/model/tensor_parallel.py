"""Tensor parallelism by transformers' plan of a model: which layers are divided over processes, and by what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from transformers import PreTrainedModel

from llmtune.errors import Problem, RecipeError
from llmtune.model.config import values_of_layers

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
REPEATED = "replicated_with_grad_allreduce"
"""The style of norms within a head: each process has them whole, and a part of their gradients."""
WHOLE = ("embedding_rowwise", "embedding_colwise", "colwise_rep", "colwise_gather_output", REPEATED)
"""Styles whose weights each process keeps whole: the embedding and the output head, where the loss is taken."""

HEADS = ("num_attention_heads", "num_key_value_heads")


def planned_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Yield name, module and style of what the plan names; an adapter on a layer is a part of its module."""
    plan = getattr(model, "_tp_plan", None) or {}
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None:
            yield name, module, style


def check_tensor_parallel(skeleton: PreTrainedModel, recipe: Recipe, processes: int) -> None:
    """Raise RecipeError for a model or an adapter that cannot be divided over so many processes."""
    RecipeError.collect(_problems(skeleton, recipe, processes))


def _problems(skeleton: PreTrainedModel, recipe: Recipe, processes: int) -> Iterator[Problem]:
    kind, text = type(skeleton).__name__, skeleton.config.get_text_config()
    layers = [found for found in planned_layers(skeleton) if found[2] not in WHOLE]
    instead = "Use --strategy fsdp or ddp."
    if not layers:
        yield Problem(f"transformers has no tensor-parallel plan for {kind}", "--strategy", instead)
        return
    if unknown := sorted({style for _, _, style in layers} - STYLES.keys()):
        what = f"the tensor-parallel plan of {kind} divides layers by {', '.join(unknown)}, which is not done here"
        yield Problem(what, "--strategy", instead)
        return
    beside = [*_beside(skeleton)]
    if left := [name for name, count, width in beside if count == width]:
        what = f"the tensor-parallel plan of {kind} leaves {left[0]} whole, which works on what is divided"
        yield Problem(what, "--strategy", instead)
        return
    sizes = [(name, count) for name in HEADS for count in values_of_layers(text, name)]
    sizes += [
        (f"the width of {name}", getattr(module, "out_features" if style == "colwise" else "in_features", 0))
        for name, module, style in layers
    ]
    if uneven := [f"{name} is {size}" for name, size in sizes if size % processes]:
        what = f"{kind} cannot be divided over {processes} processes: {uneven[0]}"
        yield Problem(what, "--processes", f"Take a number of processes that divides it. {instead}")
    shared = [name for name, _, style in planned_layers(skeleton) if style == REPEATED] + [name for name, *_ in beside]
    if recipe.adapter.method == "full" and shared:
        what = f"each process would have a part of the gradients of {shared[0]} of {kind}"
        yield Problem(what, "adapter.method", f"Set adapter.method: lora. {instead}")


def _beside(model: PreTrainedModel) -> Iterator[tuple[str, int, int]]:
    """Yield weights beside layers that are divided by output and have no place in the plan: name, count, that output.

    Plans forget norms of queries and keys, some of which are there by an option alone. Numbers of the module that has
    the layers count as many as they meet.
    """
    planned = {name for name, _, _ in planned_layers(model)}
    for name, layer, style in planned_layers(model):
        place = name.rpartition(".")[0]
        parent, width = model.get_submodule(place), getattr(layer, "out_features", 0)
        if style != "colwise":
            continue
        yield from ((f"{place}.{own}", width, width) for own, _ in parent.named_parameters(recurse=False))
        for child, module in parent.named_children():
            if f"{place}.{child}" not in planned and not isinstance(module, torch.nn.Linear):
                counts = [one.numel() for one in module.parameters(recurse=False)]
                yield from ((f"{place}.{child}", count, width) for count in counts)
