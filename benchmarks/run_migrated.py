"""Train migrated recipes, twice each: `run_migrated.py TOOL FOLDER...`; `migration.py` prepares the folders.

The first run draws its own steps. The second has the rows of the other tool's steps, and starts from its adapter. A row
that the two tools encode to different tokens is an error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from llmtune.cli.app import app
from llmtune.data.examples import ExampleReader, load_examples
from llmtune.train import batch_plan


def main() -> None:
    tool, *folders = sys.argv[1:]
    arrange = batch_plan._arrange
    for folder in folders:
        os.chdir(folder)
        drawn: list[Any] = []

        def recorded(plan: Any, epoch: int, drawn: list[Any] = drawn) -> Any:
            drawn[:] = arrange(plan, epoch)
            return drawn

        call("recipes", "migrate", "config.yaml", "--tool", tool, "--out", "recipe.yaml")
        batch_plan._arrange = recorded
        call("train", "recipe.yaml", "--out", "own", "--offline", "--set", "model.dtype=float32")
        reader = ExampleReader(load_examples(Path("own/data/examples")), "train")
        steps = [
            {"tokens": int(reader.lengths[rows].sum()), "learned": int(reader.supervised[rows].sum())} for rows in drawn
        ]
        Path("own.json").write_text(json.dumps(steps), encoding="utf-8")
        theirs = their_rows(reader)
        batch_plan._arrange = lambda plan, epoch, theirs=theirs: theirs
        sets = ["--set", "adapter.start_from=start", "--set", "model.dtype=float32"]
        call("train", "recipe.yaml", "--out", "replayed", "--offline", *sets)


def their_rows(reader: ExampleReader) -> list[Any]:
    """Return the numbers of the rows in each of the other tool's steps."""
    theirs = json.loads(Path("theirs.json").read_text(encoding="utf-8"))
    numbers = {tuple(reader[i].input_ids): i for i in range(len(reader))}
    return [np.asarray([numbers[tuple(row)] for row in step["rows"]]) for step in theirs["steps"]]


def call(*words: str) -> None:
    done = CliRunner().invoke(app, [*words])
    if done.exit_code:
        sys.exit(f"{' '.join(words)}\n{done.output}\n{done.exception!r}")


if __name__ == "__main__":
    main()
