"""Count the real tokens, the supervised tokens and the loss of every micro-batch of a Trainer."""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from transformers import Trainer, TrainerCallback


class Loaded(TrainerCallback):
    """Tells the clock when the model is loaded and training begins."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.clock.loaded(model)


def watch(clock: Clock) -> Loaded:
    """Count the micro-batches of every Trainer of this process; return the callback to pass to it."""
    step = Trainer.training_step

    @wraps(step)
    def counted(self: Trainer, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> torch.Tensor:
        tokens, supervised = real_tokens(inputs), (inputs["labels"][..., 1:] != -100).sum()
        loss = step(self, model, inputs, *rest, **named)
        clock.count(tokens, supervised, loss.detach())
        return loss

    Trainer.training_step = counted
    return Loaded(clock)


def real_tokens(inputs: dict[str, Any]) -> int | torch.Tensor:
    """Count tokens that are not padding, for any form of attention mask; without a mask all tokens are real."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return int(inputs["input_ids"].numel())
    if mask.dim() == 2:
        return (mask != 0).sum()
    own = mask.diagonal(dim1=-2, dim2=-1)  # whether a token sees itself, as padding does not
    return own.sum() if own.dtype == torch.bool else (own == 0).sum()


def read_pairs(rows: str) -> list[dict[str, Any]]:
    """Read rows as prompt and completion, the format in which TRL trains on the answer only."""
    read = [json.loads(line)["messages"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in read]


def describe_training(asked: Any, folder: str, *, packed: bool) -> dict[str, Any]:
    """Return the settings shared by all tools, under the names of TrainingArguments."""
    return {
        "output_dir": folder,
        "max_steps": asked.steps + 1,
        "per_device_train_batch_size": 1 if packed else asked.padded_rows,
        "gradient_accumulation_steps": asked.accumulation if packed else asked.padded_accumulation,
        "learning_rate": asked.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": asked.dtype == "bfloat16",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": asked.seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }
