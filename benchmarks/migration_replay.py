"""Train a migrated recipe with the rows of another tool's steps: `migration_replay.py RECIPE RUN THEIRS.json START`.

RUN is a finished run of the recipe, whose encoded rows tell which row is which. START is the other tool's adapter before
its first step. A row that the two tools encode to different tokens is an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from llmtune.cli.app import app
from llmtune.data.examples import ExampleReader, load_examples
from llmtune.train import batch_plan


def main() -> None:
    recipe, run, file, start = sys.argv[1:5]
    theirs = json.loads(Path(file).read_text(encoding="utf-8"))
    reader = ExampleReader(load_examples(Path(run) / "data" / "examples"), "train")
    numbers = {tuple(reader[i].input_ids): i for i in range(len(reader))}
    steps = [np.asarray([numbers[tuple(row)] for row in step["rows"]]) for step in theirs["steps"]]
    length = len(steps) // int(theirs["epochs"])
    batch_plan._arrange = lambda plan, epoch: steps[epoch * length : (epoch + 1) * length]
    sets = [f"adapter.start_from={start}", "model.dtype=float32"]
    words = [word for one in sets for word in ("--set", one)]
    done = CliRunner().invoke(app, ["train", recipe, "--out", "replayed", "--offline", *words])
    if done.exit_code:
        sys.exit(f"{done.output}\n{done.exception!r}")


if __name__ == "__main__":
    main()
