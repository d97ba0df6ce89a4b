"""Classifiers that learn colours: rows, recipes, tiny models of every family, and runs with them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from llmtune.data.examples import load_examples
from llmtune.data.row_store import load_rows
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import Examples
from llmtune.store.run_request import RunRequest
from llmtune.tasks import classify
from support import families
from support.models import build_gpt2, build_llama
from support.rows import write_jsonl
from support.runs import write_recipe

COLOURS = ("red", "green", "blue")
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
