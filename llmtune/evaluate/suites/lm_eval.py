"""Find, read and check tasks of lm-eval by name or file, with their rows, before a model is loaded."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llmtune.errors import DataError, EnvironmentProblem, Problem, RecipeError, nearest
from llmtune.recipe.eval_suites_section import BenchmarkSection, is_task_file, plain_name, suite_name
from llmtune.recipe.extras import require_extra
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.recipe.user_files import read_text_file
from llmtune.store.process_environment import offline_switches

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from llmtune.recipe.schema import Recipe

PACKAGE, KEY = "lm_eval", "evaluate.benchmarks"
RUN_ERRORS = (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError)
"""Errors that lm-eval raises while running a faulty task."""
READ_ERRORS = (*RUN_ERRORS, RuntimeError, StopIteration)
"""Errors that lm-eval and its libraries raise while reading the rows of a faulty task."""
MOST_NAMED = 20


@dataclass(frozen=True)
class Benchmark:
    """One entry of `evaluate.benchmarks`, read by lm-eval."""

    section: BenchmarkSection
    run: dict[str, Task | Group]
    """The tasks and groups to run, by the lm-eval names used below."""
    tasks: dict[str, Task]
    """Every task, including those of groups."""
    groups: dict[str, Group]

    @property
    def name(self) -> str:
        """Name of its scores."""
        return suite_name(self.section.task)

    def plain(self, name: str) -> str:
        """Return the report name of a task or group; a file's only task is named after the file."""
        return self.name if is_task_file(self.section.task) and [*self.run] == [name] else plain_name(name)


def check_task_names(recipe: Recipe) -> None:
    """Check the names and files of `evaluate.benchmarks` offline; names that look right do not even need lm-eval.

    Raises:
        EnvironmentProblem: lm-eval is not installed.
        DataError: a task file is missing or not a task file.
        RecipeError: lm-eval does not know a task.
    """
    names = [one.task for one in recipe.evaluate.benchmarks]
    if names:
        require_extra("benchmarks", KEY)
    for name in filter(is_task_file, names):
        list_task_files(Path(name))
    if {name for name in names if not is_task_file(name)} - shipped_names():  # the index decides
        with quietly():
            tasks = index_shipped().all_tasks
        problems = []
        for i, name in enumerate(names):
            if not is_task_file(name) and name not in tasks:
                fix = f"{nearest(name, tasks)} `lm_eval ls tasks` lists all of them.".strip()
                problems.append(Problem(f"lm-eval has no task '{name}'", f"{KEY}.{i}", fix))
        RecipeError.collect(problems)


def load_benchmarks(recipe: Recipe, console: Console) -> tuple[Benchmark, ...]:
    """Read the tasks of `evaluate.benchmarks` with their rows; named tasks may download theirs.

    Raises:
        RecipeError: a task is unknown or cannot run here, a setting has no effect, or a gate names a score that will
        not exist.
        DataError: a task file or its rows are missing or bad.
        EnvironmentProblem: lm-eval or a package of a task is not installed, or rows cannot be reached.
    """
    check_task_names(recipe)
    sections = recipe.evaluate.benchmarks
    if not sections:
        return ()
    with console.status("benchmarks: reading the tasks"), quietly():
        benchmarks = tuple([load_benchmark(section) for section in sections])
    problems = [problem for one in benchmarks for problem in find_problems(one)]
    RecipeError.collect([*problems, *find_twice(benchmarks), *find_lost_gates(recipe, benchmarks)])
    return benchmarks


