"""The runs in the folder of a run, on its rows and with its model: further seeds, and a control run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from llmtune.plan import RunContext
from llmtune.recipe.loader import LoadedRecipe
from llmtune.records import Json
from llmtune.store.run_lock import own_pins
from llmtune.store.run_request import RunRequest
from llmtune.store.seed_runs import (
    SEEDS_UNTIL,
    as_control,
    control_folder,
    is_done,
    kept_findings,
    seed_folder,
    share_rows,
    with_seed,
)

RunRecipe = Callable[[LoadedRecipe, RunRequest, Console], Json]
"""Runs a recipe, as `run_pipeline` does."""


def run_seeds(run: RunContext, loaded: LoadedRecipe, run_recipe: RunRecipe) -> None:
    """Run the recipe for each further seed, with the micro-batches of the run; each seed has its own control run."""
    for seed in loaded.recipe.train.seeds:
        out, findings = seed_folder(run.folder.path, seed), kept_findings(run.folder)
        _run_inside(run, with_seed(loaded, seed), out, findings, run_recipe)


def run_control(run: RunContext, loaded: LoadedRecipe, run_recipe: RunRecipe) -> None:
    """Train and score the recipe's control run, if it has one, before the run itself is scored."""
    control = loaded.recipe.control_run
    if control and control.on and run.request.until in SEEDS_UNTIL:
        further, out = as_control(loaded, control), control_folder(run.folder.path, control)
        _run_inside(run, further, out, {}, run_recipe)


def _run_inside(run: RunContext, further: LoadedRecipe, out: Path, findings: Json, run_recipe: RunRecipe) -> None:
    """Run a recipe in a folder of the run, as far as the run, but without gates and products.

    A valid run is skipped, and an interrupted one resumes. It reuses base answers of the run, if there are any.
    """
    path, until, offline = run.folder.path, SEEDS_UNTIL[run.request.until], run.request.offline
    run.console.rule(f"{out.parent.name.removesuffix('s')} {out.name}", align="left")
    run.once(partial(share_rows, run.folder, out, further.fingerprint))
    base = run.request.base or path / "evaluation"
    request = RunRequest(out=out, until=until, offline=offline, pins=own_pins(path), findings=findings, base=base)
    run_recipe(further, request, run.console)


def rescore_control(loaded: LoadedRecipe, path: Path, rescore: Callable[[LoadedRecipe, Path], Json]) -> None:
    """Score the control run of a finished run again, if it is trained."""
    control = loaded.recipe.control_run
    if control and control.on and is_done(out := control_folder(path, control), "train"):
        rescore(as_control(loaded, control), out)


def rescore_seeds(loaded: LoadedRecipe, path: Path, rescore: Callable[[LoadedRecipe, Path], Json]) -> None:
    """Score the runs of further seeds of a finished run again, those that are trained."""
    for seed in loaded.recipe.train.seeds:
        if is_done(out := seed_folder(path, seed), "train"):
            rescore(with_seed(loaded, seed), out)
