"""Tensor parallelism by transformers' plan of a model: which layers are divided over processes, and by what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from transformers import PreTrainedModel

from llmtune.errors import Problem, RecipeError

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
REPEATED = "replicated_with_grad_allreduce"
"""The style of norms within a head: each process has them whole, and a part of their gradients."""
WHOLE = ("embedding_rowwise", "embedding_colwise", "colwise_rep", "colwise_gather_output", REPEATED)
"""Styles whose weights each process keeps whole: the embedding and the output head, where the loss is taken."""


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
    kind, text, adapter = type(skeleton).__name__, skeleton.config.get_text_config(), recipe.adapter
    layers = [found for found in planned_layers(skeleton) if found[2] not in WHOLE]
    instead = "Use --strategy fsdp or ddp."
    if not layers:
        yield Problem(f"transformers has no tensor-parallel plan for {kind}", "--strategy", instead)
        return
    if unknown := sorted({style for _, _, style in layers} - STYLES.keys()):
        what = f"the tensor-parallel plan of {kind} divides layers by {', '.join(unknown)}, which is not done here"
        yield Problem(what, "--strategy", instead)
        return
    sizes = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    for name, module, style in layers:
        size = getattr(module, "out_features" if style == "colwise" else "in_features", None)
        sizes.setdefault(f"the width of {name}", size)
    uneven = [f"{name} is {size}" for name, size in sizes.items() if size is not None and size % processes]
    if uneven:
        what = f"{kind} cannot be divided over {processes} processes: {uneven[0]}"
        yield Problem(what, "--processes", f"Take a number of processes that divides it. {instead}")
    repeated = any(style == REPEATED for _, _, style in planned_layers(skeleton))
    if adapter.method == "full" and repeated:
        what = f"each process would have a part of the gradients of norms within the heads of {kind}"
        yield Problem(what, "adapter.method", f"Set adapter.method: lora. {instead}")
