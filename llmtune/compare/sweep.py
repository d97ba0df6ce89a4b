"""`llmtune sweep RECIPE --space FILE`: the values of a recipe's keys with which validation goes best.

The first trial is the recipe as it is. Test rows are read once, when all trials are done, for it and the winner.
A trial's sampler starts from the seed and the trial's number, and trials count for each other only when a round of them
is over: a sweep that was killed ends as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from llmtune.compare.sweep_report import conclude
from llmtune.compare.sweep_space import read_space
from llmtune.compare.sweep_trial import SweepOptions, open_study, run_trial
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.records import Json
from llmtune.report.render_terminal import spinner
from llmtune.store.atomic_files import hash_value
from llmtune.store.process_environment import refuse_network

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


def sweep(recipe: str, options: SweepOptions, console: Console, shown: Console) -> Json:
    """Search, measure the winner once on the test rows, write the report and the best recipe, and return what is known.

    Raises RecipeError for a space or a recipe that cannot be searched; what the recipe itself ends with; Stopped.
    """
    loaded = load_recipe(recipe, options.sets)
    _check_recipe(loaded)
    space = read_space(options.space, recipe, options.sets)
    refuse_network(loaded.recipe, offline=options.offline)
    searched = hash_value([loaded.fingerprint, {key: repr(one) for key, one in space.items()}])
    out = options.out or Path("runs") / f"{loaded.recipe.name}-sweep-{searched[:8]}"
    study = open_study(out, searched)
    console.print(f"searching {', '.join(space)} -> {escape(str(out))}")
    while (done := len(_ended(study))) < options.trials:
        numbers = _next_round(study, min(options.processes, options.trials - done, 1 if not done else options.trials))
        _run_round(study, numbers, recipe, options, out, console)
    return conclude(study, recipe, options, out, console, shown)


def _check_recipe(loaded: LoadedRecipe) -> None:
    data = loaded.recipe.data
    if not data.validation or not data.test:
        missing = "data.validation" if not data.validation else "data.test"
        fix = "Trials are ranked by validation rows, and the winner is measured once on test rows: give both a share."
        raise RecipeError.of(f"a sweep needs {missing}", missing, fix)
    if loaded.recipe.train.metric_for_best_model != "loss":
        fix = "Trials are ranked by validation loss: leave train.metric_for_best_model at loss."
        raise RecipeError.of("a sweep keeps the checkpoint with the lowest loss", "train.metric_for_best_model", fix)
    if "loss" not in loaded.recipe.evaluate.metrics:
        raise RecipeError.of("a sweep needs the metric loss", "evaluate.metrics", "Add loss to evaluate.metrics.")


def _ended(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state.is_finished()]


def _next_round(study: Study, count: int) -> list[int]:
    """Return the numbers of the trials to run now: those that were stopped, and new ones."""
    waiting = [trial.number for trial in study.trials if not trial.state.is_finished()]
    while len(waiting) < count:
        waiting.append(study.ask().number)
    return waiting


def _run_round(
    study: Study, numbers: Sequence[int], recipe: str, options: SweepOptions, out: Path, console: Console
) -> None:
    """Run trials side by side, and tell the study how they ended once all have."""
    from optuna.trial import TrialState

    work = [(str(out.absolute()), recipe, options, number) for number in numbers]
    which = f"trial{'s' if len(work) > 1 else ''} {', '.join(map(str, numbers))} of {options.trials}, counted from 0"
    with spinner(console, which):
        results = [run_trial(*work[0])] if len(work) == 1 else _run_side_by_side(work)
    for number, (loss, why) in zip(numbers, results, strict=True):
        trial = study.trials[number]
        if why and number == 0:
            raise EnvironmentProblem.of(f"the recipe itself does not train: {why}", recipe, "Correct it, then search.")
        state = TrialState.COMPLETE if why is None else TrialState.PRUNED if why == "pruned" else TrialState.FAIL
        study.tell(number, loss if state is TrialState.COMPLETE else None, state=state)
        values = ", ".join(f"{key} {value}" for key, value in study.trials[number].params.items()) or "the recipe"
        ended = f"validation loss {loss:.4f}" if why is None else why
        console.print(f"trial {trial.number}: {values}: {ended}", highlight=False, markup=False, soft_wrap=True)


def _run_side_by_side(work: Sequence[tuple[str, str, SweepOptions, int]]) -> list[tuple[float | None, str | None]]:
    """Run each trial in a process of its own; raises EnvironmentProblem where the system killed one."""
    try:
        with ProcessPoolExecutor(len(work), mp_context=get_context("spawn")) as pool:
            return list(pool.map(run_trial, *zip(*work, strict=True)))
    except BrokenProcessPool as error:
        fix = "Set --processes lower; the same command goes on."
        raise EnvironmentProblem.of("a trial was killed, most likely for lack of memory", "--processes", fix) from error
