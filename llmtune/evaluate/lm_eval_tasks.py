"""Task files of lm-evaluation-harness, read without it: which files they rest on, and whether they need the network.

Nothing heavy is imported: the network is decided on before torch is.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from llmtune.errors import DataError, EnvironmentProblem, Problem
from llmtune.recipe.eval_suites_section import TASK_FILES
from llmtune.recipe.user_files import read_text

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

PACKAGE, EXTRA = "lm_eval", "benchmarks"
READERS = frozenset({"json", "csv", "parquet", "text", "arrow", "pandas", "xml", "imagefolder", "audiofolder"})
"""Values of a task's `dataset_path` that leave its rows to files (`data_files`)."""
URL = "://"
Config = Mapping[str, object]


class Function(str):
    """`!function module.name`: Python that stands beside the task file, or is installed."""


class Constructor(SafeConstructor):
    """Knows lm-eval's only tag."""


Constructor.add_constructor("!function", lambda loader, node: Function(node.value))


@dataclass(frozen=True)
class TaskFile:
    """A task file with all that it includes."""

    path: Path
    config: Config
    """Merged with what is included; functions unresolved."""
    files: tuple[Path, ...]
    """The file itself, what it includes, the Python beside it, its rows, and the tasks of its group."""
    remote: bool
    """Whether it names rows or tasks that are not in files."""
    members: frozenset[str] = frozenset()
    """Of a group: the tasks that are named and stand in no file beside it."""
    rows_beside: bool = False
    """Whether all relative paths of its rows lead to files, seen from its own folder."""


def check_task_files(recipe: Recipe) -> None:
    """Check what can be known of `evaluate.benchmarks` without lm-eval and the network.

    Raises:
        EnvironmentProblem: lm-eval is not installed.
        DataError: a task file, or a file that it names, is missing or cannot be read.
    """
    benchmarks = recipe.evaluate.benchmarks
    if benchmarks and find_spec(PACKAGE) is None:
        fix = f"pip install 'llmtune-cli[{EXTRA}]', or remove the key."
        raise EnvironmentProblem.of("benchmarks need lm-eval, which is not installed", "evaluate.benchmarks", fix)
    problems: list[Problem] = []
    for benchmark in benchmarks:
        try:
            if is_file(benchmark.task):
                read_task_file(Path(benchmark.task))
        except DataError as error:
            problems += error.problems
    DataError.collect(problems)


@cache
def shipped_names() -> frozenset[str]:
    """Return the names of files and folders among lm-eval's tasks: most tasks are called like one of them."""
    names: set[str] = set()
    spec = find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for _, folders, files in os.walk(Path(folder) / "tasks"):
            names |= {*folders, *(Path(file).stem for file in files if is_file(file))}
    return frozenset(names)


def is_file(task: str) -> bool:
    """Whether a benchmark is a task file rather than the name of a task."""
    return task.endswith(TASK_FILES)


def needs_network(task: str) -> bool:
    """Whether a benchmark's rows may come over the network; a file that cannot be read is reported elsewhere."""
    return not is_file(task) or any(file.remote for file in _try_to_read(task))


def list_task_files(task: str) -> list[Path]:
    """Return the files that a benchmark rests on; none of one that is no file, or cannot be read."""
    return [path for file in _try_to_read(task) for path in file.files]


def _try_to_read(task: str) -> Iterator[TaskFile]:
    try:
        if is_file(task):
            yield read_task_file(Path(task))
    except DataError:
        return


def read_task_file(path: Path) -> TaskFile:
    """Read a task file, or that of a group.

    Raises DataError where it, or a file that it names, is missing or cannot be read, or it is no task.
    """
    config, read = load_merged(path, ())
    if not isinstance(config.get("task", config.get("group")), str | list):
        what = "this is no task file of lm-eval: it has neither `task` nor `group`"
        raise DataError.of(what, str(path), "Its documentation: docs/new_task_guide.md of lm-evaluation-harness.")
    data_files = find_data_files(config)
    relative = [name for name in data_files if not os.path.isabs(os.path.expanduser(name))]
    beside = bool(relative) and all(glob.glob(name, root_dir=path.parent) for name in relative)
    modules = [leaf.rpartition(".")[0].replace(".", "/") for leaf in leaves(config) if isinstance(leaf, Function)]
    files = [*read, *(file for module in modules if (file := path.parent / f"{module}.py").is_file())]
    if not any(URL in name for name in data_files):
        files += find_rows(data_files, path.parent if beside else Path.cwd(), path)
    members, tasks = find_members(config, path)
    files += [file for task in tasks for file in task.files]
    remote = bool(members) or any(map(is_remote, parts_of(config))) or any(task.remote for task in tasks)
    beside = beside or any(task.rows_beside for task in tasks)
    return TaskFile(path, config, tuple(dict.fromkeys(files)), remote, members, beside)


