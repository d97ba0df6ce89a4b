"""The search space of a sweep, and one trial: trained with some values, stopped early if validation is bad."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, LlmtuneError, Problem, RecipeError, Stopped, first_line, nearest
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.recipe.schema import DeploySection
from llmtune.recipe.validation import key_paths
from llmtune.recipe.yaml_reader import Node, file_label, parse_yaml, read_recipe_text
from llmtune.recipe.yaml_writer import scalar
from llmtune.store.atomic_files import explained, write_json
from llmtune.store.json_shapes import read_curve, read_record
from llmtune.store.run_folder import MANIFEST, RunFolder, read_manifest
from llmtune.store.seed_runs import share_rows, without_gates, without_seeds

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

JOURNAL, SEARCHED = "journal.log", "space.json"
FIX = "Restore it, or choose another folder with --out."
STARTUP = 4
"""Trials with random values, all of which end before any is pruned."""


SEARCHED_SECTIONS = ("adapter.", "train.", "preference.")
"""Sections whose keys leave the rows unchanged, which keeps the trials' validation losses comparable."""
KEPT = frozenset(
    {
        "train.eval_metrics",
        "train.metric_for_best_model",
        "train.seeds",
        "train.report_to",
        "train.logging_steps",
        "train.save_total_limit",
        "train.save_steps",
    }
)
EXAMPLE = "Write e.g. `train.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}` or `adapter.r: [8, 16, 32]`."
PARTS = ("low", "high", "log", "step")


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


class Searched(TypedDict):
    """Contents of space.json."""

    searched: str
    """Hash of recipe and space."""


class Pruned(Exception):
    """Validation loss is above the median of earlier trials at the same step."""


def read_space(file: Path, recipe: str, sets: Sequence[str]) -> dict[str, BaseDistribution]:
    """Read a space; raises one RecipeError with all problems, including values that the recipe refuses."""
    root = parse_yaml(read_recipe_text(file), file_label(file), file.parent)
    if not isinstance(root.value, dict) or not root.value:
        raise RecipeError.of("a search space must be a mapping of recipe keys", file_label(file), EXAMPLE)
    space, problems = {}, []
    for key, node in root.value.items():
        try:
            space[key] = _distribution(key, node)
            for value in _ends(space[key]):
                load_recipe(recipe, [*sets, f"{key}={scalar(value)}"])
        except RecipeError as error:
            problems += [Problem(one.what, node.origin, one.fix) for one in error.problems]
    RecipeError.collect(dict.fromkeys(problems))
    return space


def _distribution(key: str, node: Node) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    known = [path for path in key_paths() if path.startswith(SEARCHED_SECTIONS) and path not in KEPT]
    if key not in known:
        fix = f"{nearest(key, known)} Search only keys of adapter, train and preference, which leave rows as is."
        raise RecipeError.of(f"'{key}' cannot be searched", node.origin, fix.strip())
    value: Any = node.plain()
    if isinstance(value, list) and len(value) > 1 and not any(isinstance(one, list | dict) for one in value):
        return CategoricalDistribution(value)
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= set(PARTS):
        raise RecipeError.of(f"'{key}' cannot have the values {scalar(value)}", node.origin, EXAMPLE)
    low, high, log, step = (value.get(name) for name in PARTS)
    numbers = [one for one in (low, high) if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)) or numbers[0] >= numbers[1]:
        raise RecipeError.of(f"'{key}' goes from {scalar(low)} to {scalar(high)}", node.origin, EXAMPLE)
    whole = all(isinstance(one, int) for one in numbers)
    if step is not None and not (
        isinstance(step, int if whole else int | float) and 0 < step <= numbers[1] - numbers[0]
    ):
        fix = "Write a number above 0 and at most `high` - `low`; an integer if they are integers."
        raise RecipeError.of(f"'{key}' cannot have the step {scalar(step)}", node.origin, fix)
    if not isinstance(log, bool | None):
        raise RecipeError.of(f"'{key}' cannot have the log {scalar(log)}", node.origin, "Write `log: true` or omit it.")
    if log and (numbers[0] <= 0 or step is not None):
        raise RecipeError.of(f"'{key}' is logarithmic, which needs low above 0 and no step", node.origin, EXAMPLE)
    if whole:
        return IntDistribution(int(numbers[0]), int(numbers[1]), log=bool(log), step=step or 1)
    return FloatDistribution(float(numbers[0]), float(numbers[1]), log=bool(log), step=step)


def _ends(distribution: BaseDistribution) -> Sequence[Any]:
    """Return the values to check: every choice, or both ends of a range."""
    choices = getattr(distribution, "choices", None)
    return choices if choices is not None else (distribution.low, distribution.high)  # type: ignore[attr-defined]