@cache
def index_shipped() -> TaskManager:
    """Return the index of the tasks that ship with lm-eval; it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_benchmark(section: BenchmarkSection) -> Benchmark:
    """Read one task, group, or tag (one name for several tasks)."""
    with explain_errors(section, READ_ERRORS):
        loaded = load_file(section) if is_task_file(section.task) else index_shipped().load([section.task])
    tasks, groups = loaded["tasks"], loaded.get("groups") or {}
    nested = {name for group in groups.values() for name in group.child_names}
    grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    run: dict[str, Task | Group] = {name: group for name, group in groups.items() if name not in nested}
    run |= {name: task for name, task in tasks.items() if name not in grouped}
    return Benchmark(section, run, tasks, groups)


def load_file(section: BenchmarkSection) -> TaskDict:
    """Read a task file; relative paths of rows start at its folder, else at the working folder."""
    from lm_eval.tasks import TaskManager

    path = Path(section.task)
    manager, spec = TaskManager(include_defaults=False), str(path)
    if group := read_task_file(path).get("group"):  # lm-eval finds a group's tasks only by name, in an index
        manager, spec = TaskManager(include_defaults=section.needs_network, include_path=str(path.parent)), str(group)
    try:
        with contextlib.chdir(path.parent):
            return manager.load([spec])
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            return manager.load([spec])
        raise


def find_problems(benchmark: Benchmark) -> Iterator[Problem]:
    """Yield tasks that cannot be run, and settings that lm-eval would ignore."""
    where = f"{KEY}: {benchmark.section.task}"
    shots = benchmark.section.num_fewshot
    if not benchmark.tasks:
        yield Problem("the benchmark contains no task", where, "Remove it.")
    for name, task in benchmark.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            what = f"{name} runs model-written code on this machine"
            yield Problem(what, where, "Remove it, and run lm-eval itself in a sandbox.")
        if getattr(task, "MULTIMODAL", False):
            yield Problem(f"{name} asks about pictures or sounds", where, "Remove it: only text is supported.")
        if shots is not None and task.get_config("num_fewshot") == 0 != shots:
            what = f"num_fewshot: {shots} would have no effect: {name} sets it to 0, which takes precedence in lm-eval"
            yield Problem(what, where, "Remove num_fewshot.")


def find_twice(benchmarks: Sequence[Benchmark]) -> Iterator[Problem]:
    """Yield tasks that are in two benchmarks, since their scores would share a name."""
    seen: dict[str, Benchmark] = {}
    for one in benchmarks:
        for name in map(one.plain, (*one.groups, *one.tasks)):
            other = seen.setdefault(name, one)
            if other is not one:
                what = f"the task {name} is in both {other.section.task} and {one.section.task}"
                yield Problem(what, KEY, "Keep one of them.")


def find_lost_gates(recipe: Recipe, benchmarks: Sequence[Benchmark]) -> Iterator[Problem]:
    """Yield gates on tasks or metrics that the benchmarks do not have."""
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
            task_names = sorted({*metrics, *groups})
            listed = ", ".join(task_names[:MOST_NAMED]) + ("" if len(task_names) <= MOST_NAMED else ", ...")
            fix = f"{nearest(task, task_names)} Tasks: {listed}.".strip()
            yield Problem(f"the gate {text!r} names no task of {KEY}", where, fix)
        elif metric.partition(".")[0] not in metrics[task]:
            fix = f"Metrics of {task}: {', '.join(metrics[task])}."
            yield Problem(f"the gate {text!r} names a metric that the task does not have", where, fix)


# Task files, read without lm-eval


@cache
def shipped_names() -> frozenset[str]:
    """Return the names of files and folders among lm-eval's tasks; most tasks are named after one of them."""
    spec = find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return frozenset(path.stem for folder in folders for path in (Path(folder) / "tasks").rglob("*"))


def read_task_file(path: Path) -> dict[str, object]:
    """Return the mapping in a task file, without included files.

    Raises DataError if it is missing or not a task file.
    """
    reader = YAML(typ="rt", pure=True)
    reader.allow_duplicate_keys = True
    try:
        content = reader.load(read_text_file(path))
    except FileNotFoundError:
        raise DataError.of("task file not found", str(path), "Correct evaluate.benchmarks.") from None
    except OSError as error:
        raise DataError.of(f"cannot read the task file: {error.strerror}", str(path)) from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise DataError.of(f"the task file is not valid YAML: {what}", where) from None
    if not isinstance(content, dict) or not {"task", "group", "include"} & content.keys():
        fix = "See docs/new_task_guide.md of lm-evaluation-harness."
        raise DataError.of("not a task file of lm-eval: it has neither `task` nor `group`", str(path), fix)
    return content


