"""Tasks of lm-eval by name or from files: found, read with their rows, and checked before a model is loaded."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from rich.console import Console

from llmtune.errors import DataError, EnvironmentProblem, Problem, RecipeError, nearest
from llmtune.evaluate.lm_eval_tasks import check_task_files, is_file, read_task_file, shipped_names
from llmtune.recipe.eval_suites_section import BenchmarkSection, plain_name, suite_name
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.store.process_environment import offline_switches

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from llmtune.recipe.schema import Recipe

KEY = "evaluate.benchmarks"
RUN_ERRORS = (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError)
"""What a mistake in a task makes lm-eval raise while it runs."""
READ_ERRORS = (*RUN_ERRORS, RuntimeError, StopIteration)
"""What a mistake in a task makes lm-eval, and the libraries under it, raise while it is read with its rows."""
MOST_NAMED = 20


@dataclass(frozen=True)
class Benchmark:
    """One entry of `evaluate.benchmarks`, read by lm-eval."""

    name: str
    """What its scores are called by."""
    section: BenchmarkSection
    run: tuple[Task | Group, ...]
    """The tasks and groups of lm-eval to be run."""
    tasks: dict[str, Task]
    """Every task by lm-eval's name for it, those of groups too."""
    groups: dict[str, Group]

    def plain(self, lm_eval_name: str) -> str:
        """Return what the scores of a task or group are called by: what comes out of a file alone, by the file."""
        if is_file(self.section.task) and [lm_eval_name] == list(map(name_of, self.run)):
            return self.name
        return plain_name(lm_eval_name)


def check_benchmarks(recipe: Recipe) -> None:
    """Check what can be known at once, without the network and, if all is well, without lm-eval.

    Raises what `check_task_files` does, and RecipeError for tasks that lm-eval does not know.
    """
    check_task_files(recipe)
    named = {one.task for one in recipe.evaluate.benchmarks if not is_file(one.task)}
    if named - shipped_names():  # the index has the last word; it takes seconds
        with quietly():
            check_names(recipe, make_manager(recipe))


def load_benchmarks(recipe: Recipe, console: Console) -> tuple[Benchmark, ...]:
    """Read the tasks of `evaluate.benchmarks`, with their rows; of named tasks those may come over the network.

    Raises:
        RecipeError: a task that lm-eval does not know or that cannot be run here, a setting that it would not heed, a
            gate about a score that there will not be.
        DataError: a task file or its rows are missing or bad.
        EnvironmentProblem: lm-eval, or a package of a task, is not installed; or the hub cannot be reached.
    """
    if not recipe.evaluate.benchmarks:
        return ()
    check_task_files(recipe)
    with console.status("benchmarks: reading the tasks"), quietly():
        manager = make_manager(recipe)
        check_names(recipe, manager)
        benchmarks = tuple([load_benchmark(section, manager) for section in recipe.evaluate.benchmarks])
    problems = [problem for one in benchmarks for problem in find_problems(one)]
    RecipeError.collect([*problems, *find_twice(benchmarks), *find_lost_gates(recipe, benchmarks)])
    return benchmarks


def make_manager(recipe: Recipe) -> TaskManager:
    """Return what finds tasks; those that come with lm-eval, which take seconds, only where one is named."""
    from lm_eval.tasks import TaskManager

    files = [read_task_file(Path(one.task)) for one in recipe.evaluate.benchmarks if is_file(one.task)]
    named = len(files) < len(recipe.evaluate.benchmarks) or any(file.members for file in files)
    groups = sorted({str(file.path.parent) for file in files if isinstance(file.config.get("task"), list)})
    return TaskManager(include_defaults=named, include_path=groups or None)


def check_names(recipe: Recipe, manager: TaskManager) -> None:
    """Raise RecipeError for tasks that lm-eval does not know, all of them at once."""
    problems = []
    for i, section in enumerate(recipe.evaluate.benchmarks):
        file = is_file(section.task)
        names = sorted(read_task_file(Path(section.task)).members) if file else [section.task]
        for name in names:
            if name not in manager.task_index:
                fix = f"{nearest(name, manager.all_tasks)} All of them: `lm_eval ls tasks`.".strip()
                problems.append(Problem(f"lm-eval has no task '{name}'", section.task if file else f"{KEY}.{i}", fix))
    RecipeError.collect(problems)


def load_benchmark(section: BenchmarkSection, manager: TaskManager) -> Benchmark:
    """Read one task, group, or tag (several tasks by one name)."""
    file = read_task_file(Path(section.task)) if is_file(section.task) else None
    name = section.task  # a group's file is found by the name that it states
    if file is not None and isinstance(file.config.get("task"), list) and "group" in file.config:
        name = str(file.config["group"])
    beside = contextlib.chdir(file.path.parent) if file is not None and file.rows_beside else contextlib.nullcontext()
    with explained(section.task, READ_ERRORS), beside:
        loaded = manager.load([name])
    groups: dict[str, Group] = loaded.get("groups") or {}
    tasks: dict[str, Task] = loaded["tasks"]
    nested = {name for group in groups.values() for name in group.child_names}
    grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    run: list[Task | Group] = [group for name, group in groups.items() if name not in nested]
    run += [task for name, task in tasks.items() if name not in grouped]
    return Benchmark(suite_name(section.task), section, tuple(run), tasks, groups)


def name_of(loaded: Task | Group) -> str:
    """Return lm-eval's name of a task or group."""
    return str(getattr(loaded, "task_name", None) or getattr(loaded, "name", None))


