"""The code that a test executes: which functions, in this process and its children, and a hash of what they are now.

A function counts with its decorators, the fields of its class, and the module-level values that it reads, also through
imports from this repository. Comments, docstrings and layout do not count. Not seen: module-level statements without an
assignment, values that an earlier test left in a module's cache, children that are killed or get no environment, files
that only a child reads, and other packages.
"""

from __future__ import annotations

import ast
import base64
import functools
import gc
import hashlib
import os
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import coverage

ROOT = Path(os.environ.get("PROOF_ROOT", Path(__file__).parents[2])).resolve()
FOLDERS = ("llmtune", "tests", "benchmarks")
DATA = ("llmtune", "recipes")
"""Folders whose other files count if a test opens them."""
NAME = re.compile(r"Name\(id='(\w+)'")
DOTTED = re.compile(r"Attribute\(value=Name\(id='(\w+)', ctx=Load\(\)\), attr='(\w+)'")
Place = tuple[str, str]
"""A file, and a name that it defines."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SETTINGS = """[run]
data_file = {data}/child
parallel = true
patch = subprocess, fork, _exit
include = {include}
omit = */support/proof.py, */support/recorder.py, */support/executed.py
disable_warnings = no-data-collected, trace-changed, couldnt-parse
"""


class Module:
    """The functions of a file, and the statements that give its other names a value."""

    def __init__(self, path: Path, root: Path) -> None:
        self.root, self.functions, self.lines = root, dict[str, ast.AST](), dict[int, str]()
        self.values: dict[str, list[ast.AST]] = defaultdict(list)
        self.imports: dict[str, tuple[str, str]] = {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):  # docstrings
                node.body = [
                    one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
                ]
            if isinstance(node, ast.ImportFrom) and not node.level:
                self.imports |= {one.asname or one.name: (str(node.module), one.name) for one in node.names}
        self._read(tree, "")

    def _read(self, node: ast.AST, prefix: str) -> None:
        for part in list(ast.iter_child_nodes(node)):
            if isinstance(part, FUNCTIONS):
                self.functions[prefix + part.name] = part
                first = part.body[0].lineno if part.body else part.end_lineno
                self.lines |= dict.fromkeys(range(first, part.end_lineno + 1), prefix + part.name)
            elif isinstance(part, ast.ClassDef):
                self._read(part, f"{prefix}{part.name}.")
                part.body = [one for one in part.body if not isinstance(one, FUNCTIONS)]
                self.values[part.name].append(part)
            elif isinstance(part, ast.Assign | ast.AnnAssign | ast.AugAssign) and not prefix:
                for target in part.targets if isinstance(part, ast.Assign) else [part.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            self.values[name.id].append(part)
            elif isinstance(part, ast.If | ast.Try | ast.For | ast.With | ast.ExceptHandler):
                self._read(part, prefix)


class Code:
    """The repository's functions, each with the digest of all that it is made of."""

    def __init__(self, root: Path = ROOT) -> None:
        gc.disable()  # millions of nodes stay: looking for garbage among them would double the time
        paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
        self.modules = {path.relative_to(root).as_posix(): read_module(path, root) for path in paths}
        self.values: dict[Place, tuple[str, set[Place]]] = {}
        self.digests: dict[int, list[str]] = defaultdict(list)
        self.hashes: dict[str, str] = {}
        for file, module in self.modules.items():
            for name, node in module.functions.items():
                holder = name.rpartition(".")[0].rpartition(".")[2]
                made, reads = self._read(file, [node, *module.values.get(holder, ())])
                waiting, seen = [*reads], {(file, name): made}
                while waiting:
                    if (place := waiting.pop()) not in seen:
                        seen[place], reads = self._read_value(place)
                        waiting += reads
                self.digests[number(f"{file}:{name}")].append(digest(f"{key} {seen[key]}" for key in sorted(seen)))
        for path in (path for folder in DATA for path in (root / folder).rglob("*")):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                name = path.relative_to(root).as_posix()
                self.digests[number(name)].append(digest([name, hashlib.sha256(path.read_bytes()).hexdigest()]))
        gc.enable()

    def _read(self, file: str, nodes: Iterable[ast.AST]) -> tuple[str, set[Place]]:
        """Return the digest of nodes, and the module-level values that they read."""
        text = "".join(map(ast.dump, nodes))
        names = {*NAME.findall(text), *(".".join(pair) for pair in DOTTED.findall(text))}
        return digest([text]), {place for name in names if (place := self._find(file, name))}

    def _read_value(self, place: Place) -> tuple[str, set[Place]]:
        if place not in self.values:
            self.values[place] = self._read(place[0], self.modules[place[0]].values[place[1]])
        return self.values[place]

    def _find(self, file: str, name: str) -> Place | None:
        """Return the file and the name of a module-level value, through imports."""
        name, _, attribute = name.partition(".")
        if name in self.modules[file].values:
            return (file, name) if not attribute else None
        if name not in self.modules[file].imports:
            return None
        source, given = self.modules[file].imports[name]
        for module, wanted in ((f"{source}.{given}", attribute), (source, given)):
            for folder in ("", "tests/", "benchmarks/"):
                for ending in (".py", "/__init__.py"):
                    path = f"{folder}{module.replace('.', '/')}{ending}"
                    if wanted and path != file and path in self.modules:
                        return self._find(path, wanted)
        return None

    def hash(self, numbers: str) -> str:
        """Hash the functions with these numbers, as they are now."""
        if numbers not in self.hashes:
            self.hashes[numbers] = digest(f"{one} {self.digests.get(one)}" for one in unpack(numbers))
        return self.hashes[numbers]

    def list_package(self) -> set[str]:
        """Return all functions of the package."""
        files = [(file, module) for file, module in self.modules.items() if file.startswith("llmtune/")]
        return {f"{file}:{name}" for file, module in files for name in module.functions}


