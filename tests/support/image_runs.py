"""Finished runs of tiny models that were tuned with pictures."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from support.image_text import build_image_text
from support.pictures import save
from support.runs import write_recipe

QUESTION = "Which picture is it?"
SIZES = [(48, 40), (90, 60), (40, 80)]


def write_picture_rows(folder: Path, count: int = 16) -> Path:
    """Write rows that each have a picture, every fourth one two; the last row has none."""
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for i in range(count):
            names = [f"pictures/{i}.png", *([f"pictures/{i}b.png"] if i % 4 == 0 else [])]
            for number, name in enumerate(names):
                save(folder / name, seed=7 * i + number + 1, size=SIZES[(i + number) % len(SIZES)])
            parts: list[object] = [{"type": "image", "path": name} for name in names]
            question = {"role": "user", "content": [*parts, {"type": "text", "text": f"{QUESTION} It is {i}."}]}
            file.write(json.dumps({"messages": [question, {"role": "assistant", "content": f"number {i}"}]}) + "\n")
        turns = [{"role": "user", "content": "Is this text?"}, {"role": "assistant", "content": "it is"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    return path


def finish_image_run(folder: Path, family: str, **sections: Any) -> Path:
    """Tune a tiny model of a family with pictures, and return the run folder: `folder/runs/tiny`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = build_image_text(folder / "base", family)
    rows = write_picture_rows(folder)
    data = {"validation": 0.1, "test": 0.3, "deduplicate": "exact", "max_length": 1024}
    train = {"num_train_epochs": None, "max_steps": 3, "batch_size": 4}
    recipe = write_recipe(folder / "tiny.yaml", base, rows, **{"data": data, "train": train, **sections})
    torch.set_num_threads(1)
    run = folder / "runs" / "tiny"
    run_pipeline(load_recipe(recipe), RunRequest(out=run), Console(file=io.StringIO()))
    return run
