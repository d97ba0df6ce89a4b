"""`llmtune sweep RECIPE --space FILE`: find the values of a recipe's keys with the lowest validation loss.

The first trial is the unchanged recipe. Test rows are read once, after all trials, for the recipe and the winner.
A trial's sampler is seeded by the seed and the trial's number, and trials see one another's results only after a
complete round. A killed and resumed sweep therefore ends like an uninterrupted one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.compare.sweep_trial import (
    SweepOptions,
    alone,
    load_with_values,
    open_study,
    read_space,
    require_optuna,
    run_trial,
    sweep_trial_folder,
    validations,
)
from llmtune.data.run_naming import hash_run
from llmtune.display.blocks import Bullets, Column, Compared, Page, Section, Table, TableRows, Text, difference_table
from llmtune.display.console import print_page, spinner
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.evaluate.class_alignment import pair_metrics
from llmtune.evaluate.metric_info import better_side, direction, rank_metrics
from llmtune.evaluate.opened_runs import check_alike, open_runs
from llmtune.evaluate.significance import INCONCLUSIVE
from llmtune.evaluate.verdict import BETTER, WORSE, verdict
from llmtune.recipe.builtin import find_recipe
from llmtune.recipe.layers import INSTEAD
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.yaml_writer import scalar
from llmtune.records import Difference, Json
from llmtune.report.render_html import write_page
from llmtune.report.render_markdown import to_markdown
from llmtune.store.atomic_files import explained, hash_value, plain, write_json, write_text
from llmtune.store.process_environment import refuse_network
from llmtune.store.run_listing import RUNS

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


BATCH_KEYS = ("train.batch_size", "train.batch_tokens")
CLAIMS = {
    BETTER: "The winner is better than the recipe.",
    WORSE: "The winner is worse than the recipe: keep the recipe.",
    INCONCLUSIVE: "It is inconclusive whether the winner is better than the recipe.",
}
NO_GAIN = "The winner is better than the recipe, but not shown to be better than the base: no gain is claimed."


@dataclass(frozen=True)
class SweepResult:
    """Final result of a sweep."""

    trials: list[Json]
    winner: int
    values: dict[str, Any]
    validation_gain: float
    """How much lower the winner's validation loss is than the recipe's, in nats."""
    test_gain: float | None
    """The same on the test rows; None if the recipe itself won, or if rows have no loss."""
    luck: float | None
    """The part of the validation gain that is missing on the test rows."""
    difference: dict[str, Difference]
    """By metric, winner minus recipe on the test rows."""
    word: str
    """better, worse or inconclusive: the winner, by its loss interval on the test rows. A task whose rows have no loss
    of their own is judged by its first metric."""
    summary: str


def conclude_sweep(
    study: Study, recipe: str, options: SweepOptions, out: Path, console: Console, shown: Console
) -> Json:
    """Measure the winner and the recipe once on the test rows; write sweep.json, .md, .html and best.yaml."""
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    winner = min(complete, key=lambda trial: (trial.value, trial.number))
    console.rule("the recipe and the winner on the test rows", align="left")
    for trial in dict.fromkeys((0, winner.number)):
        _evaluate(study.trials[trial], recipe, options, out, console)
    found = _judge(study, winner, out)
    page = _sweep_page(found, recipe, len(complete))
    content: Json = plain({"llmtune": __version__, "recipe": recipe, **asdict(found)})
    with explained(out):
        write_page(out / "sweep.html", page)
        write_text(out / "sweep.md", to_markdown(page))
        write_json(out / "sweep.json", content)
        write_text(out / "best.yaml", _best_recipe(found, recipe, options, out))
    print_page(page, shown)
    shown.print(f"the best recipe: {escape(str(out / 'best.yaml'))}", soft_wrap=True)
    return content


def _evaluate(trial: FrozenTrial, recipe: str, options: SweepOptions, out: Path, console: Console) -> None:
    from llmtune.pipeline import run_pipeline
    from llmtune.store.run_request import RunRequest

    loaded = alone(load_with_values(recipe, options.sets, trial.params))
    first, run = sweep_trial_folder(out, 0), sweep_trial_folder(out, trial.number)
    base = first / "evaluation" if trial.number else None
    run_pipeline(loaded, RunRequest(out=run, offline=options.offline, until="evaluate", base=base), console)


def _judge(study: Study, winner: FrozenTrial, out: Path) -> SweepResult:
    first = study.trials[0]
    trials = [
        {
            "number": trial.number,
            "values": trial.params,
            "state": trial.state.name.lower(),
            "validation_loss": trial.value if trial.state.name == "COMPLETE" else None,
            "steps": len(validations(sweep_trial_folder(out, trial.number))),
        }
        for trial in study.trials
    ]
    gain = float(first.value or 0) - float(winner.value or 0)
    found = SweepResult(trials, winner.number, dict(winner.params), gain, None, None, {}, INCONCLUSIVE, "")
    if winner.number == 0:
        return replace(found, summary="No trial beat the recipe on the validation rows: keep the recipe.")
    runs = open_runs([sweep_trial_folder(out, 0), sweep_trial_folder(out, winner.number)])
    check_alike(runs)
    difference, _ = pair_metrics(*runs)
    learned = verdict(replace(runs[1].evaluation, champion=None)).word == BETTER
    found = replace(found, difference=difference)
    if "loss" not in difference:
        metric = next(name for name in (*runs[0].recipe.evaluate.metrics, *difference) if name in difference)
        return _judge_metric(found, metric, learned)
    return _judge_loss(found, difference["loss"], learned)


def _judge_metric(found: SweepResult, metric: str, learned: bool) -> SweepResult:
    """Judge the winner by a metric on the test rows."""
    change = found.difference[metric]
    sign = direction(metric, change)
    word = BETTER if sign > 0 and learned else WORSE if sign < 0 else INCONCLUSIVE
    claim = NO_GAIN if sign > 0 and not learned else CLAIMS[word]
    held = f"On {change.n} test rows {metric} changed by {change.value:+.4f}"
    summary = f"{claim} {held}, with the interval [{change.low:.4f}, {change.high:.4f}]."
    return replace(found, word=word, summary=summary)


def _judge_loss(found: SweepResult, loss: Difference, learned: bool) -> SweepResult:
    """Judge the winner by its loss on the test rows, and measure how much of its validation gain was luck."""
    gain = found.validation_gain
    word = BETTER if loss.high < 0 else WORSE if loss.low > 0 else INCONCLUSIVE
    if word == BETTER and not learned:
        word = INCONCLUSIVE
    test_gain = -loss.value
    luck = gain - test_gain
    share = f" ({100 * luck / gain:.0f} %)" if gain > 0 and luck > 0 else ""
    held = f"Of {gain:.4f} nats gained on the validation rows, {test_gain:.4f} remain on {loss.n} test rows"
    interval = f"[{-loss.high:.4f}, {-loss.low:.4f}]"
    luck_text = f"{luck:.4f}{share} were selection luck" if luck > 0 else "none was selection luck"
    claim = NO_GAIN if loss.high < 0 and not learned else CLAIMS[word]
    summary = f"{claim} {held}, with the interval {interval}; {luck_text}."
    return replace(found, test_gain=test_gain, luck=luck, word=word, summary=summary)


def _sweep_page(found: SweepResult, recipe: str, complete: int) -> Page:
    order = sorted(
        found.trials, key=lambda one: (one["validation_loss"] is None, one["validation_loss"] or 0, one["number"])
    )
    rows: TableRows = [
        [
            f"{'→ ' if one['number'] == found.winner else ''}{one['number']}",
            ", ".join(f"{key} {_short_value(value)}" for key, value in one["values"].items()) or "the unchanged recipe",
            one["state"],
            "" if one["validation_loss"] is None else f"{one['validation_loss']:.4f}",
        ]
        for one in order
    ]
    scores = [
        Compared(metric, None, None, found.difference[metric], better_side(metric))
        for metric in rank_metrics(found.difference)
    ]
    table = Table(["trial", "values", "ended", Column("validation loss", "number")], rows, scroll=True)
    method = [
        f"{complete} of {len(found.trials)} trials ran to the end; pruned ones had a loss above the median.",
        "Trials saw only training and validation rows. The test rows were read once, at the end, for two of them.",
        "The lowest of many losses is partly luck: any gain missing on the test rows was selection luck.",
    ]
    sections = [
        Section("What it says", [Text(found.summary)]),
        Section(
            "The winner minus the recipe, on the test rows", [difference_table(scores, base=None)] if scores else []
        ),
        Section("Trials", [table]),
        Section("Method and limits", [Bullets(method, soft=True)], brief=False),
    ]
    return Page(f"Sweep of {Path(recipe).stem}: {found.word}", sections, [("trials", str(len(found.trials)))])


def _short_value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best_recipe(found: SweepResult, recipe: str, options: SweepOptions, out: Path) -> str:
    """Return a recipe that extends the searched one, with the evidence as comments."""
    stated = {key: scalar(value) for key, value in found.values.items()}
    stated |= {
        key.strip(): value for key, _, value in (text.partition("=") for text in options.sets) if key not in stated
    }
    origins = load_recipe(recipe).origins
    for key in list(stated):
        if (
            (other := INSTEAD.get(key)) is not None
            and other not in stated
            and origins.get(other, "default") != "default"
        ):
            stated[other] = "null"
    sections: dict[str, dict[str, str]] = {}
    for key, value in stated.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    above = os.path.relpath(find_recipe(recipe), out)
    lines = [
        f"# Trial {found.winner} of {len(found.trials)} of `llmtune sweep`.",
        f"# {found.summary}",
        f"extends: {scalar(above)}",
    ]
    for section, values in sections.items():
        lines += [f"{section}:", *(f"  {name}: {value}" for name, value in values.items() if name)]
    return "\n".join(lines) + "\n"


def run_sweep(recipe: str, options: SweepOptions, console: Console, shown: Console) -> Json:
    """Search, measure the winner once on the test rows, write the report and the best recipe; return the results.

    Raises RecipeError for a space or recipe that cannot be searched, the recipe's own error, or Stopped.
    """
    loaded = load_recipe(recipe, options.sets)
    _check_searchable(loaded)
    require_optuna()
    space = read_space(options.space, recipe, options.sets)
    _check_comparable(loaded, space)
    refuse_network(loaded.recipe, offline=options.offline)
    searched = hash_value([hash_run(loaded), {key: repr(one) for key, one in space.items()}])
    out = options.out or RUNS / f"{loaded.recipe.name}-sweep-{searched[:8]}"
    study = open_study(out, searched)
    console.print(f"searching {', '.join(space)} -> {escape(str(out))}")
    while (done := len(_ended(study))) < options.trials:
        numbers = _next_round(study, min(options.processes, options.trials - done, 1 if not done else options.trials))
        _run_round(study, numbers, recipe, options, out, console)
    return conclude_sweep(study, recipe, options, out, console, shown)


def _check_searchable(loaded: LoadedRecipe) -> None:
    data = loaded.recipe.data
    if not data.validation or not data.test:
        missing = "data.validation" if not data.validation else "data.test"
        fix = "Trials are ranked on validation rows, and the winner is measured once on test rows: give both a share."
        raise RecipeError.of(f"a sweep needs {missing}", missing, fix)
    if loaded.recipe.train.metric_for_best_model != "loss":
        fix = "Trials are ranked by validation loss: set train.metric_for_best_model: loss."
        raise RecipeError.of("a sweep keeps the checkpoint with the lowest loss", "train.metric_for_best_model", fix)
    if "loss" not in loaded.recipe.evaluate.metrics and not _lacks_loss(loaded):
        raise RecipeError.of("a sweep needs the metric loss", "evaluate.metrics", "Add loss to evaluate.metrics.")


def _lacks_loss(loaded: LoadedRecipe) -> bool:
    """Whether rows have no loss of their own: that of a step compares all of its rows."""
    return "loss" not in TASK_FACTS[loaded.recipe.task].metrics


def _check_comparable(loaded: LoadedRecipe, space: Collection[str]) -> None:
    RecipeError.collect(
        Problem(f"'{key}' cannot be searched: with another batch, the validation loss is another", key, "Remove it.")
        for key in BATCH_KEYS
        if key in space and _lacks_loss(loaded)
    )


def _ended(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state.is_finished()]


def _next_round(study: Study, count: int) -> list[int]:
    """Return the numbers of the trials to run now: stopped ones, then new ones."""
    waiting = [trial.number for trial in study.trials if not trial.state.is_finished()]
    while len(waiting) < count:
        waiting.append(study.ask().number)
    return waiting


def _run_round(
    study: Study, numbers: Sequence[int], recipe: str, options: SweepOptions, out: Path, console: Console
) -> None:
    """Run trials in parallel, and report their results to the study once all have ended."""
    from optuna.trial import TrialState

    work = [(str(out.absolute()), recipe, options, number) for number in numbers]
    which = f"trial{'s' if len(work) > 1 else ''} {', '.join(map(str, numbers))} of {options.trials}, counted from 0"
    with spinner(console, which):
        results = [run_trial(*work[0])] if len(work) == 1 else _run_side_by_side(work)
    for number, (loss, why) in zip(numbers, results, strict=True):
        trial = study.trials[number]
        if why and number == 0:
            raise EnvironmentProblem.of(f"the recipe itself does not train: {why}", recipe, "Fix it, then search.")
        state = TrialState.COMPLETE if why is None else TrialState.PRUNED if why == "pruned" else TrialState.FAIL
        study.tell(number, loss if state is TrialState.COMPLETE else None, state=state)
        values = ", ".join(f"{key} {value}" for key, value in study.trials[number].params.items()) or "the recipe"
        ended = f"validation loss {loss:.4f}" if why is None else why
        console.print(f"trial {trial.number}: {values}: {ended}", highlight=False, markup=False, soft_wrap=True)


def _run_side_by_side(work: Sequence[tuple[str, str, SweepOptions, int]]) -> list[tuple[float | None, str | None]]:
    """Run each trial in its own process; raises EnvironmentProblem if the system killed one."""
    try:
        with ProcessPoolExecutor(len(work), mp_context=get_context("spawn")) as pool:
            return list(pool.map(run_trial, *zip(*work, strict=True)))
    except BrokenProcessPool as error:
        fix = "Lower --processes and repeat the command to continue."
        raise EnvironmentProblem.of("a trial was killed, probably for lack of memory", "--processes", fix) from error
