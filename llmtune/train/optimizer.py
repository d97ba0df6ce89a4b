"""The optimiser and the learning-rate schedule, by their names in transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from transformers import Trainer, get_scheduler

from llmtune.errors import EnvironmentProblem, RecipeError

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

_UNPAGED = {"adamw_32bit": "adamw_torch", "ademamix_32bit": "ademamix"}


def build_optimizer(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Build `train.optim` over the trainable parameters; matrices decay, biases and norms (one dimension) do not.

    Raises EnvironmentProblem for a paged optimiser without a GPU: bitsandbytes would quietly take another one.
    """
    train = recipe.train
    if train.optim.startswith("paged_") and device.type != "cuda":
        plain = train.optim.removeprefix("paged_")
        raise EnvironmentProblem.of(
            f"{train.optim} pages its state between GPU and host, and this machine computes on {device.type}",
            "train.optim",
            f"Set train.optim to {_UNPAGED.get(plain, plain)}.",
        )
    arguments = SimpleNamespace(
        optim=train.optim,
        optim_args=None,
        learning_rate=train.learning_rate,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
    )
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = optimizer_class([group for group in groups if group["params"]], **options)
    return optimizer


def build_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build `train.lr_scheduler_type` over `total_steps`; `warmup_steps` below 1 is a share of them, rounded up.

    Raises RecipeError if `lr_scheduler_kwargs` do not fit the schedule.
    """
    train = recipe.train
    share = train.warmup_steps < 1
    warmup = math.ceil(total_steps * train.warmup_steps) if share else int(train.warmup_steps)
    if share:
        warmup = min(warmup, total_steps - 1)  # the first step of a warm-up has a learning rate of 0
    elif warmup >= total_steps:
        what = f"{warmup} steps of warm-up, and training has {total_steps}: none would have the full learning rate"
        raise RecipeError.of(
            what, "train.warmup_steps", "Set it below the number of steps, or to a share such as 0.03."
        )
    options = {
        name: int(value) if float(value).is_integer() else value for name, value in train.lr_scheduler_kwargs.items()
    }
    try:
        schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            train.lr_scheduler_type, optimizer, warmup, total_steps, scheduler_specific_kwargs=options
        )
    except (TypeError, ValueError) as error:
        given = ", ".join(train.lr_scheduler_kwargs) or "nothing"
        raise RecipeError.of(
            f"the schedule {train.lr_scheduler_type} was given {given}: {error}",
            "train.lr_scheduler_kwargs",
            "The names are those of transformers.get_scheduler's functions, e.g. num_cycles, min_lr_rate.",
        ) from error
    return schedule
