"""Train the rows of a finished embed or rerank run with sentence-transformers, and compare scores, time and memory.

    python benchmarks/sentence_trainer.py RUN [--seed N]... [--steps N] [--dtype NAME] [--tool llmtune] [--threads N]

It trains the run's model on the run's training rows, with the same batches in the same order, and the run's loss,
optimiser, schedule, adapter, lengths and number format. Then it saves the model, loads the folder with
sentence-transformers, and scores the run's test rows with llmtune's metrics. It prints a line of JSON per seed.
`--seed` is the run's or one of its `train.seeds`: it uses that seed's batches, and compares with that seed's scores.

`--tool llmtune` trains the same with llmtune in the same kind of process, without scores, to compare time and memory.
Both count from the first to the last optimiser step. It needs sentence-transformers, which llmtune does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from classify_trainer import find_model
from clock import Clock, peak_resident
from rich.console import Console

from llmtune.data.examples import ExampleReader, load_examples
from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.data.search_rows import named_texts
from llmtune.evaluate.evaluated_task import EvalPrediction
from llmtune.evaluate.metric import Measure, own_interval, paired_difference
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.model.device import resolve_dtype
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.tasks.embed import Embed
from llmtune.tasks.rerank import Rerank, ranked, rerank_section
from llmtune.tasks.sentence_vectors import embed_section
from llmtune.train.batch_plan import StepPlan
from llmtune.train.optimizer import build_optimizer, build_schedule

Row = dict[str, Any]


def main() -> int:
    asked = read_arguments()
    torch.set_num_threads(asked.threads)
    stated = load_recipe(asked.run / "recipe.yaml").recipe
    for seed in asked.seed or [stated.seed]:
        run = asked.run if seed == stated.seed else asked.run / "seeds" / str(seed)
        found = {"tool": asked.tool, "seed": seed} | train_once(asked, run, changes(seed, asked))
        print(json.dumps(found), flush=True)
    return 0


def train_once(asked: argparse.Namespace, run: Path, changed: list[str]) -> Row:
    """Train once, and return the settings, time, memory and scores."""
    clock, loaded = Clock(sums=False), load_recipe(asked.run / "recipe.yaml", changed)
    recipe = loaded.recipe
    dtype = str(resolve_dtype(recipe.model.dtype, "cpu")).removeprefix("torch.")
    found: Row = {"task": recipe.task, "method": recipe.adapter.method, "dtype": dtype}
    if asked.tool == "llmtune":
        train_llmtune(loaded, clock)
        return found | describe_training(clock)
    trained, losses = train_sentences(run, recipe, clock)
    found |= describe_training(clock) | {"losses": losses}
    if asked.steps is None:
        found["metrics"] = compare_scores(run, recipe, score_folder(run, recipe, trained))
    return found


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of task embed or rerank")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; default: the run's")
    parser.add_argument("--steps", type=int, help="only so many steps, without scores")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the run's")
    parser.add_argument("--tool", choices=("sentence-transformers", "llmtune"), default="sentence-transformers")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def changes(seed: int, asked: argparse.Namespace) -> list[str]:
    """Return what differs from the run's recipe, as KEY=VALUE."""
    options = {"train.max_steps": asked.steps, "model.dtype": asked.dtype}
    return [f"seed={seed}", "train.seeds=[]", *(f"{key}={value}" for key, value in options.items() if value)]


def describe_training(clock: Clock) -> Row:
    """Return seconds from the first to the last optimiser step, their median per step, and the peak memory."""
    cpu, wall = ([mark[place] - clock.marks[0][place] for mark in clock.marks] for place in (0, 1))
    peak = peak_resident()
    clock.stop()
    return {
        "steps": len(clock.marks),
        "trainable": clock.trainable,
        "cpu_seconds": round(cpu[-1], 2),
        "wall_seconds": round(wall[-1], 2),
        "step_cpu_seconds": round(statistics.median(b - a for a, b in pairwise(cpu)), 3),
        "peak_bytes": peak,
        "above_loaded_bytes": peak - clock.resident,
    }


# llmtune


