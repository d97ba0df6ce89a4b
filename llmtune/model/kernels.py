"""Layers computed in another way: kernels that a recipe requests, fused norms, and numbers in float32."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from inspect import signature
from types import MethodType
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from llmtune.data.task_interface import TaskInterface
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.model.config import head_names, in_heads
from llmtune.model.towers import dropped_modules
from llmtune.recipe.schema import Recipe

_OWN_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Liger's loss options, unused: llmtune has its own loss on supervised tokens only, as a sum and a count."""


def check_kernels(recipe: Recipe, device: str) -> None:
    """Raise one EnvironmentProblem for all requested kernels that are unavailable on `device`."""
    EnvironmentProblem.collect(_find_missing_kernels(recipe, device))


def _find_missing_kernels(recipe: Recipe, device: str) -> Iterator[Problem]:
    attention, on_gpu = recipe.model.attn_implementation, device.startswith("cuda")
    if recipe.train.torch_compile:
        where, compilers = "train.torch_compile", [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if device == "mps":
            yield Problem("compiled layers are not tested on mps", where, "Remove it.")
        elif on_gpu and find_spec("triton") is None:
            yield Problem("torch.compile needs the package triton", where, "pip install triton, or remove it.")
        elif not on_gpu and not any(map(shutil.which, compilers)):
            what = f"torch.compile needs a C++ compiler on a CPU, but {' or '.join(compilers)} was not found"
            fix = "Install g++ (Debian: apt install g++), set the variable CXX, or remove the key."
            yield Problem(what, where, fix)
    if recipe.train.use_liger_kernel:
        where = "train.use_liger_kernel"
        if not on_gpu:
            what = f"Liger's kernels need a CUDA GPU, but this machine computes on {device}"
            yield Problem(what, where, "Remove it.")
        elif find_spec("liger_kernel") is None:
            yield Problem("the package liger-kernel is not installed", where, "pip install liger-kernel, or remove it.")
    if "/" in attention and find_spec("kernels") is None:
        what = f"{attention} is a kernel from the hub, but the package kernels, which downloads it, is not installed"
        yield Problem(what, "model.attn_implementation", "pip install kernels, or set it to auto.")


def apply_liger(model: PreTrainedModel) -> None:
    """Replace norms, rotary positions and gated layers of `model` by Liger's, in place; the loss is unchanged.

    Liger also changes the classes of this model type, for the rest of the process. Raises RecipeError for a model type
    that Liger does not support.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # as transformers does it
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    decoder = model.get_decoder() if dropped_modules(model) else model  # Liger's own way looks for the towers
    kind = decoder.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        model_types = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise RecipeError.of(
            f"Liger has no kernels for models of type {kind}",
            "train.use_liger_kernel",
            f"Remove the key. Liger supports: {model_types}.",
        )
    _apply_liger_kernel_to_instance(decoder, **dict.fromkeys(_OWN_LOSSES, False))


# Root-mean-square norms with frozen weights, in one autograd function that keeps only its input for the backward pass.
# With plain autograd, a norm keeps float32 copies of its input, and passes over them a dozen times. Zhang and Sennrich,
# "Root Mean Square Layer Normalization", 2019. Shapes: N tokens, D width.


def fuse_norms(model: torch.nn.Module) -> int:
    """Make norms that compute as Llama's do use one fused function, in place; return their number.

    Each kind of norm is first tried on a few numbers, in the dtype of its weights. One with different results (Gemma's
    adds one to its weights) is unchanged, as is one that takes more than its input, such as a gate, and one that was
    replaced already.
    """
    count = 0
    verdicts: dict[tuple[type, float, torch.dtype], bool] = {}
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", None)
        weight = getattr(module, "weight", None)
        if eps is None or weight is None or weight.ndim != 1 or "forward" in vars(module):
            continue
        kind = type(module), float(eps), weight.dtype
        if kind not in verdicts:
            verdicts[kind] = _is_plain(module, float(eps))
        if verdicts[kind]:
            module.forward = MethodType(_norm_forward, module)
            count += 1
    return count


@torch.no_grad()
def _is_plain(module: torch.nn.Module, eps: float) -> bool:
    if len(signature(module.forward).parameters) > 1:
        return False
    generator = torch.Generator().manual_seed(0)
    like = cast(torch.Tensor, module.weight)
    x, weight = (torch.randn(shape, generator=generator).to(like) for shape in ((3, len(like)), (len(like),)))
    expected = functional_call(module, {"weight": weight}, (x,))
    return torch.equal(expected, _RootMeanSquare.apply(x, weight, eps))  # type: ignore[no-untyped-call]


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if self.weight.requires_grad:
        return cast(torch.Tensor, type(self).forward(self, hidden_states))
    out = _RootMeanSquare.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, out)


class _RootMeanSquare(torch.autograd.Function):
    """y = weight * x / sqrt(mean(x^2) + eps), the division in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        wide = x.to(torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_D, inverse)
        return weight_D * (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of y -> of x."""
        x, weight_D, inverse = ctx.saved_tensors
        normed = x.to(torch.float32) * inverse
        raised = (outputs[0] * weight_D).to(torch.float32)
        along = (raised * normed).mean(-1, keepdim=True)
        return raised.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), None, None


class Float32Linear(torch.nn.Linear):
    """A linear layer whose product and output are float32, whatever autocast and its weights are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs in float32."""
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(x.float(), self.weight.float(), bias)


def compute_numbers_in_float32(model: PreTrainedModel, recipe: Recipe, task: TaskInterface) -> None:
    """Compute a head's single output in float32, in place, if the task needs it: bfloat16 turns 1,203 into 1,200."""
    heads = head_names(model) if task.needs_float32(recipe) else []
    for name, module in [*model.named_modules()]:
        if in_heads(name, heads) and type(module) is torch.nn.Linear and module.out_features == 1:
            module.__class__ = Float32Linear
