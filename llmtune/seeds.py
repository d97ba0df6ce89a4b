"""`train.seeds`: the same recipe trained once more for each further seed, a run folder each below the run's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llmtune.evaluate import load_evaluation
from llmtune.recipe import LoadedRecipe, Recipe
from llmtune.records import Evaluation
from llmtune.report.render_terminal import make_table
from llmtune.report.report_record import Report, Seeds
from llmtune.report.score_sections import seed_table
from llmtune.report.seed_variance import describe_spread
from llmtune.session import Options, RunContext
from llmtune.store.atomic_files import explained, hash_value, read_json, staged, write_json
from llmtune.store.run_folder import MANIFEST, RunFolder
from llmtune.store.run_lock import own_pins

FOLDER = "seeds"
SHARED = ("prepare", "encode")
"""Steps whose results do not depend on the seed."""
KEPT = ("micro_batch_tokens", "gradient_checkpointing")
"""Findings of the run that its further seeds keep: nothing but the seed may differ."""
UNTIL = {"train": "train", "evaluate": "evaluate", "run": "evaluate"}
"""How far a further seed goes, by how far the run goes."""

Run = Callable[[LoadedRecipe, Options], Any]


def seed_folder(run: Path, seed: int) -> Path:
    """Return the run folder of a further seed."""
    return run / FOLDER / str(seed)


def without_seeds(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe without its further seeds; what it trains and its fingerprint are the same."""
    train = loaded.recipe.train.model_copy(update={"seeds": ()})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"train": train}))


def with_seed(loaded: LoadedRecipe, seed: int) -> LoadedRecipe:
    """Return the recipe for one further seed; gates and deployment are the run's own affair."""
    alone = without_seeds(loaded)
    judged = alone.recipe.evaluate.model_copy(update={"gates": ()})
    recipe = alone.recipe.model_copy(update={"seed": seed, "evaluate": judged, "deploy": ()})
    origins = {**loaded.origins, "seed": loaded.origins.get("train.seeds", "train.seeds")}
    return replace(alone, recipe=recipe, origins=origins, fingerprint=hash_value([loaded.fingerprint, seed]))


def train_seeds(context: RunContext, loaded: LoadedRecipe, options: Options, run: Run) -> None:
    """Run the recipe once for each further seed, as far as the run itself went; `run` is the pipeline.

    Each run is skipped where it is valid, and goes on where it was stopped. Rows, model and micro-batches are held to
    those of the run.
    """
    path = context.folder.path
    settled = {name: context.folder.findings[name] for name in KEPT if name in context.folder.findings}
    for seed in loaded.recipe.train.seeds:
        further, out = with_seed(loaded, seed), seed_folder(path, seed)
        context.console.rule(f"seed {seed}", align="left")
        share_rows(context.folder, out, further.fingerprint)
        run(
            further,
            replace(
                options,
                out=out,
                resume=False,
                fresh=False,
                lock=None,
                until=UNTIL[options.until],
                pins=own_pins(path),
                settled=settled,
                base=path / "evaluation",
            ),
        )


def share_rows(folder: RunFolder, out: Path, fingerprint: str) -> None:
    """Begin the folder of a further seed with the rows and examples of the run, which are the same for all seeds."""
    if (out / MANIFEST).exists():
        return
    steps = {name: folder.manifest["steps"][name] for name in SHARED if name in folder.manifest["steps"]}
    findings = {name: found for name, found in folder.findings.items() if name == "ranking"}
    with explained(out):
        out.parent.mkdir(exist_ok=True)
        with staged(out) as place:
            shutil.copytree(folder.path / "data", place / "data", copy_function=link)
            write_json(place / MANIFEST, {"fingerprint": fingerprint, "steps": steps, "findings": findings})


def link(source: str, target: str) -> None:
    """Give a file a second name where the file system can, else copy it: a step never changes a file in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def evaluate_seeds(loaded: LoadedRecipe, run: Path, evaluate: Callable[[LoadedRecipe, Path], Any]) -> None:
    """Score what was trained with further seeds again, with the settings of `loaded`; those not trained are left."""
    for seed in loaded.recipe.train.seeds:
        if is_done(seed_folder(run, seed), "train"):
            evaluate(with_seed(loaded, seed), seed_folder(run, seed))


def is_done(run: Path, step: str) -> bool:
    """Whether a run folder is there and a step of it is done."""
    manifest = read_json(run / MANIFEST) or {}
    done: bool = manifest.get("steps", {}).get(step, {}).get("state") == "done"
    return done


def collect(run: Path, recipe: Recipe, own: Evaluation | None) -> Seeds | None:
    """Return what the scores of all seeds come to, for the report; None without further seeds or without scores.

    `own` is the evaluation of the run itself.
    """
    if not recipe.train.seeds or own is None or not own.tuned:
        return None
    found = {recipe.seed: own}
    for seed in recipe.train.seeds:
        place = seed_folder(run, seed)
        evaluation = load_evaluation(place / "evaluation") if is_done(place, "evaluate") else None
        if evaluation is not None:
            found[seed] = evaluation
    missing = [seed for seed in recipe.train.seeds if seed not in found]
    return describe_spread(found, missing)


def print_spread(report: Report, console: Console) -> None:
    """Print the scores of all seeds, if the report has some."""
    if report.seeds:
        console.print(make_table(seed_table(report.seeds)))
        console.print(report.seeds.told, highlight=False)