def train_llmtune(loaded: LoadedRecipe, clock: Clock) -> None:
    """Train with llmtune's own pipeline, from its own preparation; the clock starts after the rehearsal."""
    from llmtune import pipeline
    from llmtune.plan import RunContext
    from llmtune.run_models import make_adapted
    from llmtune.store.run_request import RunRequest
    from llmtune.train.loop import train

    def trainer(context: RunContext) -> None:
        adapted = make_adapted(context)
        clock.loaded(adapted.model)
        budget = context.folder.findings["micro_batch_tokens"]
        parts = (adapted, context.examples, context.plan.task, context.plan.recipe, context.folder.path)
        train(*parts, context.console, budget=budget, on_budget=lambda _: clock.restart(), inputs="benchmark")

    pipeline.adapt_and_train = trainer
    with tempfile.TemporaryDirectory() as folder:
        request = RunRequest(out=Path(folder) / "run", until="train", offline=True)
        pipeline.run_pipeline(loaded, request, Console(quiet=True))


# sentence-transformers


def train_sentences(run: Path, recipe: Recipe, clock: Clock) -> tuple[Any, list[float]]:
    """Return sentence-transformers' model after the training, and the loss of each step."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, set_seed

    disable_progress_bars()
    set_seed(recipe.seed)
    columns, order = read_training(run, recipe)
    model = load_sentence_model(str(find_model(recipe)), recipe)
    if recipe.adapter.method == "lora":
        add_lora(model, run)
    model.train()
    optimizer = build_optimizer(model, recipe, torch.device("cpu"))
    schedule = build_schedule(optimizer, recipe, len(order))
    made = make_trainer(model, recipe, Dataset.from_list(columns), order, (optimizer, schedule))
    made.remove_callback(PrinterCallback)
    clock.loaded(model)
    made.train()
    return model, [line["loss"] for line in made.state.log_history if "loss" in line]


def load_sentence_model(folder: str, recipe: Recipe) -> Any:
    """Load a folder with sentence-transformers, with the recipe's length; weights are float32."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    length = recipe.data.max_length
    if recipe.task == "rerank":
        return CrossEncoder(folder, num_labels=1, max_length=length, device="cpu", local_files_only=True)
    model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    model.max_seq_length = length
    return model


