"""The runs in the folder of a run, on its rows and with its model: further seeds, and a control run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from llmtune.errors import TrainingError
from llmtune.plan import RunContext
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.secrets import redact
from llmtune.records import Json
from llmtune.store.run_lock import own_pins
from llmtune.store.run_request import RunRequest
from llmtune.store.seed_runs import (
    SEEDS_UNTIL,
    as_control,
    control_folder,
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
    """Train and score the recipe's control run, if it has one, before the run itself is scored.

    A control run that cannot be trained is noted, and does not end the run.
    """
    control, failure = loaded.recipe.control_run, ""
    if not control or not control.on or run.request.until not in SEEDS_UNTIL:
        return
    try:
        out = control_folder(run.folder.path, control)
        _run_inside(run, as_control(loaded, control), out, {}, run_recipe)
    except TrainingError as error:
        failure = redact(error.problems[0].what)
        run.console.print(f"control {control.name} failed: {failure}", style="yellow", highlight=False, markup=False)
    run.once(lambda: run.folder.note(control_failure=failure))


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
