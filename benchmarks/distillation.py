"""Time distillation from recorded predictions, next to a teacher that computes them again in each step.

The same batches pass forward and backward through the student, in turns (A B A B), on one thread. A reads the recorded
predictions; B runs the teacher on the batch first. Recording is timed as the step `teach` of the run.

    llmtune models shrink builtin:smollm2-135m-instruct --layers 15 --out student
    python benchmarks/distillation.py rows.jsonl --teacher builtin:smollm2-135m-instruct --student student --rows 10000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from rich.console import Console

from llmtune import run_models
from llmtune.data.examples import ExampleReader
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.teacher_loss import BinRecorder, Distribution
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.records import Batch
from llmtune.store.run_folder import read_manifest
from llmtune.store.run_request import RunRequest
from llmtune.train.teacher_objective import Distilled, TeacherReader


def main() -> None:
    """Record, then time both ways of training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="chat rows: a file")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--rows", type=int, default=300, help="training rows whose predictions are recorded")
    parser.add_argument("--batches", type=int, default=5, help="timed batches of each turn")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way")
    parser.add_argument("--top-k", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = record(arguments, Path(folder))
        print(json.dumps(describe(run) | measure(run, arguments), indent=2))


def record(arguments: argparse.Namespace, folder: Path) -> Path:
    """Run the recipe with one step of training, which records the predictions first; return the run."""
    source = {"path": str(Path(arguments.data).absolute()), "limit": arguments.rows}
    recipe = {
        "recipe_version": 1,
        "name": "distillation",
        "task": "chat",
        "model": {"name": arguments.student, "dtype": "float32"},
        "data": {"train": [source], "validation": 0, "test": 0, "on_overlong": "drop", "max_length": 512},
        "train": {"max_steps": 1, "batch_size": arguments.batch_size},
        "distil": {"teacher": arguments.teacher, "top_k": arguments.top_k},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    run = folder / "run"
    run_pipeline(load_recipe(str(path)), RunRequest(out=run, until="train"), Console(file=sys.stderr))
    return run


def describe(run: Path) -> dict[str, Any]:
    """Return size and time of the recorded predictions."""
    manifest = read_manifest(run)
    assert manifest is not None
    encoded, taught = (manifest["steps"][name] for name in ("encode", "teach"))
    facts = taught["facts"]
    return {
        "rows": encoded["facts"]["rows"]["train"],
        "tokens": encoded["facts"]["tokens"]["train"],
        "predictions": facts["predictions"],
        "megabytes": facts["bytes"] / 1e6,
        "recording_seconds": taught["seconds"],
    }


def measure(run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds per batch of both ways, turn by turn, and when recording pays."""
    context = open_finished(run, Console(quiet=True), offline=True)
    plan, examples, task, section = context.plan, context.examples, context.plan.task, context.plan.recipe.distil
    assert section is not None
    reader = ExampleReader(examples, "train", task.example_type)
    models = run_models.Models(context)
    with run_models.open_teacher(context) as (teacher, _), models.tuned() as student:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("lora_" in name)
        collate = task.collator(plan.processor, plan.recipe, models.packs)
        order = np.random.default_rng(plan.recipe.seed).permutation(len(reader))
        size = arguments.batch_size
        batches = [order[at * size : (at + 1) * size] for at in range(min(arguments.batches, len(reader) // size))]
        read = [(move_to("cpu", collate([reader[int(row)] for row in rows], 0)), rows) for rows in batches]
        recorded = Distilled(task.loss, section, {"train": TeacherReader(run / "data" / "teacher", "train", reader)})

        def cached(batch: Batch, rows: Any) -> torch.Tensor:
            return recorded.loss(student, batch, rows).sum

        def live(batch: Batch, rows: Any) -> torch.Tensor:
            recorder = BinRecorder(section.top_k, section.temperature, len(plan.processor))
            with torch.no_grad():
                task.loss(teacher, {**batch, "teacher": recorder})
            bins = torch.cat(recorder.ids), torch.cat(recorder.logs)
            return task.loss(
                student, {**batch, "teacher": Distribution(*bins, section.weight, section.temperature)}
            ).sum

        def turn(loss: Callable[[Batch, Any], torch.Tensor]) -> float:
            begun = time.perf_counter()
            for batch, rows in read:
                loss(batch, rows).backward()
                student.zero_grad()
            return (time.perf_counter() - begun) / len(read)

        gap = abs(cached(*read[0]).item() / live(*read[0]).item() - 1)
        turns = [(turn(cached), turn(live)) for _ in range(arguments.rounds)]
    seconds = [float(np.mean(column)) for column in zip(*turns, strict=True)]
    steps = len(reader) / size
    return {
        "recorded_seconds_per_batch": [one for one, _ in turns],
        "live_seconds_per_batch": [one for _, one in turns],
        "live_per_recorded": seconds[1] / seconds[0],
        "epochs_until_recording_pays": describe(run)["recording_seconds"] / (steps * (seconds[1] - seconds[0])),
        "relative_difference_of_losses": gap,
    }


if __name__ == "__main__":
    main()
