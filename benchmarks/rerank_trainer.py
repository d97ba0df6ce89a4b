"""Train the rows, model and settings of a finished rerank run with sentence-transformers' CrossEncoderTrainer.

    python benchmarks/rerank_trainer.py RUN --method full|lora [--seed N] [--threads N]

It reads the pairs that the run trained on and tested on, trains with the same epochs, batch, rate, schedule and
number format, and prints one JSON document: its metrics on the test queries, and the run's minus its own with the
paired interval. It needs sentence-transformers, which llmtune does not.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from classify_trainer import SPLITS, find_model, read_side
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, TaskType, get_peft_model
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import PrinterCallback, set_seed

from llmtune.evaluate.metric import paired_difference
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.evaluate.ranking_metrics import RankedQuery, measure_ranking
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe


def main() -> int:
    asked = read_arguments()
    torch.set_num_threads(asked.threads)
    recipe = load_recipe(asked.run / "recipe.yaml").recipe
    rows = {side: read_side(asked.run, side) for side in SPLITS}
    seed = recipe.seed if asked.seed is None else asked.seed
    disable_progress_bars()
    set_seed(seed)
    encoder = CrossEncoder(str(find_model(recipe)), num_labels=1, max_length=recipe.data.max_length, device="cpu")
    if asked.method == "lora":
        encoder[0].model = adapt(encoder[0].model, recipe)
    trainer = build(encoder, recipe, rows["train"], seed)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    found = {
        "method": asked.method,
        "seed": seed,
        "pairs": {side: sum(len(row["passages"]) for row in rows[side]) for side in SPLITS},
        "trainable": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "metrics": compare(asked.run, encoder, rows["test"], recipe),
    }
    print(json.dumps(found, indent=2))
    return 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of task rerank")
    parser.add_argument("--method", choices=("full", "lora"), required=True)
    parser.add_argument("--seed", type=int, help="default: the run's")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def adapt(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """Put LoRA on the linear layers of the body; the head is trained completely."""
    linear = [name for name, part in model.base_model.named_modules() if isinstance(part, torch.nn.Linear)]
    adapter = recipe.adapter
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=linear,
    )
    return get_peft_model(model, config)


def build(encoder: CrossEncoder, recipe: Recipe, rows: list[dict[str, Any]], seed: int) -> CrossEncoderTrainer:
    pairs = [
        {"query": row["query"], "passage": passage, "label": min(1.0, relevance)}
        for row in rows
        for passage, relevance in zip(row["passages"], row["relevances"], strict=True)
    ]
    train = recipe.train
    arguments = CrossEncoderTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=train.num_train_epochs,
        per_device_train_batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=seed,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    loss = BinaryCrossEntropyLoss(encoder)
    trainer = CrossEncoderTrainer(model=encoder, args=arguments, train_dataset=Dataset.from_list(pairs), loss=loss)
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare(run: Path, encoder: CrossEncoder, rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Return each ranking metric of both, and llmtune's minus this one's with its interval."""
    queries = []
    for row in rows:
        scores = encoder.predict([(row["query"], passage) for passage in row["passages"]], show_progress_bar=False)
        queries.append(RankedQuery(scores.tolist(), row["relevances"]))
    found = {}
    for metric, ours in load_measures(run / "evaluation").tuned.items():
        if metric == "loss":
            continue
        theirs = measure_ranking(metric, queries)
        change = paired_difference(theirs, ours, recipe.seed)
        found[metric] = {
            "llmtune": round(ours.value, 4),
            "sentence_transformers": round(theirs.value, 4),
            "difference": [round(number, 4) for number in (change.value, change.low, change.high)],
            "queries": change.n,
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
