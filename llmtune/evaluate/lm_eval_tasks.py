"""Task files of lm-evaluation-harness, read without it: nothing heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cache
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llmtune.errors import DataError
from llmtune.recipe.eval_suites_section import is_task_file
from llmtune.recipe.user_files import read_text_file

PACKAGE = "lm_eval"


@cache
def shipped_names() -> frozenset[str]:
    """Return the names of files and folders among lm-eval's tasks: most tasks are called like one of them."""
    spec = find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return frozenset(path.stem for folder in folders for path in (Path(folder) / "tasks").rglob("*"))


def read_task_file(path: Path) -> dict[str, object]:
    """Return the mapping in a task file, without the files that it includes.

    Raises DataError where it is missing or is no task file.
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
    """Return a task file and every file that it may read: those that it names, and the Python next to it.

    A group brings in all task files next to it. Raises DataError as `read_task_file` does.
    """
    found: set[Path] = set()
    left = [path]
    while left:
        file = left.pop().resolve()
        if file in found or (found and not file.is_file()):
            continue
        content: dict[str, object] = {}
        with suppress(DataError) if found else nullcontext():  # any YAML file may lie next to a group
            content = read_task_file(file) if is_task_file(file.name) else {}
        found.add(file)
        names = [os.path.expanduser(name) for name in texts_in(content)]
        left += [Path(at, one) for at in (file.parent, Path.cwd()) for name in names for one in glob(name, root_dir=at)]
        left += file.parent.glob("*.py") if content else ()
        left += file.parent.glob("*.yaml") if "group" in content else ()
    return found


def texts_in(value: object) -> Iterator[str]:
    """Yield the texts in a value, at any depth; keys are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
