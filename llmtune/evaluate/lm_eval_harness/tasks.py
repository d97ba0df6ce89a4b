"""Tasks of lm-eval by name or from files: found, read with their rows, and checked before a model is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from llmtune.errors import DataError, EnvironmentProblem, Problem, RecipeError, nearest
from llmtune.evaluate.lm_eval_harness.quiet import quietly, replaced
from llmtune.recipe.eval_suites_section import BenchmarkSection, plain_name, suite_name
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.store.lm_eval_tasks import check_task_files, is_file, read_task_file, shipped_names
from llmtune.store.process_environment import offline_switches

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

STUDY = "benchmarks"
ASKED_ERRORS = (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError)
"""What a mistake in a task makes lm-eval raise while questions are asked; of a model itself it says nothing."""
READ_ERRORS = (*ASKED_ERRORS, RuntimeError, StopIteration)
"""What a mistake in a task makes lm-eval, and the libraries under it, raise while it is read with its rows."""
MOST_NAMED = 20


@dataclass(frozen=True)
class Benchmark:
    """One entry of `evaluate.benchmarks`, read by lm-eval."""

    name: str
    """What its scores are called by."""
    section: BenchmarkSection
    asked: tuple[Any, ...]
    """The tasks and groups of lm-eval to be run."""
    tasks: dict[str, Any]
    """Every task by lm-eval's name for it, those of groups too."""
    groups: dict[str, Any] = field(default_factory=dict)

    def plain(self, known_as: str) -> str:
        """Return what the scores of a task or group are called by: what comes out of a file alone, by the file."""
        if is_file(self.section.task) and [known_as] == [found_name(one) for one in self.asked]:
            return self.name
        return plain_name(known_as)


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
        found = tuple([load_benchmark(section, manager) for section in recipe.evaluate.benchmarks])
    problems = [problem for one in found for problem in find_problems(one)]
    problems += find_twice(found)
    problems += find_lost_gates(recipe, found)
    RecipeError.collect(problems)
    return found


def make_manager(recipe: Recipe) -> Any:
    """Return what finds tasks; those that come with lm-eval, which take seconds, only where one is named."""
    from lm_eval.tasks import TaskManager

    files = [read_task_file(Path(one.task)) for one in recipe.evaluate.benchmarks if is_file(one.task)]
    named = len(files) < len(recipe.evaluate.benchmarks) or any(file.members for file in files)
    groups = sorted({str(file.path.parent) for file in files if isinstance(file.config.get("task"), list)})
    return TaskManager(include_defaults=named, include_path=groups or None)


def check_names(recipe: Recipe, manager: Any) -> None:
    """Raise RecipeError for tasks that lm-eval does not know, all of them at once."""
    problems = []
    for i, section in enumerate(recipe.evaluate.benchmarks):
        names = [section.task]
        if is_file(section.task):
            names = sorted(read_task_file(Path(section.task)).members)
        for name in names:
            if name not in manager.task_index:
                what = f"lm-eval has no task '{name}'"
                fix = f"{nearest(name, manager.all_tasks)} All of them: `lm_eval ls tasks`.".strip()
                where = section.task if is_file(section.task) else f"evaluate.{STUDY}.{i}"
                problems.append(Problem(what, where, fix))
    RecipeError.collect(problems)


def load_benchmark(section: BenchmarkSection, manager: Any) -> Benchmark:
    """Read one task, group, or tag (several tasks by one name)."""
    with explained(section.task, READ_ERRORS), moored(section.task):
        found = manager.load([call_name(section.task)])
    groups = found.get("groups") or {}
    within = {name for group in groups.values() for name in group.child_names}
    grouped = {one.task_name for group in groups.values() for one in group.get_all_tasks()}
    asked = [group for name, group in groups.items() if name not in within]
    asked += [one for name, one in found["tasks"].items() if name not in grouped]
    return Benchmark(suite_name(section.task), section, tuple(asked), found["tasks"], groups)


def call_name(task: str) -> str:
    """Return what lm-eval finds a task by: its name, or its file; the file of a group by the name that it states."""
    config = read_task_file(Path(task)).config if is_file(task) else {}
    return str(config["group"]) if isinstance(config.get("task"), list) and "group" in config else task


