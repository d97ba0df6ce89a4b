"""Classifiers that learn colours: rows, recipes, tiny models of every family, and runs with them."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoConfig

from llmtune.data.examples import load_examples
from llmtune.data.row_store import load_rows
from llmtune.evaluate.classification_metrics import measure_classes
from llmtune.evaluate.opened_runs import ScoredRun
from llmtune.evaluate.per_row_scores import PerRowScores
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import Examples
from llmtune.store.run_request import RunRequest
from llmtune.store.score_records import Evaluation
from llmtune.tasks import classify
from support import families
from support.models import build_gpt2, build_llama
from support.rows import write_jsonl
from support.runs import write_recipe

COLOURS = ("red", "green", "blue")
CLASS_METRICS = ("accuracy", "f1_macro", "f1_weighted", "f1_micro", "matthews", "auroc")
THINGS = ("cat", "dog", "bird", "fish", "fox")
BUILDERS: dict[str, Callable[..., Path]] = {
    "bert": families.build_bert,
    "roberta": families.build_roberta,
    "distilbert": families.build_distilbert,
    "deberta": families.build_deberta,
    "modernbert": families.build_modernbert,
    "llama": build_llama,
    "gpt2": build_gpt2,
}
STILL = {
    **{
        name: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        for name in ("bert", "roberta", "deberta")
    },
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}
"""Without dropout, which makes losses comparable."""


def colour_rows(count: int = 60) -> list[dict[str, Any]]:
    """Return texts that name a colour, with the colour as label."""
    return [
        {"text": f"the {COLOURS[i % 3]} {THINGS[i % 5]} number {i * 7}", "label": COLOURS[i % 3]} for i in range(count)
    ]


def recipe_for(path: Path, model: Path, rows: Path | list[dict[str, Any]], **sections: Any) -> Path:
    """Write a recipe for a quick training; rows given as a list are written next to it."""
    if isinstance(rows, list):
        rows = write_jsonl(path.with_suffix(".rows.jsonl"), rows)
    method = sections.get("adapter", {}).get("method", "lora")
    full = {"r": None, "lora_alpha": None} if method == "full" else {}
    adapter = {**full, **sections.pop("adapter", {})}
    rate = 1e-3 if method == "full" else 3e-3
    train = {"learning_rate": rate, "num_train_epochs": 6, **sections.pop("train", {})}
    evaluate = {"metrics": None, **sections.pop("evaluate", {})}
    own = {"adapter": adapter, "train": train, "evaluate": evaluate, "generation": {"max_new_tokens": None}}
    return write_recipe(path, model, rows, task="classify", **own, **sections)


def run(path: Path, out: Path | None = None, console: Console | None = None) -> tuple[dict[str, Any], Path]:
    """Run a recipe to its end; returns the report and the run folder."""
    out = out or path.with_suffix(".run")
    console = console or Console(file=io.StringIO(), width=200)
    return run_pipeline(load_recipe(str(path)), RunRequest(out=out, offline=True), console), out


def prepared(path: Path) -> tuple[Recipe, Examples]:
    """Prepare the rows of a recipe; return the resolved recipe and the examples."""
    loaded, out = load_recipe(str(path)), path.with_suffix(".prepared")
    quiet = Console(file=io.StringIO(), width=200)
    run_pipeline(loaded, RunRequest(out=out, offline=True, until="prepare"), quiet)
    config = AutoConfig.from_pretrained(str(loaded.recipe.model.name))
    recipe = classify.VARIANTS[0].infer_labels(loaded.recipe, load_rows(out / "data" / "rows"), config)
    return recipe, load_examples(out / "data" / "examples")


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / "predictions.jsonl").read_text().splitlines()]


def scored(
    labels: Sequence[str],
    predicted: Sequence[str],
    references: list[str],
    name: str = "run",
    metrics: Sequence[str] = CLASS_METRICS,
    rename: dict[str, str] | None = None,
) -> ScoredRun:
    """Return the scores of a run that answers each row with `predicted`, at a probability of 0.9."""
    scores_NK = np.full((len(predicted), len(labels)), 0.1 / max(1, len(labels) - 1))
    for n, label in enumerate(predicted):
        scores_NK[n, labels.index(label)] = 0.9
    rows = tuple(range(len(predicted)))
    tuned = {
        metric: replace(measure_classes(metric, "single", scores_NK, references, labels), at=rows) for metric in metrics
    }
    section: dict[str, Any] = {"labels": list(labels)} | ({"rename": rename} if rename else {})
    content = {"task": "classify", "model": {"name": "x/y"}, "data": {"train": "x.jsonl"}, "classify": section}
    details = {"tuned": {"classes": [{"label": label, "support": references.count(label)} for label in labels]}}
    evaluation = Evaluation(
        {}, {metric: one.value for metric, one in tuned.items()}, {}, (), len(rows), details=details
    )
    names = tuple(f"row{n}-1" for n in rows)
    return ScoredRun(name, Recipe.model_validate(content), evaluation, PerRowScores({}, tuned, names))
