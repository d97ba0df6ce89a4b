"""A run that went through all five steps in this process, on a tiny model and rows of its own."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from support.runs import write_recipe


def write_sums(path: Path, count: int = 40) -> Path:
    """Chat rows, all different."""
    with path.open("w") as file:
        for i in range(count):
            question = f"What comes after {i} and before {i + 2}?"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": str(i + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def finish_run(folder: Path, model: Path, /, **sections: Any) -> Path:
    """Write rows and recipe into `folder`, run it, and return the run folder: `folder/runs/tiny`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sums(folder / "rows.jsonl")
    recipe = write_recipe(folder / "tiny.yaml", model, "rows.jsonl", **sections)
    run = folder / "runs" / "tiny"
    torch.set_num_threads(1)
    run_pipeline(load_recipe(recipe), RunRequest(out=run), Console(file=io.StringIO()))
    return run