def load_merged(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, object], list[Path]]:
    """Return a file's mapping over those that it includes, and all of these files."""
    path = path.resolve()
    if path in above:
        raise DataError.of("it includes itself", str(path), "Remove the `include`.")
    config = load_yaml(path)
    included = config.pop("include", None) or []
    merged: dict[str, object] = {}
    files = [path]
    for name in included if isinstance(included, list) else [included]:
        inner, read = load_merged(path.parent / str(name), (*above, path))
        merged |= inner
        files += read
    return merged | config, files


def load_yaml(path: Path) -> dict[str, object]:
    """Read one YAML file of lm-eval's; `!function` becomes a Function."""
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = Constructor
    reader.allow_duplicate_keys = True
    try:
        content = reader.load(read_text(path))
    except FileNotFoundError:
        raise DataError.of("there is no such task file", str(path), "Check evaluate.benchmarks.") from None
    except OSError as error:
        raise DataError.of(f"the task file cannot be read: {error.strerror}", str(path)) from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise DataError.of(f"the task file is not valid YAML: {what}", where) from None
    if not isinstance(content, dict):
        raise DataError.of("the task file is no mapping (`key: value`)", str(path))
    return content


def leaves(value: object) -> Iterator[object]:
    """Yield what stands in a value, at any depth, and is neither list nor mapping."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def parts_of(config: Config) -> Iterator[Config]:
    """Yield a task's mapping, or those of the tasks that are written out within a group's."""
    members = config.get("task")
    if not isinstance(members, list):
        yield config
        return
    shared = {key: value for key, value in config.items() if key != "task"}
    for member in members:
        if isinstance(member, dict):
            yield from parts_of({**shared, **member})


def is_remote(config: Config) -> bool:
    """Whether a task's rows are those of a hub's data set, or lie behind an address."""
    path = config.get("dataset_path")
    if not isinstance(path, str):
        return False
    behind_url = any(URL in name for name in find_data_files(config))
    return behind_url or (path not in READERS and not os.path.isdir(os.path.expanduser(path)))


def find_data_files(config: Config) -> list[str]:
    """Return what `dataset_kwargs` names as files: a text, a list, or either by split."""
    settings = config.get("dataset_kwargs")
    named = [settings.get(key) for key in ("data_files", "data_dir")] if isinstance(settings, dict) else []
    return [leaf for leaf in leaves(named) if isinstance(leaf, str)]


def find_rows(names: list[str], folder: Path, path: Path) -> Iterator[Path]:
    """Yield the files of rows; raises DataError for a name without one."""
    for name in names:
        found = sorted(map(Path, glob.glob(str(folder / os.path.expanduser(name)))))
        if not found:
            fix = "Name files (`data_files`) from the task file's own folder."
            raise DataError.of(f"the task's rows are not there: {name}", str(path), fix)
        yield from (file for file in found if file.is_file())


def find_members(config: Config, path: Path) -> tuple[frozenset[str], list[TaskFile]]:
    """Return the tasks that a group names and that stand in no file beside it, and the files of the others."""
    members = config.get("task")
    listed = members if isinstance(members, list) else []
    apart = [one.get("task") for one in listed if isinstance(one, dict) and "dataset_path" not in one]
    names = {name for name in (*listed, *apart) if isinstance(name, str)}
    found: dict[str, TaskFile] = {}
    for file in sorted(path.parent.glob("*.yaml")) if names else ():
        stated = names & set(names_in(str(file), file.stat().st_mtime_ns)) - found.keys()  # the first counts
        if stated and file.resolve() != path.resolve():
            found |= dict.fromkeys(stated, read_task_file(file))
    return frozenset(names - found.keys()), list(found.values())


@cache
def names_in(file: str, modified_ns: int) -> tuple[str, ...]:
    """Return the names of task and group that a YAML file states; none where it cannot be read."""
    try:
        config, _ = load_merged(Path(file), ())
    except DataError:
        return ()
    return tuple(str(config[key]) for key in ("task", "group") if isinstance(config.get(key), str))
