"""One training by llmtune: `python run_llmtune.py ASKED.json ANSWER.json`, started by the harness.

The pipeline is that of `llmtune train`, except that this file replaces its trainer, counts micro-batches and starts the
clock after the rehearsal. On request it then measures the limit of the machine in this process.
"""

from __future__ import annotations

import json
import tempfile
from copy import copy
from pathlib import Path
from typing import Any

import torch
from clock import Asked, Clock, answer, read_asked
from rich.console import Console

from llmtune import pipeline
from llmtune.plan import RunContext
from llmtune.recipe.loader import load_recipe
from llmtune.records import Loss
from llmtune.run_models import make_adapted
from llmtune.store.run_request import RunRequest
from llmtune.train.loop import train


def main() -> None:
    asked, path = read_asked()
    clock = Clock(sums=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(json.dumps(describe_recipe(asked)))  # JSON is YAML
        model: dict[str, Any] = {}

        def trainer(context: RunContext) -> None:
            model["trained"] = train_counted(asked, clock, context)

        options = RunRequest(out=Path(folder) / "run", until="train", offline=True)
        pipeline.adapt_and_train = trainer
        pipeline.run_pipeline(load_recipe(recipe), options, Console(quiet=True))
    found = clock.found()
    if asked.measure_limit:
        from limit import measure_limit

        found["limit"] = measure_limit(model["trained"], found["steps"][1:], asked)
    answer(path, found)


def describe_recipe(asked: Asked) -> dict[str, Any]:
    """Return the recipe: the settings of `watch.describe_training` under llmtune's names, where those differ."""
    return {
        "recipe_version": 1,
        "name": "benchmark",
        "task": "chat",
        "seed": asked.seed,
        "data": {
            "train": asked.rows,
            "validation": 0,
            "test": 0,
            "deduplicate": "none",
            "max_length": asked.pack,
        },
        "model": {"name": asked.model, "dtype": asked.dtype},
        "adapter": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "train": {
            "learning_rate": asked.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "batch_tokens": asked.tokens,
            "max_steps": asked.steps + 1,
            "logging_steps": 1,
            "save_steps": asked.steps + 1,
        },
    }


def train_counted(asked: Asked, clock: Clock, context: RunContext) -> torch.nn.Module:
    """Do the same as `pipeline.adapt_and_train`, with micro-batches of one pack like other tools, or automatic ones."""
    plain = context.plan.task.loss

    def counted(model: torch.nn.Module, batch: dict[str, Any], by_row: bool = False) -> Loss:
        loss = plain(model, batch, by_row)
        clock.count(batch["input_ids"].numel(), loss.count, loss.sum.detach())
        return loss

    task = copy(context.plan.task)
    vars(task)["loss"] = counted
    adapted = make_adapted(context)
    clock.loaded(adapted.model)
    train(
        adapted,
        context.examples,
        task,
        context.plan.recipe,
        context.folder.path,
        context.console,
        budget=asked.pack if asked.tool == "llmtune" else context.folder.findings["micro_batch_tokens"],
        on_budget=lambda _: clock.restart(),
        inputs="benchmark",
    )
    return adapted.model


if __name__ == "__main__":
    main()
