"""Faster kernels that a recipe asks for: what this machine lacks for them, and Liger's put into a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from llmtune.errors import EnvironmentProblem, Problem, RecipeError

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

_OWN_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Liger's options for the loss, which is llmtune's own: on the supervised tokens only, with a sum and a count."""


def check_kernels(recipe: Recipe, device: str) -> None:
    """Raise EnvironmentProblem for kernels that training on `device` cannot have, all of them at once."""
    EnvironmentProblem.collect(_find_missing(recipe, device))


def _find_missing(recipe: Recipe, device: str) -> Iterator[Problem]:
    attention, on_gpu = recipe.model.attn_implementation, device.startswith("cuda")
    if recipe.train.torch_compile:
        where, compilers = "train.torch_compile", [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if device == "mps":
            yield Problem("compiled layers are not tested on mps", where, "Remove it.")
        elif on_gpu and find_spec("triton") is None:
            yield Problem("torch.compile needs the package triton", where, "pip install triton, or remove it.")
        elif not on_gpu and not any(map(shutil.which, compilers)):
            what = f"torch.compile needs a C++ compiler on a CPU, and there is no {' or '.join(compilers)}"
            fix = "Install g++ (Debian: apt install g++), name one in the variable CXX, or remove it."
            yield Problem(what, where, fix)
    if recipe.train.use_liger_kernel:
        where = "train.use_liger_kernel"
        if not on_gpu:
            what = f"Liger's kernels run on a CUDA GPU, and this machine computes on {device}"
            yield Problem(what, where, "Remove it.")
        elif find_spec("liger_kernel") is None:
            yield Problem("the package liger-kernel is not installed", where, "pip install liger-kernel, or remove it.")
    if "/" in attention and find_spec("kernels") is None:
        what = f"{attention} is a kernel on the hub, and the package that fetches it, kernels, is not installed"
        yield Problem(what, "model.attn_implementation", "pip install kernels, or set it to auto.")


def apply_liger(model: PreTrainedModel) -> None:
    """Replace norms, rotary positions and gated layers of `model` by Liger's, in place; the loss stays as it is.

    Liger also changes the classes of this model type, for the rest of the process. Raises RecipeError for a model type
    that it does not know.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # as transformers does it
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise RecipeError.of(
            f"Liger has no kernels for models of type {kind}",
            "train.use_liger_kernel",
            f"Remove it. It knows: {known}.",
        )
    _apply_liger_kernel_to_instance(model, **dict.fromkeys(_OWN_LOSSES, False))
