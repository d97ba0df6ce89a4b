"""Task files of lm-evaluation-harness, read without it: which files they rest on, and whether they need the network."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from llmtune.errors import DataError, EnvironmentProblem, Problem
from llmtune.recipe.eval_suites_section import TASK_FILES

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

PACKAGE, EXTRA = "lm_eval", "benchmarks"
READERS = frozenset({"json", "csv", "parquet", "text", "arrow", "pandas", "xml", "imagefolder", "audiofolder"})
"""What a task's `dataset_path` says where its rows lie in files (`data_files`)."""
URL = "://"


@dataclass(frozen=True)
class Function:
    """`!function module.name`: Python that stands beside the task file, or is installed."""

    name: str

    def file(self, folder: Path) -> Path:
        """Return the file that it stands in, if it is one of `folder`."""
        return folder / f"{self.name.rpartition('.')[0].replace('.', '/')}.py"


class Constructor(SafeConstructor):
    """Knows lm-eval's only tag."""


Constructor.add_constructor("!function", lambda loader, node: Function(str(node.value)))


@dataclass(frozen=True)
class TaskFile:
    """A task file with all that it includes."""

    path: Path
    config: Mapping[str, Any]
    """Merged with what is included; functions unresolved."""
    files: tuple[Path, ...]
    """The file itself, what it includes, the Python beside it, its rows, and the tasks of its group."""
    remote: bool
    """Whether it names rows or tasks that are not in files."""
    members: frozenset[str] = frozenset()
    """Of a group: the tasks that are named and stand in no file beside it."""
    rows_beside: bool = False
    """Whether all of its relative places of rows are there, seen from its own folder."""


def check_task_files(recipe: Recipe) -> None:
    """Check what can be known of `evaluate.benchmarks` without lm-eval and the network.

    Raises:
        EnvironmentProblem: lm-eval is not installed.
        DataError: a task file, or a file that it names, is missing or cannot be read.
    """
    named = recipe.evaluate.benchmarks
    if named and find_spec(PACKAGE) is None:
        raise EnvironmentProblem.of(
            "benchmarks are run by lm-eval, which is not installed",
            "evaluate.benchmarks",
            f"pip install 'llmtune-cli[{EXTRA}]', or remove the key.",
        )
    problems: list[Problem] = []
    for benchmark in named:
        if is_file(benchmark.task):
            try:
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
            names |= {*folders, *(Path(file).stem for file in files if file.endswith(TASK_FILES))}
    return frozenset(names)


def is_file(task: str) -> bool:
    """Whether a benchmark is a task file rather than the name of a task."""
    return task.endswith(TASK_FILES)


def needs_network(task: str) -> bool:
    """Whether a benchmark's rows may come over the network; a file that cannot be read is left for others to say."""
    if not is_file(task):
        return True
    try:
        return read_task_file(Path(task)).remote
    except DataError:
        return False


def list_task_files(task: str) -> list[Path]:
    """Return the files that a benchmark rests on; none of one that is no file, or cannot be read."""
    try:
        return list(read_task_file(Path(task)).files) if is_file(task) else []
    except DataError:
        return []


def read_task_file(path: Path) -> TaskFile:
    """Read a task file, or that of a group.

    Raises DataError where it, or a file that it names, is missing or cannot be read, or it is no task.
    """
    config, read = load_merged(path, ())
    if not isinstance(config.get("task", config.get("group")), str | list):
        what = "this is no task file of lm-eval: it has neither `task` nor `group`"
        raise DataError.of(what, str(path), "Its documentation: docs/new_task_guide.md of lm-evaluation-harness.")
    files = [*read, *find_python(config, path.parent)]
    places = list(find_places(config.get("dataset_kwargs") or {}))
    relative = [place for place in places if not os.path.isabs(os.path.expanduser(place))]
    rows_beside = bool(relative) and all(glob.glob(place, root_dir=path.parent) for place in relative)
    folder = path.parent if rows_beside else Path.cwd()
    remote = any(map(is_remote, parts_of(config)))
    for place in places if not any(URL in place for place in places) else ():
        found = sorted(map(Path, glob.glob(str(folder / os.path.expanduser(place)))))
        if not found:
            what = f"the task's rows are not there: {place}"
            raise DataError.of(what, str(path), "Name files (`data_files`) from the task file's own folder.")
        files += [file for file in found if file.is_file()]
    members, beside = find_members(config, path)
    for member in beside:
        files += member.files
    remote = remote or bool(members) or any(member.remote for member in beside)
    rows_beside = rows_beside or any(member.rows_beside for member in beside)
    return TaskFile(path, config, tuple(dict.fromkeys(files)), remote, members, rows_beside)