def found_name(found: Any) -> str:
    """Return lm-eval's name of a task or group."""
    return str(found.task_name if hasattr(found, "task_name") else found.name)


@contextlib.contextmanager
def moored(task: str) -> Iterator[None]:
    """Read relative paths of rows from the task file's own folder, if they are there."""
    if is_file(task) and read_task_file(Path(task)).moored:
        with contextlib.chdir(Path(task).parent):
            yield
    else:
        yield


@contextlib.contextmanager
def explained(task: str, faults: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what lm-eval and its tasks raise into an error that says whose fault it is; refuse code of a hub.

    `faults` are what a mistake in a task makes them raise.
    """
    import evaluate
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the HTTP library's
    from jinja2 import TemplateError

    def refuse(name: str, *_: Any, **__: Any) -> NoReturn:
        wanted.append(str(name))
        raise ValueError(f"metric {name} is code of a hub")

    wanted: list[str] = []
    where = f"evaluate.{STUDY}: {task}"
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
        if not wanted:
            raise DataError.of(
                f"lm-eval cannot use the task: {spell(error)}", where, "Mend it, or remove it."
            ) from error
    if wanted:
        what = f"the metric {wanted[0]} is none of lm-eval's own: it would be fetched from a hub as code, and run"
        raise RecipeError.of(what, where, "Take a metric of lm-eval, or a Python function beside the task file.")


def spell(error: BaseException) -> str:
    """Return an error in one line, with its kind where that says what is wrong."""
    if isinstance(error, StopIteration):
        return "it has no rows"
    told = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__} {told}" if isinstance(error, LookupError | AttributeError) else told


def find_problems(found: Benchmark) -> Iterator[Problem]:
    """Yield what cannot be run, and settings that lm-eval would pass over."""
    where = f"evaluate.{STUDY}: {found.section.task}"
    shots = found.section.num_fewshot
    if not found.tasks:
        yield Problem("there is no task in it", where, "Remove it.")
    for name, task in found.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            what = f"{name} runs the code that a model writes, on this machine"
            yield Problem(what, where, "Remove it; run lm-eval itself in a place where nothing can be harmed.")
        if getattr(task, "MULTIMODAL", False):
            yield Problem(f"{name} asks about pictures or sounds", where, "Remove it: only text is asked here.")
        if shots is not None and task.get_config("num_fewshot") == 0 != shots:
            what = f"num_fewshot: {shots} would have no effect: {name} says 0 itself, and lm-eval keeps to that"
            yield Problem(what, where, "Remove num_fewshot.")


def find_twice(found: tuple[Benchmark, ...]) -> Iterator[Problem]:
    """Yield tasks that two benchmarks hold, since their scores would have one name."""
    seen: dict[str, Benchmark] = {}
    for one in found:
        for name in map(one.plain, (*one.groups, *one.tasks)):
            other = seen.setdefault(name, one)
            if other is not one:
                what = f"the task {name} is in both {other.section.task} and {one.section.task}"
                yield Problem(what, f"evaluate.{STUDY}", "Name one of them.")


def find_lost_gates(recipe: Recipe, found: tuple[Benchmark, ...]) -> Iterator[Problem]:
    """Yield gates about tasks or metrics that are not among the benchmarks."""
    metrics = {
        one.plain(name): set(map(plain_name, task.aggregation())) for one in found for name, task in one.tasks.items()
    }
    groups = {one.plain(name) for one in found for name in one.groups}
    for i, text in enumerate(recipe.evaluate.gates):
        gate = parse_gate(text)
        study, _, rest = gate.metric.partition(".")
        task, _, metric = rest.partition(".")
        if study != STUDY or task in groups:
            continue
        where = f"evaluate.gates.{i}"
        if task not in metrics:
            known = sorted({*metrics, *groups})
            listed = ", ".join(known[:MOST_NAMED]) + ("" if len(known) <= MOST_NAMED else ", ...")
            fix = f"{nearest(task, known)} Tasks: {listed}.".strip()
            yield Problem(f"the gate {text!r} is about no task of evaluate.{STUDY}", where, fix)
        elif metric.partition(".")[0] not in metrics[task]:
            fix = f"Metrics of {task}: {', '.join(sorted(metrics[task]))}."
            yield Problem(f"the gate {text!r} is about a metric that the task does not have", where, fix)
