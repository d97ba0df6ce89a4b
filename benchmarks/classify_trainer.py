"""Train the rows, model and settings of a finished llmtune run with a plain transformers.Trainer script.

    python benchmarks/classify_trainer.py RUN --method full|lora [--model FOLDER] [--threads N]

It reads the rows that the run trained on and tested on, trains with the same epochs, batch, learning rate, schedule and
number format, and prints one JSON document: its accuracy on the test rows, and the run's minus its own with the paired
interval. The script only has what is typical: a tokenizer, a padding collator, and PEFT for LoRA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, TaskType, get_peft_model
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from llmtune.evaluate.metric import measure_right, paired_difference
from llmtune.model.device import resolve_dtype
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe

SPLITS = ("train", "validation", "test")


def main() -> int:
    asked = read_arguments()
    torch.set_num_threads(asked.threads)
    recipe = load_recipe(asked.run / "recipe.yaml").recipe
    rows = {side: read_side(asked.run, side) for side in SPLITS}
    labels = sorted({str(row["label"]) for side in SPLITS for row in rows[side]})
    folder = asked.model or find_model(recipe)
    began = time.monotonic()
    trainer, encoded = build(recipe, asked.method, folder, rows, labels)
    trainer.train()
    seconds = time.monotonic() - began
    predicted = trainer.predict(encoded["test"]).predictions.argmax(-1)
    right = [labels[k] == str(row["label"]) for k, row in zip(predicted, rows["test"], strict=True)]
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    found: dict[str, Any] = {
        "method": asked.method,
        "rows": {side: len(rows[side]) for side in SPLITS},
        "trainable": trainable,
        "seconds": round(seconds, 1),
        "accuracy": float(np.mean(right)),
    }
    found |= hold_against(asked.run, right, recipe.seed)
    print(json.dumps(found, indent=2))
    return 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of task classify, one label a row")
    parser.add_argument("--method", choices=("full", "lora"), required=True)
    parser.add_argument("--model", type=Path, help="model folder; default: the one that the run's recipe names")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def read_side(run: Path, side: str) -> list[dict[str, Any]]:
    """Return the encoded rows of a split, in their order; empty if the split is empty."""
    if not (run / "data" / "rows" / f"{side}.rows.arrow").is_file():
        return []
    rows = read_table(run / "data" / "rows" / f"{side}.rows.arrow").column("row").to_pylist()
    kept = read_table(run / "data" / "examples" / f"{side}.arrow").column("row").to_pylist()
    return [json.loads(rows[i]) for i in kept]


def read_table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def find_model(recipe: Recipe) -> Path:
    """Return the folder of the recipe's model; a packaged one is unpacked."""
    assert recipe.model.name is not None
    return resolve_model(recipe.model.name, recipe.model, Console(stderr=True), True).path


def build(
    recipe: Recipe, method: str, folder: Path, rows: dict[str, list[dict[str, Any]]], labels: list[str]
) -> tuple[Trainer, dict[str, Dataset]]:
    """Build the Trainer; the seed is set before the model's head is made."""
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(recipe.seed)
    dtype = resolve_dtype(recipe.model.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        id2label=dict(enumerate(labels)),
        label2id={name: k for k, name in enumerate(labels)},
    )
    if method == "lora":
        adapter = recipe.adapter
        linear = [n for n, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear)]
        targets = sorted({name.rpartition(".")[2] for name in linear})
        shape = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=targets, **shape))
    encoded = {
        side: Dataset.from_list(
            [
                {
                    **tokenizer(row["text"], row["pair"], truncation=True, max_length=recipe.data.max_length),
                    "labels": labels.index(str(row["label"])),
                }
                for row in rows[side]
            ]
        )
        for side in SPLITS
        if rows[side]
    }
    arguments = describe_training(recipe, dtype, "validation" in encoded)
    held_out = encoded.get("validation")
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, arguments, collator, encoded["train"], held_out, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # it would write to stdout, like the result
    return trainer, encoded


def describe_training(recipe: Recipe, dtype: torch.dtype, validated: bool) -> TrainingArguments:
    """Return the run's settings under Trainer's names."""
    train = recipe.train
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="classify-trainer-"),
        seed=recipe.seed,
        learning_rate=train.learning_rate,
        num_train_epochs=train.num_train_epochs or 1,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.batch_size or 16,
        per_device_eval_batch_size=32,
        optim=train.optim,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        bf16=dtype == torch.bfloat16,
        eval_strategy="epoch" if validated else "no",
        save_strategy="epoch" if validated else "no",
        load_best_model_at_end=validated and train.load_best_model_at_end,
        metric_for_best_model="eval_loss" if validated else None,
        save_total_limit=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        logging_strategy="no",
    )


def hold_against(run: Path, right: list[bool], seed: int) -> dict[str, Any]:
    """Return the run's own accuracy on these rows, and its difference to `right` with the paired interval."""
    path = run / "evaluation" / "predictions.jsonl"
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [line["tuned"] == line["reference"] for line in lines]
    difference = paired_difference(measure_right(right, "accuracy"), measure_right(own, "accuracy"), seed)
    shown = {"value": difference.value, "interval": [difference.low, difference.high], "p": difference.p}
    return {"llmtune_accuracy": float(np.mean(own)), "llmtune_minus_trainer": shown}


if __name__ == "__main__":
    sys.exit(main())