def load_merged(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """Return a file's mapping over those that it includes, and all of these files."""
    path = path.resolve()
    if path in above:
        raise DataError.of("it includes itself", str(path), "Remove the `include`.")
    config = load_yaml(path)
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    files = [path]
    for name in included if isinstance(included, list) else [included]:
        inner, read = load_merged(path.parent / str(name), (*above, path))
        merged |= inner
        files += read
    return merged | config, files


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file of lm-eval's; `!function` becomes a Function."""
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = Constructor
    reader.allow_duplicate_keys = True
    try:
        content = reader.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError.of("there is no such task file", str(path), "Check evaluate.benchmarks.") from None
    except OSError as error:
        raise DataError.of(f"the task file cannot be read: {error.strerror}", str(path)) from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        said = getattr(error, "problem", None) or str(error)
        raise DataError.of(f"the task file is no YAML that can be read: {said}", where) from None
    if not isinstance(content, dict):
        raise DataError.of("the task file is no mapping (`key: value`)", str(path))
    return content


def parts_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a task's mapping, or those of the tasks that are written out within a group's."""
    members = config.get("task")
    if not isinstance(members, list):
        yield config
        return
    for member in members:
        if isinstance(member, dict):
            yield from parts_of({**{key: value for key, value in config.items() if key != "task"}, **member})


def is_remote(config: Mapping[str, Any]) -> bool:
    """Whether a task's rows are those of a hub's data set, or lie behind an address."""
    path = config.get("dataset_path")
    if not isinstance(path, str):
        return False
    if any(URL in place for place in find_places(config.get("dataset_kwargs") or {})):
        return True
    return path not in READERS and not os.path.isdir(os.path.expanduser(path))


def find_places(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `dataset_kwargs` names as files: a text, a list, or either by side."""
    waiting = [settings.get("data_files"), settings.get("data_dir")]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()


def find_python(value: object, folder: Path) -> Iterator[Path]:
    """Yield the files beside a task file that its functions stand in."""
    if isinstance(value, Function):
        file = value.file(folder)
        if file.is_file():
            yield file
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from find_python(item, folder)


def find_members(config: Mapping[str, Any], path: Path) -> tuple[frozenset[str], list[TaskFile]]:
    """Return the tasks that a group names and that stand in no file beside it, and the files of the others."""
    members = config.get("task")
    if not isinstance(members, list):
        return frozenset(), []
    wanted = {name for name in map(member_name, members) if name is not None}
    found: dict[str, TaskFile] = {}
    for file in sorted(path.parent.glob("*.yaml")) if wanted else ():
        named = wanted & set(names_in(str(file), file.stat().st_mtime_ns)) - found.keys()  # the first counts
        if named and file.resolve() != path.resolve():
            found |= dict.fromkeys(named, read_task_file(file))
    return frozenset(wanted - found.keys()), list(found.values())


def member_name(member: object) -> str | None:
    """Return the name of a group's member that is not written out in place."""
    if isinstance(member, str):
        return member
    if isinstance(member, dict) and "dataset_path" not in member:
        name = member.get("task")
        return name if isinstance(name, str) else None
    return None


@cache
def names_in(file: str, modified_ns: int) -> tuple[str, ...]:
    """Return the names of task and group that a YAML file states; none where it cannot be read."""
    try:
        config, _ = load_merged(Path(file), ())
    except DataError:
        return ()
    return tuple(str(config[key]) for key in ("task", "group") if isinstance(config.get(key), str))