@functools.cache
def read_module(path: Path, root: Path) -> Module:
    return Module(path, root)


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def number(name: str) -> int:
    """Return the number of a function: two of 65,536 may share one, and then a change of either counts."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:2])


def pack(names: Iterable[str]) -> str:
    """Write a set of functions as text: the differences of their sorted numbers, compressed."""
    numbers = sorted(set(map(number, names)))
    steps = "".join(chr(one - before) for before, one in zip([0, *numbers], numbers, strict=False))
    return base64.b85encode(zlib.compress(steps.encode("utf-8", "surrogatepass"), 9)).decode() if numbers else ""


def unpack(text: str) -> Iterator[int]:
    total = 0
    for step in zlib.decompress(base64.b85decode(text)).decode("utf-8", "surrogatepass") if text else "":
        total += ord(step)
        yield total


def write_settings(folder: Path, root: Path = ROOT) -> Path:
    """Write coverage's settings for processes that put what they executed into a folder."""
    include = ",".join(f"{root}/{name}/*" for name in FOLDERS)
    path = folder / "coverage.ini"
    path.write_text(SETTINGS.format(data=folder, include=include))
    return path


def name_functions(data: coverage.CoverageData, root: Path = ROOT) -> Iterator[str]:
    """Yield the functions of which a line was executed."""
    for file in data.measured_files():
        path = Path(file)
        if lines := path.suffix == ".py" and path.is_file() and data.lines(file):  # templates also have lines
            functions = read_module(path, root).lines
            yield from {f"{path.relative_to(root).as_posix()}:{functions[one]}" for one in lines if one in functions}


def read_children(folder: Path, root: Path = ROOT) -> set[str]:
    """Return the functions that ended processes executed, and forget them."""
    found = set()
    for path in folder.glob("child.*"):
        data = coverage.CoverageData(basename=str(path))
        try:
            data.read()
            found |= {*name_functions(data, root)}
        except coverage.CoverageException:  # the process is still writing it, or was killed
            continue
        finally:
            data.close()
        path.unlink(missing_ok=True)
    return found


class Tracer:
    """Records which functions run in this process and its children, in turn for each of several names."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder, self.root, self.opened = folder, root, set[str]()
        self.coverage = coverage.Coverage(data_file=None, config_file=str(write_settings(folder, root)))
        self.coverage.start()
        starts = tuple(f"{root}/{name}/" for name in DATA)

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if (
                event == "open"
                and (path := str(arguments[0])).startswith(starts)
                and not path.endswith((".py", ".pyc"))
            ):
                self.opened.add(path.removeprefix(f"{root}/"))

        sys.addaudithook(watch)

    def switch(self, name: str) -> str:
        """Record under another name from now on; return the one so far."""
        return self.coverage.switch_context(name) or ""

    def read(self, name: str) -> set[str]:
        """Return the functions under a name that is no longer recorded, those of ended children, and opened files."""
        data = self.coverage.get_data()
        data.set_query_context(name)
        opened, self.opened = self.opened, set()
        return {*name_functions(data, self.root), *read_children(self.folder, self.root), *opened}
