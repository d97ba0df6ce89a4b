"""The optimiser and the learning-rate schedule, by their names in transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from llmtune.errors import EnvironmentProblem, RecipeError

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

MakeOptimizer = Callable[..., torch.optim.Optimizer]
_TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
_UNPAGED = {"adamw_32bit": "adamw_torch", "ademamix_32bit": "ademamix"}


def build_optimizer(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Build `train.optim` over the trainable parameters; matrices decay, biases and norms (one dimension) do not.

    With `loraplus_lr_ratio` the groups are those of PEFT's LoRA+ (Hayou et al. 2024): what is B, or has one dimension,
    learns that many times faster. The first group has `learning_rate` in either case.

    Raises EnvironmentProblem for a paged optimiser without a GPU, where bitsandbytes would quietly take another one,
    and for one of bitsandbytes where that is not installed.
    """
    train = recipe.train
    if train.optim.startswith("paged_") and device.type != "cuda":
        plain = train.optim.removeprefix("paged_")
        raise EnvironmentProblem.of(
            f"{train.optim} pages its state between GPU and host, and this machine computes on {device.type}",
            "train.optim",
            f"Set train.optim to {_UNPAGED.get(plain, plain)}.",
        )
    optimizer_class, options = _find_class(model, recipe)
    if train.loraplus_lr_ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        made: torch.optim.Optimizer = create_loraplus_optimizer(
            model,
            optimizer_class,
            loraplus_lr_ratio=train.loraplus_lr_ratio,
            loraplus_lr_embedding=train.learning_rate,  # its own default is a rate that follows no setting
            loraplus_weight_decay=train.weight_decay,
            **options,
        )
        return made
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = optimizer_class([group for group in groups if group["params"]], **options)
    return optimizer


def _find_class(model: torch.nn.Module, recipe: Recipe) -> tuple[MakeOptimizer, dict[str, object]]:
    """Return the class that `train.optim` names in transformers, and the options that it takes from the recipe."""
    train = recipe.train
    if train.optim in _TORCH_ADAMW:
        options: dict[str, object] = {
            "lr": train.learning_rate,
            "betas": (train.adam_beta1, train.adam_beta2),
            "eps": train.adam_epsilon,
        }
        return torch.optim.AdamW, options | ({"fused": True} if train.optim == "adamw_torch_fused" else {})
    from transformers import Trainer  # brings datasets and pandas along, for which most trainings need not wait

    arguments = SimpleNamespace(
        optim=train.optim,
        optim_args=None,
        learning_rate=train.learning_rate,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
    )
    try:
        found: tuple[MakeOptimizer, dict[str, object]] = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except ImportError as error:
        fix = "pip install bitsandbytes, or set train.optim to adamw_torch."
        raise EnvironmentProblem.of(f"{train.optim} is not available here: {error}", "train.optim", fix) from error
    return found


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> LambdaLR:
    """Build `train.lr_scheduler_type` over `total_steps`; `warmup_steps` below 1 is a share of them, rounded up.

    A warm-up begins one step into transformers' schedule, whose first learning rate is 0: a step that learns nothing.

    Raises RecipeError if `lr_scheduler_kwargs` do not fit the schedule.
    """
    train = recipe.train
    share = train.warmup_steps < 1
    warmup = math.ceil(total_steps * train.warmup_steps) if share else int(train.warmup_steps)
    if share:
        warmup = min(warmup, total_steps - 1)
    elif warmup >= total_steps:
        what = f"{warmup} steps of warm-up, and training has {total_steps}: none would have the full learning rate"
        raise RecipeError.of(
            what, "train.warmup_steps", "Set it below the number of steps, or to a share such as 0.03."
        )
    options = {
        name: int(value) if float(value).is_integer() else value for name, value in train.lr_scheduler_kwargs.items()
    }
    try:
        schedule: LambdaLR = get_scheduler(
            train.lr_scheduler_type, optimizer, warmup, total_steps + bool(warmup), scheduler_specific_kwargs=options
        )
    except (TypeError, ValueError) as error:
        given = ", ".join(train.lr_scheduler_kwargs) or "nothing"
        raise RecipeError.of(
            f"the schedule {train.lr_scheduler_type} was given {given}: {error}",
            "train.lr_scheduler_kwargs",
            "The names are those of transformers.get_scheduler's functions, e.g. num_cycles, min_lr_rate.",
        ) from error
    if not warmup:
        return schedule
    return LambdaLR(optimizer, [partial(_one_step_on, rate) for rate in schedule.lr_lambdas])


def _one_step_on(rate: Callable[[int], float], step: int) -> float:
    return rate(step + 1)