def add_lora(model: Any, run: Path) -> None:
    """Put LoRA on the modules on which the run has it."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(run / "adapter")
    config.inference_mode = False
    model[0].model = get_peft_model(model[0].model, config)


def read_training(run: Path, recipe: Recipe) -> tuple[list[Row], list[list[int]]]:
    """Return a row of texts per training example of the run, and the examples of each of its steps."""
    reader = ExampleReader(load_examples(run / "data" / "examples"), "train")
    rows = [row for _, row in iterate_rows(load_rows(run / "data" / "rows"), "train")]
    train, columns = recipe.train, list[Row]()
    numbers: dict[int, Iterator[int]] = {}
    highest = rerank_section(recipe).max_relevance or 1.0
    for place in reader.rows.tolist():
        row, number = rows[place], next(numbers.setdefault(place, count()))
        one = {"query": row["query"], "passage": row["passages"][number]}
        if recipe.task == "rerank":
            one["label"] = min(1.0, row["relevances"][number] / highest)
        else:
            one |= {f"negative_{i}": text for i, text in enumerate(row["negatives"])}
        columns.append(one)
    plan = StepPlan(reader.lengths, recipe.seed, train.batch_size, None, train.num_train_epochs, train.max_steps)
    return columns, [plan.rows(step).tolist() for step in range(1, plan.total_steps + 1)]


def make_trainer(model: Any, recipe: Recipe, dataset: Any, order: list[list[int]], optimizers: tuple[Any, Any]) -> Any:
    """Return sentence-transformers' trainer with the loss, the number format and the order of the run."""
    from sentence_transformers import (
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    class Planned(DefaultBatchSampler):
        """The steps of the run, in order."""

        def __iter__(self) -> Iterator[list[int]]:
            return iter(order)

        def __len__(self) -> int:
            return len(order)

    settings: Row = {
        "output_dir": tempfile.mkdtemp(prefix="sentence-trainer-"),
        "max_steps": len(order),
        "per_device_train_batch_size": recipe.train.batch_size,
        "batch_sampler": Planned,
        "max_grad_norm": recipe.train.max_grad_norm,
        "bf16": resolve_dtype(recipe.model.dtype, "cpu") == torch.bfloat16,
        "seed": recipe.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    if recipe.task == "rerank":
        arguments, loss = CrossEncoderTrainingArguments(**settings), BinaryCrossEntropyLoss(model)
        return CrossEncoderTrainer(model, arguments, dataset, loss=loss, optimizers=optimizers)
    section = embed_section(recipe)
    assert section.loss in ("auto", "ranking"), "rows with a query and its passages"
    assert not section.dimensions
    loss = MultipleNegativesRankingLoss(model, scale=section.scale)
    arguments = SentenceTransformerTrainingArguments(**settings)
    return SentenceTransformerTrainer(model, arguments, dataset, loss=loss, optimizers=optimizers)


# Scores


def score_folder(run: Path, recipe: Recipe, model: Any) -> dict[str, Measure]:
    """Save a trained model, load its folder, and return the run's metrics of it on the run's test rows."""
    rows = [row for _, row in iterate_rows(load_rows(run / "data" / "rows"), "test")]
    rows = list(islice(rows, recipe.evaluate.limit))
    if recipe.adapter.method == "lora":
        model[0].model = model[0].model.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = load_sentence_model(folder, recipe)
    task: Any = Rerank() if recipe.task == "rerank" else Embed()
    predictions = rerank_rows(model, rows) if recipe.task == "rerank" else embed_rows(model, rows)
    found = EvalPrediction(predictions, rows)
    known = load_measures(run / "evaluation").tuned
    return {metric: task.compute_metric(metric, found, recipe) for metric in known if metric != "loss"}


def rerank_rows(model: Any, rows: list[Row]) -> list[Any]:
    """Return the scores of each row's passages."""
    pairs = [(row["query"], passage) for row in rows for passage in row["passages"]]
    scores = iter(model.predict(pairs, show_progress_bar=False).tolist())
    return [ranked([next(scores) for _ in row["passages"]]) for row in rows]


def embed_rows(model: Any, rows: list[Row]) -> list[Any]:
    """Return the vectors of each row's texts by name."""
    queries = iter(model.encode_query([row["query"] for row in rows], show_progress_bar=False).tolist())
    others = [text for row in rows for text in (*row["passages"], *row["negatives"])]
    vectors = iter(model.encode_document(others, show_progress_bar=False).tolist())
    return [{name: next(queries if name == "query" else vectors) for name, _ in named_texts(row)} for row in rows]


def compare_scores(run: Path, recipe: Recipe, theirs: dict[str, Measure]) -> Row:
    """Return each metric of base, llmtune and sentence-transformers, with intervals, and the scores per query."""
    measures, seed = load_measures(run / "evaluation"), recipe.seed
    found: Row = {}
    for metric, their in theirs.items():
        base, ours = measures.base.get(metric), measures.tuned[metric]
        change = paired_difference(their, ours, seed)
        found[metric] = {
            "base": None if base is None else base.value,
            "llmtune": show_interval(ours, seed),
            "sentence_transformers": show_interval(their, seed),
            "llmtune_minus_sentence_transformers": [change.value, change.low, change.high],
            "queries": change.n,
            "per_query": {"llmtune": list_values(ours), "sentence_transformers": list_values(their)}
            | ({} if base is None else {"base": list_values(base)}),
        }
    return found


def show_interval(measure: Measure, seed: int) -> list[float]:
    """Return a score with the ends of its 95 % interval over the queries."""
    own = own_interval(measure, seed)
    return [own.value, own.low, own.high]


def list_values(measure: Measure) -> list[float]:
    """Return the metric of each query; of metrics that are no mean over queries, the first of their sums."""
    return [round(float(one), 6) for one in measure.sums_NK[:, 0]]


if __name__ == "__main__":
    sys.exit(main())