def suggest(trial: Trial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Return a trial's values; values it already has are kept."""
    return {key: trial._suggest(key, distribution) for key, distribution in space.items()}


def load_with_values(recipe: str, sets: Sequence[str], values: Mapping[str, Any]) -> LoadedRecipe:
    """Load the recipe with a trial's values. Raises RecipeError for values that conflict."""
    return load_recipe(recipe, [*sets, *(f"{key}={scalar(value)}" for key, value in values.items())])


def require_optuna() -> None:
    """Raise EnvironmentProblem if Optuna is not installed."""
    try:
        import optuna  # noqa: F401 - a broken installation counts too
    except ImportError:
        fix = "pip install 'llmtune-cli[sweep]'"
        raise EnvironmentProblem.of("Optuna is not installed", "llmtune sweep", fix) from None


def open_study(out: Path, searched: str) -> Study:
    """Open the storage of a sweep, or create it; refuse another sweep's folder."""
    import optuna
    from optuna.pruners import MedianPruner
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if names and SEARCHED not in names:
        raise RecipeError.of("this folder is not empty and not a sweep", str(out), "Choose another one with --out.")
    if names and read_searched(out) != searched:
        fix = "Choose another folder with --out: this one has the trials of another recipe or space."
        raise RecipeError.of("the recipe or the space has changed", str(out), fix)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        if not names:
            write_json(out / SEARCHED, {"searched": searched})
    pruner = MedianPruner(n_startup_trials=STARTUP)
    with explained(out), _readable_journal(out / JOURNAL):
        storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
        study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, pruner=pruner)
        study.get_trials(deepcopy=False)
    return study


@contextmanager
def _readable_journal(journal: Path) -> Iterator[None]:
    """Name the journal if Optuna cannot read it: Optuna raises whatever error the damaged line causes."""
    if journal.exists() and not journal.is_file():
        raise EnvironmentProblem.of("not a regular file", str(journal), FIX)
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        what = f"damaged: {type(error).__name__}: {first_line(error)}"
        raise EnvironmentProblem.of(what, str(journal), FIX) from error


def read_searched(out: Path) -> str:
    """Return the hash of a sweep's recipe and space; raises EnvironmentProblem if its file is damaged."""
    content = read_record(out / SEARCHED, Searched, fix=FIX)
    if content is None:
        raise EnvironmentProblem.of("damaged, or missing", str(out / SEARCHED), FIX)
    return str(content["searched"])


def run_trial(out: str, recipe: str, options: SweepOptions, number: int) -> tuple[float | None, str | None]:
    """Train with the values of one trial; return its validation loss, or why it has none."""
    from optuna.samplers import TPESampler
    from optuna.trial import Trial

    from llmtune.pipeline import run_pipeline
    from llmtune.store.process_environment import prepare_environment
    from llmtune.store.run_request import RunRequest
    from llmtune.train.metrics_log import ON_VALIDATION

    prepare_environment(network=not options.offline, threads=options.threads)
    folder = Path(out)
    study = open_study(folder, read_searched(folder))
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

    run = sweep_trial_folder(folder, number)
    try:
        loaded = alone(load_with_values(recipe, options.sets, values))
        _share(folder, run, loaded)
        token = ON_VALIDATION.set(watch)
        try:
            for step, loss in validations(run).items():  # a stopped run may not have reported them
                watch(step, loss)
            run_pipeline(loaded, RunRequest(out=run, offline=options.offline, until="train"), Console(file=StringIO()))
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


def sweep_trial_folder(out: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return out / "trials" / f"{number:03d}"


def alone(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe of a trial: no gates, further seeds or deployment."""
    one = without_gates(without_seeds(loaded))
    return replace(one, recipe=one.recipe.model_copy(update={"deploy": DeploySection()}))


def _share(out: Path, run: Path, loaded: LoadedRecipe) -> None:
    """Let a trial reuse the rows and examples of the first."""
    first = sweep_trial_folder(out, 0)
    manifest = read_manifest(first) if (first / MANIFEST).exists() else None
    if run != first and manifest is not None and not (run / MANIFEST).exists():
        with explained(run):
            run.parent.mkdir(parents=True, exist_ok=True)
        share_rows(RunFolder(first, manifest), run, loaded.fingerprint)


def validations(run: Path) -> dict[int, float]:
    """Return a run's validation losses by step."""
    return {
        line["step"]: line["validation_loss"] for line in read_curve(run) if line.get("validation_loss") is not None
    }