def find_problems(benchmark: Benchmark) -> Iterator[Problem]:
    """Yield what cannot be run, and settings that lm-eval would pass over."""
    where = f"{KEY}: {benchmark.section.task}"
    shots = benchmark.section.num_fewshot
    if not benchmark.tasks:
        yield Problem("there is no task in it", where, "Remove it.")
    for name, task in benchmark.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            what = f"{name} runs the code that a model writes, on this machine"
            yield Problem(what, where, "Remove it; run lm-eval itself in a place where nothing can be harmed.")
        if getattr(task, "MULTIMODAL", False):
            yield Problem(f"{name} asks about pictures or sounds", where, "Remove it: only text is asked here.")
        if shots is not None and task.get_config("num_fewshot") == 0 != shots:
            what = f"num_fewshot: {shots} would have no effect: {name} sets it to 0, and lm-eval keeps to that"
            yield Problem(what, where, "Remove num_fewshot.")


def find_twice(benchmarks: Sequence[Benchmark]) -> Iterator[Problem]:
    """Yield tasks that two benchmarks hold, since their scores would have one name."""
    seen: dict[str, Benchmark] = {}
    for one in benchmarks:
        for name in map(one.plain, (*one.groups, *one.tasks)):
            other = seen.setdefault(name, one)
            if other is not one:
                what = f"the task {name} is in both {other.section.task} and {one.section.task}"
                yield Problem(what, KEY, "Name one of them.")


def find_lost_gates(recipe: Recipe, benchmarks: Sequence[Benchmark]) -> Iterator[Problem]:
    """Yield gates about tasks or metrics that are not among the benchmarks."""
    tasks = [(one.plain(name), task) for one in benchmarks for name, task in one.tasks.items()]
    metrics = {name: sorted(set(map(plain_name, task.aggregation()))) for name, task in tasks}
    groups = {one.plain(name) for one in benchmarks for name in one.groups}
    for i, text in enumerate(recipe.evaluate.gates):
        suite, _, rest = parse_gate(text).metric.partition(".")
        task, _, metric = rest.partition(".")
        if suite != "benchmarks" or task in groups:
            continue
        where = f"evaluate.gates.{i}"
        if task not in metrics:
            known = sorted({*metrics, *groups})
            listed = ", ".join(known[:MOST_NAMED]) + ("" if len(known) <= MOST_NAMED else ", ...")
            fix = f"{nearest(task, known)} Tasks: {listed}.".strip()
            yield Problem(f"the gate {text!r} is about no task of {KEY}", where, fix)
        elif metric.partition(".")[0] not in metrics[task]:
            fix = f"Metrics of {task}: {', '.join(metrics[task])}."
            yield Problem(f"the gate {text!r} is about a metric that the task does not have", where, fix)


# How lm-eval is run


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run lm-eval in the block: nothing of it reaches the terminal, and the seeds that it sets are taken back.

    Standard errors that it would resample, in processes of its own, are left out: paired intervals stand for them.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task
    from tqdm import tqdm

    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.are_progress_bars_disabled()
    states = random.getstate(), np.random.get_state()
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    seeded = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(seeded),
        contextlib.redirect_stdout(io.StringIO()),
        replaced(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)),  # the bar of building requests has no switch
        replaced(lm_eval.api.metrics, "bootstrap_stderr", lambda *_, **__: "N/A"),
    ):
        try:
            yield
        finally:
            log.setLevel(level)
            random.setstate(states[0])
            np.random.set_state(states[1])
            if not bars:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Let a name of a module stand for something else within the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def explained(task: str, faults: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what lm-eval and its tasks raise into an error that says whose fault it is; refuse code of a hub.

    `faults` are what a mistake in a task makes them raise.
    """
    import evaluate
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the HTTP library's
    from jinja2 import TemplateError

    def refuse(name: str, *_: object, **__: object) -> NoReturn:
        fetched.append(str(name))
        raise ValueError(f"metric {name} is code of a hub")

    fetched: list[str] = []
    where = f"{KEY}: {task}"
    try:
        with replaced(evaluate, "load", refuse):
            yield
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or error.name
        what = f"the task needs the Python module {missing or error}, which is neither beside it nor installed"
        raise EnvironmentProblem.of(what, where, "Install its package, or remove the task.") from error
    except (HTTPError, ConnectionError) as error:
        switched = bool(offline_switches())
        what = "its rows are not in the cache" if switched else f"the hub cannot be reached ({error})"
        fix = "Run once without --offline (HF_HUB_OFFLINE)" if switched else "Check the network and its proxy"
        raise EnvironmentProblem.of(what, where, f"{fix}, or take a task file with rows of your own.") from error
    except (DatasetsError, TemplateError, *faults) as error:
        if not fetched:
            what = f"lm-eval cannot use the task: {one_line_of(error)}"
            raise DataError.of(what, where, "Fix it, or remove it.") from error
    if fetched:
        what = f"the metric {fetched[0]} is none of lm-eval's own: it would be fetched from a hub as code, and run"
        raise RecipeError.of(what, where, "Take a metric of lm-eval, or a Python function beside the task file.")


def one_line_of(error: BaseException) -> str:
    """Return an error in one line, with its kind where that says what is wrong."""
    if isinstance(error, StopIteration):
        return "it has no rows"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__} {text}" if isinstance(error, LookupError | AttributeError) else text