def list_task_files(path: Path) -> set[Path]:
    """Return a task file and every file that it may read: the files it names, and the Python files next to it.

    A group includes all task files next to it. Raises DataError as `read_task_file` does.
    """
    files: set[Path] = set()
    left = [path]
    while left:
        file = left.pop().resolve()
        if file in files or (files and not file.is_file()):
            continue
        content: dict[str, object] = {}
        with contextlib.suppress(*[DataError] * bool(files)):  # any YAML file may be next to a group
            content = read_task_file(file) if is_task_file(file.name) else {}
        files.add(file)
        names = [os.path.expanduser(name) for name in texts_in(content)]
        left += [Path(at, one) for at in (file.parent, Path.cwd()) for name in names for one in glob(name, root_dir=at)]
        left += file.parent.glob("*.py") if content else ()
        left += file.parent.glob("*.yaml") if "group" in content else ()
    return files


def texts_in(value: object) -> Iterator[str]:
    """Yield the texts in a value, at any depth, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


# Running lm-eval


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run lm-eval in the block: it prints nothing, and random states are restored afterwards."""
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import torch
    from tqdm import tqdm

    log, hidden = logging.getLogger("lm_eval"), partial(tqdm, disable=True)  # its bars cannot be switched off
    level, bars = log.level, datasets.are_progress_bars_disabled()
    states = random.getstate(), np.random.get_state()
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    with (
        torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []),
        contextlib.redirect_stdout(io.StringIO()),
        replaced(lm_eval.api.task, "tqdm", hidden),
        replaced(lm_eval.models.huggingface, "tqdm", hidden),
        replaced(lm_eval.evaluator, "add_env_info", lambda *_: None),  # it takes seconds; the lock has the facts
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
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a module or an object in the block."""
    attributes = vars(owner)
    before = [attributes[name]] if name in attributes else []
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before:
            setattr(owner, name, before[0])
        else:
            delattr(owner, name)


@contextlib.contextmanager
def explain_errors(section: BenchmarkSection, faults: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn errors of lm-eval and its tasks into llmtune's, and refuse code from a hub.

    `faults` are the errors that a faulty task makes them raise.
    """
    import evaluate
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the HTTP library's
    from jinja2 import TemplateError

    def refuse(name: str, *_: object, **__: object) -> NoReturn:
        fetched.append(str(name))
        raise ValueError(f"metric {name} is code from a hub")

    fetched: list[str] = []
    where = f"{KEY}: {section.task}"
    try:
        with replaced(evaluate, "load", refuse):
            yield
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or error.name
        what = f"the task needs the Python module {missing or error}, which is neither next to it nor installed"
        raise EnvironmentProblem.of(what, where, "Install its package, or remove the task.") from error
    except (HTTPError, ConnectionError) as error:
        raise unreachable(section, where, error) from error
    except (DatasetsError, TemplateError, *faults) as error:
        if not fetched:
            what = f"lm-eval cannot use the task: {one_line_of(error)}"
            raise DataError.of(what, where, "Fix it, or remove it.") from error
    if fetched:
        what = f"the metric {fetched[0]} is not part of lm-eval: its code would be downloaded from a hub and run"
        raise RecipeError.of(what, where, "Use a metric of lm-eval, or a Python function next to the task file.")


def unreachable(section: BenchmarkSection, where: str, error: Exception) -> EnvironmentProblem:
    """Return the error for rows that cannot be fetched."""
    what, fix = f"the hub cannot be reached ({error})", "Check the network and its proxy"
    if offline_switches():
        what, fix = "its rows are not in the cache", "Run once without --offline (HF_HUB_OFFLINE)"
        fix = fix if section.needs_network else f"Set network: true for this entry of {KEY}"
    return EnvironmentProblem(Problem(what, where, f"{fix}, or use a task file with rows of your own."))


def one_line_of(error: BaseException) -> str:
    """Return an error as one line, with its type if that tells what is wrong."""
    if isinstance(error, StopIteration):
        return "it has no rows"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__} {text}" if isinstance(error, LookupError | AttributeError) else text
