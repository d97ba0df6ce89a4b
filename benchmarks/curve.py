"""Check that packing does not change training: compare llmtune's packed losses with a plain Trainer's unpacked ones.

    python benchmarks/curve.py [--steps 100] [--rows-a-step 4] [--json FILE] [--losses FILE.svg]

Both are in float32 and see the same rows in the same steps, start from the same adapter, and divide a step's summed
loss by its learned tokens. What may differ is the order of additions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from clock import Asked, Clock
from datasets import Dataset
from losses import draw_losses
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from rich.console import Console
from run_llmtune import describe_recipe
from training import ask, read_options, tell
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from watch import describe_training, watch

from llmtune import pipeline
from llmtune.data.example import Example
from llmtune.data.examples import ExampleReader
from llmtune.plan import RunContext
from llmtune.recipe.loader import load_recipe
from llmtune.run_models import make_adapted
from llmtune.store.run_request import RunRequest
from llmtune.train.batch_plan import StepPlan
from llmtune.train.loop import train

Weights = dict[str, torch.Tensor]


def main() -> int:
    options = read_curve_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        asked = ask(options, Path(name))
        asked = replace(asked, padded_rows=options.rows_a_step, steps=options.steps - 1)
        ours, steps, start = train_packed(asked, Path(name))
        theirs = train_plain(asked, Path(name), steps, start)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if options.losses:
        options.losses.write_text(draw_losses({"llmtune, packed": ours, "Trainer, unpacked": theirs}))
    found = {"steps": len(ours), "largest_difference": difference, "llmtune": ours, "trainer": theirs}
    tell(found | {"machine": describe_machine()}, options.json)
    return 0


def read_curve_options() -> argparse.Namespace:
    parser = read_options(__doc__)
    parser.set_defaults(steps=100, pack=128, dtype="float32")
    parser.add_argument("--rows-a-step", type=int, default=4)
    options = parser.parse_args()
    options.tokens = options.rows_a_step * options.pack // 2
    return options


def train_packed(asked: Asked, folder: Path) -> tuple[list[float], list[list[Example]], Weights]:
    """Train with llmtune; returns the losses, the examples of each step, and the adapter before the first."""
    keys = describe_recipe(asked)
    del keys["train"]["batch_tokens"]
    keys["train"]["batch_size"] = asked.padded_rows
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(keys))
    steps: list[list[Example]] = []
    start: Weights = {}

    def trainer(context: RunContext) -> None:
        settings = context.plan.recipe.train
        reader = ExampleReader(context.examples, "train")
        plan = StepPlan(
            lengths=reader.lengths,
            seed=context.plan.recipe.seed,
            batch_size=settings.batch_size,
            batch_tokens=None,
            num_train_epochs=settings.num_train_epochs,
            max_steps=settings.max_steps,
        )
        steps.extend([reader[int(row)] for row in plan.rows(step + 1)] for step in range(plan.total_steps))
        adapted = make_adapted(context)
        named = adapted.model.named_parameters()
        start.update({name: weight.detach().clone() for name, weight in named if weight.requires_grad})
        train(
            adapted,
            context.examples,
            context.plan.task,
            context.plan.recipe,
            context.folder.path,
            context.console,
            budget=4 * asked.pack,
            inputs="benchmark",
        )

    run = folder / "run"
    pipeline.adapt_and_train = trainer
    pipeline.run_pipeline(load_recipe(recipe), RunRequest(out=run, until="train", offline=True), Console(quiet=True))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return losses, steps, start


def train_plain(asked: Asked, folder: Path, steps: list[list[Example]], start: Weights) -> list[float]:
    """Train with transformers' Trainer on the same examples in their order, padded; returns the losses."""
    clock = Clock(sums=False)
    loaded = watch(clock)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    shape = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32), shape)
    assert model.load_state_dict(start, strict=False).unexpected_keys == [], "the adapters are named alike"
    settings: dict[str, Any] = describe_training(replace(asked, dtype="float32"), str(folder / "plain"), packed=False)
    settings |= {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential"}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Dataset.from_list([as_row(example) for step in steps for example in step]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[loaded],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [step["loss"] for step in clock.found()["steps"]]


def as_row(example: Example) -> dict[str, list[int]]:
    """Return ids and labels; only supervised spans are learned."""
    ids = [int(token) for token in example.input_ids]
    labels = [-100] * len(ids)
    for begin, end in zip(example.spans[::2], example.spans[1::2], strict=True):
        labels[begin:end] = ids[begin:end]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


if __name__ == "__main__":
    sys.exit(main())
