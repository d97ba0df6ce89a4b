"""Runs of each kind of model to export, and exports of models in memory, which get no score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.deploy.export import ExportFormat, certified_export, check_export
from llmtune.deploy.parity import Certificate
from llmtune.deploy.tuned_model import TunedModel
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from support import families, pairs
from support.classifying import colour_rows

Rows = list[dict[str, Any]]
SILENT = {"generation": {"max_new_tokens": None}}
NUMBERS = [{"text": f"a {t} of size {i}", "label": i / 4} for i in range(12) for t in ("cat", "dog", "fox")]
MANY = [{**row, "label": [row["label"]] if i % 4 else ["red", "blue"]} for i, row in enumerate(colour_rows(40))]
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")
COLOURS = ("red", "green", "blue", "black", "white")


def searched(count: int) -> Rows:
    """Return queries with a passage each."""
    return [
        {"query": f"number {i} {THINGS[i % 8]}", "passage": f"The {THINGS[i % 8]} number {i} is {COLOURS[i % 5]}."}
        for i in range(count)
    ]


def judged(count: int) -> Rows:
    """Return queries with three passages each, and their relevances."""
    return [
        {
            "query": f"Which colour has {THINGS[i % 8]} number {i}?",
            "passages": [
                f"The {THINGS[i % 8]} is {COLOURS[i % 5]}.",
                f"{COLOURS[i % 5]} is a colour.",
                "One fox sits.",
            ],
            "relevances": [2, 1, 0],
        }
        for i in range(count)
    ]


def spoken(folder: Path) -> Rows:
    """Return recordings of tones with words."""
    words = ("one", "two", "three", "four")
    return [{**row, "text": f"it is {words[i % 4]}"} for i, row in enumerate(pairs.tones(folder))]


def train_family(
    folder: Path,
    tiny_llama: Path,
    family: str,
    task: str,
    rows: Rows | Callable[[Path], Rows],
    until: str = "train",
    **sections: Any,
) -> Path:
    """Train a tiny model of a family, `llama` or one of support.families; return the run folder.

    The last step is the result: the start might be the best of so few, and its adapter has no effect.
    """
    sections["train"] = {"load_best_model_at_end": False, **sections.get("train", {})}
    base = tiny_llama if family == "llama" else getattr(families, f"build_{family}")(folder / family)
    recipe = pairs.recipe_of(folder, base, rows(folder) if callable(rows) else rows, task, **sections)
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=folder / "run", until=until), pairs.quiet())
    return folder / "run"


def export_tuned(tuned: TunedModel, form: ExportFormat, out: Path) -> Certificate:
    """Export a model to the folder `out`; return its certificate."""
    check_export(form, tuned, out)
    with certified_export(tuned, form, out) as made:
        return made.certificate
