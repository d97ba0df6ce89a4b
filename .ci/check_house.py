"""Check llmtune/ against budget.toml: lines of code by layer, files and their sizes, functions, names, cycles.

A line of code is not blank, not a docstring, not an import, and not only a comment. Files and functions count all
their lines. The layers are those of the import contract in pyproject.toml; a layer may grow by `SLACK` before the check
fails.

python .ci/check_house.py            exit 1 if something is above its limit
python .ci/check_house.py --lower    write smaller numbers into budget.toml where the code has shrunk; never larger ones
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx as nx

SLACK = 0.02
"""Share by which a layer may exceed its number; the number goes down in the nightly job."""
ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmtune"
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
BUDGET = ROOT / "budget.toml"
Function = ast.FunctionDef | ast.AsyncFunctionDef
NO_NAMES = {"__all__", "app"}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def main() -> int:
    """Check, or lower the limits; returns the exit code."""
    budget = tomllib.loads(BUDGET.read_text(encoding="utf-8"))
    files = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    code = {name: count_code(text) for name, text in texts.items()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    layers = layer_lines(code) | {"benchmarks": sum(count_code(path.read_text("utf-8")) for path in BENCHMARKS)}
    if "--lower" in sys.argv[1:]:
        lower({**layers, "max_files": len(files), "max_duplicates": len(shared_names(files))})
        return 0
    problems = [
        *check_layers(layers, budget["layers"]),
        *check_files(lines, budget["files"]),
        *check_functions(files, budget["functions"]),
        *check_basenames(lines, budget["basenames"]),
        *check_names(files, budget["names"]),
        *check_cycles(budget["cycles"]),
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"llmtune/ has {sum(code.values()):,} lines of code in {len(files)} files, within budget.toml.")
    return 1 if problems else 0


def count_code(text: str) -> int:
    """Return how many lines of a module hold code."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        constant = node.value if isinstance(node, ast.Expr) else None
        docstring = isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - skipped)


def layer_lines(lines: dict[str, int]) -> dict[str, int]:
    """Sum lines by layer of the import contract, under names such as `display | store`.

    Modules in no layer, such as `__main__.py`, count with the top layer.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    layers = {layer.replace("llmtune.", ""): 0 for layer in contract["layers"]}
    of_module = {module: layer for layer in layers for module in layer.split(" | ")}
    for name, count in lines.items():
        layers[of_module.get(name.split("/")[0].removesuffix(".py"), next(iter(layers)))] += count
    return layers


def check_layers(layers: dict[str, int], limits: dict[str, int]) -> Iterator[str]:
    """Yield layers above their limit, without one, or gone."""
    for name in [*layers, *(limits.keys() - layers.keys())]:
        if name not in limits:
            yield f"layer {name!r} has no limit: add one to [layers] in budget.toml"
        elif name not in layers:
            yield f"layer {name!r} is gone: remove its limit from [layers] in budget.toml"
        elif layers[name] > (1 + SLACK) * limits[name]:
            excess = 100 * layers[name] / limits[name] - 100
            yield f"layer {name!r} has {layers[name]:,} lines of code, {excess:.1f} % above {limits[name]:,}"


def check_files(lines: dict[str, int], rules: dict) -> Iterator[str]:
    """Yield files that are too long, and their number if there are too many."""
    if len(lines) > rules["max_files"]:
        yield f"llmtune/ has {len(lines)} files, more than {rules['max_files']}: merge small ones"
    large = {name: f"llmtune/{name} has {count} lines" for name, count in lines.items() if count > rules["max_lines"]}
    yield from but_for(large, rules["exceptions"], f"more than {rules['max_lines']}", "files")


def check_functions(files: dict[str, Path], rules: dict) -> Iterator[str]:
    """Yield functions that are too long, decorators left out."""
    large = {}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function) and (count := node.end_lineno - node.lineno + 1) > rules["max_lines"]:
                large[f"{name}::{node.name}"] = f"llmtune/{name}:{node.lineno}: {node.name} has {count} lines"
    yield from but_for(large, rules["exceptions"], f"more than {rules['max_lines']}", "functions")


def check_names(files: dict[str, Path], rules: dict) -> Iterator[str]:
    """Yield the names that several modules define, if there are too many of them."""
    twice = shared_names(files)
    if len(twice) > rules["max_duplicates"]:
        yield f"{len(twice)} names are defined in several modules, more than {rules['max_duplicates']}: rename or merge"
        yield from (f"  {name}: {', '.join(paths)}" for name, paths in sorted(twice.items()))


def shared_names(files: dict[str, Path]) -> dict[str, list[str]]:
    """Return the names that several modules define, with the modules.

    Names are top-level functions, classes, and variables that are not constants; private ones count too.
    """
    where = defaultdict(set)
    for file, path in files.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in defined_names(node):
                where[name].add(file)
    return {name: sorted(paths) for name, paths in where.items() if len(paths) > 1 and name not in NO_NAMES}


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a module defines, constants left out."""
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name) and not target.id.isupper()]


def check_basenames(lines: dict[str, int], rules: dict) -> Iterator[str]:
    """Yield file names that several packages use."""
    where = defaultdict(list)
    for name in lines:
        if not name.endswith(("__init__.py", "__main__.py")):
            where[Path(name).name].append(name)
    twice = {name: f"{' and '.join(paths)} share a name" for name, paths in where.items() if len(paths) > 1}
    yield from but_for(twice, rules["exceptions"], "rename one", "basenames")


def check_cycles(rules: dict) -> Iterator[str]:
    """Yield groups of modules that import each other; imports under TYPE_CHECKING and in functions count."""
    graph = grimp.build_graph("llmtune", cache_dir=None)
    imports = nx.DiGraph(
        (name, other) for name in graph.modules for other in graph.find_modules_directly_imported_by(name)
    )
    groups = [sorted(group) for group in nx.strongly_connected_components(imports) if len(group) > 1]
    cycles = {" ".join(group): f"import cycle: {', '.join(group)}" for group in groups}
    yield from but_for(cycles, rules["exceptions"], "imports point down only", "cycles")


def but_for(broken: dict[str, str], exceptions: dict[str, str], rule: str, table: str) -> Iterator[str]:
    """Yield what is broken and no exception, and exceptions that are not needed any more."""
    for name, what in broken.items():
        if name not in exceptions:
            yield f"{what}: {rule}"
    for name in exceptions.keys() - broken.keys():
        yield f"{name!r} is no exception any more: remove it from [{table}.exceptions] in budget.toml"


def lower(counts: dict[str, int]) -> None:
    """Write the counts that have shrunk into budget.toml."""
    text = BUDGET.read_text(encoding="utf-8")
    for name, count in counts.items():
        text = re.sub(
            rf'^("?{re.escape(name)}"?) = (\d+)',
            lambda found, c=count: f"{found[1]} = {min(int(found[2]), c)}",
            text,
            flags=re.MULTILINE,
        )
    BUDGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
