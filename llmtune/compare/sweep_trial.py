"""One trial of a sweep: the recipe trained with some values, and stopped early where validation goes badly."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llmtune.compare.sweep_space import read_space, suggest, with_values
from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError, Stopped
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.store.atomic_files import explained, read_json_lines, write_json
from llmtune.store.run_folder import MANIFEST, RunFolder, read_manifest
from llmtune.store.seed_runs import share_rows, without_gates, without_seeds

if TYPE_CHECKING:
    from optuna import Study

JOURNAL, SEARCHED, METRICS = "journal.log", "space.json", "metrics.jsonl"
STARTUP = 4
"""Trials that are drawn at random, and that end before any is pruned."""


@dataclass(frozen=True)
class SweepOptions:
    """The options of `llmtune sweep`."""

    space: Path
    trials: int = 20
    processes: int = 1
    sets: tuple[str, ...] = ()
    out: Path | None = None
    threads: int | None = None
    offline: bool = False


class Pruned(Exception):
    """Validation goes worse than in the middle of the trials before, at the same step."""


def require_optuna() -> None:
    """Raise EnvironmentProblem where Optuna is not installed."""
    try:
        import optuna  # noqa: F401 - an installation that is broken counts too
    except ImportError:
        fix = "pip install 'llmtune-cli[sweep]'"
        raise EnvironmentProblem.of("Optuna is not installed", "llmtune sweep", fix) from None


def open_study(out: Path, searched: str) -> Study:
    """Open the storage of a sweep, or begin one; a folder of another sweep is refused."""
    import optuna
    from optuna.pruners import MedianPruner
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if names and SEARCHED not in names:
        raise RecipeError.of("this folder is not empty and no sweep", str(out), "Choose another one with --out.")
    if names and json.loads((out / SEARCHED).read_text("utf-8")).get("searched") != searched:
        fix = "Choose another folder with --out: this one holds the trials of another recipe or space."
        raise RecipeError.of("the recipe or the space is another one than before", str(out), fix)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        if not names:
            write_json(out / SEARCHED, {"searched": searched})
    pruner = MedianPruner(n_startup_trials=STARTUP)
    storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    return optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, pruner=pruner)


def run_trial(out: str, recipe: str, options: SweepOptions, number: int) -> tuple[float | None, str | None]:
    """Train with the values of one trial; return its validation loss, or why there is none."""
    from optuna.samplers import TPESampler
    from optuna.trial import Trial

    from llmtune.pipeline import run_pipeline
    from llmtune.session import Options
    from llmtune.store.process_environment import prepare_environment
    from llmtune.train.metrics_log import ON_VALIDATION

    prepare_environment(network=not options.offline, threads=options.threads)
    folder = Path(out)
    study = open_study(folder, json.loads((folder / SEARCHED).read_text("utf-8"))["searched"])
    seed = (load_recipe(recipe, options.sets).recipe.seed * 100_003 + number) % 2**32
    study.sampler = TPESampler(n_startup_trials=STARTUP, seed=seed, constant_liar=True)
    trial = Trial(study, study.trials[number]._trial_id)
    space = read_space(options.space, recipe, options.sets)
    values = suggest(trial, space) if number else {}
    known = set(study.trials[number].intermediate_values)

    def watch(step: int, loss: float) -> None:
        if step not in known:
            trial.report(loss, step)
            known.add(step)
        if number and trial.should_prune():
            raise Pruned

    run = trial_folder(folder, number)
    try:
        loaded = alone(with_values(recipe, options.sets, values))
        _share(folder, run, loaded)
        token = ON_VALIDATION.set(watch)
        try:
            for step, loss in validations(run).items():  # of a run that was stopped, maybe before it told them
                watch(step, loss)
            run_pipeline(loaded, Options(out=run, offline=options.offline, until="train"), Console(file=StringIO()))
        finally:
            ON_VALIDATION.reset(token)
    except Pruned:
        return None, "pruned"
    except Stopped:
        raise
    except LlmtuneError as error:
        return None, f"failed: {error.problems[0].what}"
    losses = list(validations(run).values())
    return min(losses) if loaded.recipe.train.load_best_model_at_end else losses[-1], None


def trial_folder(out: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return out / "trials" / f"{number:03d}"


def alone(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe of a trial: no gates, further seeds or deployment."""
    one = without_gates(without_seeds(loaded))
    return replace(one, recipe=one.recipe.model_copy(update={"deploy": ()}))


def _share(out: Path, run: Path, loaded: LoadedRecipe) -> None:
    """Let a trial begin with the rows and examples of the first."""
    first = trial_folder(out, 0)
    manifest = read_manifest(first) if (first / MANIFEST).exists() else None
    if run != first and manifest is not None and not (run / MANIFEST).exists():
        with explained(run):
            run.parent.mkdir(parents=True, exist_ok=True)
        share_rows(RunFolder(first, manifest), run, loaded.fingerprint)


def validations(run: Path) -> dict[int, float]:
    """Return the validation losses of a run by step."""
    lines = read_json_lines(run / METRICS) if (run / METRICS).exists() else []
    return {line["step"]: line["validation_loss"] for line in lines if line.get("validation_loss") is not None}
