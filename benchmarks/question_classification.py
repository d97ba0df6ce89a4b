"""Tune MiniLM on TREC question classification (Li and Roth, 2002), a task with published scores.

    python benchmarks/question_classification.py TRAIN TEST [--out FOLDER]

TRAIN and TEST are the published 5,452 and 500 questions, one per line after their class, as in `TREC.train.all` and
`TREC.test.all` of github.com/harvardnlp/sent-conv-torch. Prints a line of JSON for each of three seeds. RESULTS.md
compares them with published scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.store.seed_runs import seed_folder

RECIPE = """\
recipe_version: 1
name: question-classification
task: classify
seed: 1
data: {train: train.jsonl, test: test.jsonl, validation: 0.05, deduplicate: exact, max_length: 64}
model: {name: 'builtin:minilm-l6-v2'}
adapter: {method: full}
train: {learning_rate: 2.0e-4, num_train_epochs: 4, batch_size: 32, seeds: [2, 3]}
evaluate: {metrics: [loss, accuracy, f1_macro], gates: [accuracy.low > base]}
"""


def write_rows(lines: Path, rows: Path) -> None:
    """Write the questions of a published file as JSON Lines."""
    with rows.open("w", encoding="utf-8") as file:
        for line in lines.read_text(encoding="latin-1").splitlines():
            label, text = line.split(" ", 1)
            file.write(json.dumps({"text": text, "label": label}) + "\n")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, default=Path("question-classification"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    write_rows(asked.train, asked.out / "train.jsonl")
    write_rows(asked.test, asked.out / "test.jsonl")
    (asked.out / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(asked.out / "recipe.yaml")
    run = asked.out / "run"
    run_pipeline(recipe, RunRequest(out=run, offline=True), Console(stderr=True))
    for seed, folder in {1: run, **{seed: seed_folder(run, seed) for seed in recipe.recipe.train.seeds}}.items():
        evaluation = load_evaluation(folder / "evaluation")
        assert evaluation is not None, "the run has scored its test rows"
        print(json.dumps({"seed": seed, **evaluation.tuned}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
