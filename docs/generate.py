"""Writes the pages that follow from code and tests: references, guarantees, and the JSON Schema for editors.

python docs/generate.py            write them
python docs/generate.py --check    exit 1 if one of them is not what would be written
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from guarantees_page import guarantee_blocks
from peft_methods import peft_methods
from promises_page import promise_tables
from python_reference import python_reference
from recipe_reference import recipe_reference

from llmtune.cli.app import EXIT_CODES, app
from llmtune.recipe.schema import json_schema

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("<!-- packages: made by `make docs` -->", "<!-- end of packages -->")
RANKING = ("<!-- ranking: made by `make docs` from benchmarks/ranking.json -->", "<!-- end of ranking -->")
MEMORY = ("<!-- memory: made by `make docs` from benchmarks/memory_plan.json -->", "<!-- end of memory -->")
PYTHON = ("<!-- reference: made by `make docs` from the docstrings -->", "<!-- end of reference -->")
GUARANTEES = ("<!-- guarantees: made by `make docs` from tests/impossible -->", "<!-- end of guarantees -->")
PROMISES = (
    "<!-- promises: made by `make docs` from tests marked `promise`, tests/promises.toml and proof.json -->",
    "<!-- end of promises -->",
)
CODE_HEAD = """\
# Map of the code

Made by `make docs` from the first line of each module; do not edit.
"""
HEAD = """\
# Command line reference

Made by `make docs` from the commands; do not edit.

Progress and messages go to stderr; `--json` prints one JSON document on stdout. `RECIPE` is a file or the name of a
shipped recipe, `RUN` a run folder.

| exit code | meaning |
|---|---|
"""


def main() -> int:
    """Write, or check; returns the exit code."""
    tables, faults = promise_tables()
    pages = {
        ROOT / "docs/recipe.md": recipe_reference(),
        ROOT / "docs/cli.md": command_reference(),
        ROOT / "docs/code.md": code_map(),
        ROOT / "docs/python.md": between(ROOT / "docs/python.md", PYTHON, f"\n{python_reference()}\n"),
        ROOT / "docs/guarantees.md": between(ROOT / "docs/guarantees.md", GUARANTEES, f"\n{guarantee_blocks()}"),
        ROOT / "docs/promises.md": between(ROOT / "docs/promises.md", PROMISES, f"\n{tables}"),
        ROOT / "docs/memory.md": between(ROOT / "docs/memory.md", MEMORY, f"\n{memory_table()}\n"),
        ROOT / "docs/model-evidence.md": between(ROOT / "docs/model-evidence.md", RANKING, f"\n{ranking_table()}\n"),
        ROOT / "CONTRIBUTING.md": between(ROOT / "CONTRIBUTING.md", PACKAGES, package_lines()),
        ROOT / "llmtune/recipe/peft_methods.json": peft_methods(),
        ROOT / "recipes/recipe.schema.json": json.dumps(json_schema(), indent=2) + "\n",
    }
    if "--check" not in sys.argv[1:]:
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is out of date; run: make docs", file=sys.stderr)
    for fault in faults:
        print(f"docs/promises.md: {fault}", file=sys.stderr)
    return 1 if stale or faults else 0


def between(page: Path, marks: tuple[str, str], text: str) -> str:
    """Return a page with what stands between its two marks made anew."""
    begin, end = marks
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def ranking_table() -> str:
    """Return the table of models before and after tuning, with how far each is behind the best."""
    columns = ("rows", "model", "before tuning", "behind the best", "after tuning")
    lines = [f"| {' | '.join([*columns, 'behind the best'])} |", "|---|---|---:|---:|---:|---:|"]
    for name, about in json.loads((ROOT / "benchmarks/ranking.json").read_text(encoding="utf-8")).items():
        for model, bits in sorted(about["models"].items(), key=lambda item: item[1]["tuned"]):
            behind = [
                "" if model not in values else "{:.3f} ({:.3f} to {:.3f})".format(*values[model])
                for values in (about["behind"]["base"], about["behind"]["tuned"])
            ]
            before, after = (f"{bits[when]:.3f}" for when in ("base", "tuned"))
            lines.append(f"| {' | '.join([name, model, before, behind[0], after, behind[1]])} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Return the table of planned and measured memory, and the errors below it."""
    cases = json.loads((ROOT / "benchmarks/memory_plan.json").read_text(encoding="utf-8"))
    lines = [
        "| model or recipe | method | dtype | rows x tokens | planned | measured | error |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    errors = []
    for case in cases:
        planned, measured = case["planned"], case["measured"]
        errors.append(100 * (planned / measured - 1))
        dtype = case.get("dtype", "bfloat16") + (", checkpointing" if case.get("checkpointing") else "")
        about = (
            f"`{case['recipe']}` | {case['method']} | auto | its own"
            if "recipe" in case
            else f"{case['model']} | {case['method']} | {dtype} | {case['rows']} x {case['length']}"
        )
        lines.append(f"| {about} | {planned / 1e9:.2f} GB | {measured / 1e9:.2f} GB | {errors[-1]:+.0f} % |")
    sizes = sorted(map(abs, errors))
    middle, worst = sizes[len(sizes) // 2], sizes[-1]
    models = "smollm2 has 135 million parameters, small 50 and tiny 3."
    said = f"{len(cases)} cases: the error is {middle:.1f} % in the middle and {worst:.0f} % at worst."
    return "\n".join([*lines, "", f"{said} {models}"])


def package_lines() -> str:
    """Return a line a package, and a line a module beside the packages."""
    modules = [path for path in sorted((ROOT / "llmtune").glob("*.py")) if not path.name.startswith("__")]
    packages = sorted((ROOT / "llmtune").glob("*/__init__.py"))
    lines = [f"{path.name:<14} {role(path)}" for path in modules]
    lines += [f"{path.parent.name + '/':<14} {role(path)}" for path in packages]
    return "\n".join(["```", *lines, "```"])


def code_map() -> str:
    """Return a page with a line for every module."""
    return "\n".join([CODE_HEAD, "```", *tree(ROOT / "llmtune"), "```", ""])


def tree(package: Path, depth: int = 0) -> Iterator[str]:
    """Yield a line for a package and for each module below it: its name, and the first line of its docstring."""
    indent = "  " * depth
    yield f"{indent + package.name + '/':<28} {role(package / '__init__.py')}"
    for entry in sorted(package.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if entry.suffix == ".py" and entry.name != "__init__.py":
            yield f"{indent + '  ' + entry.name:<28} {role(entry)}"
        elif (entry / "__init__.py").exists():
            yield from tree(entry, depth + 1)


def role(module: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").removesuffix(".")


def command_reference() -> str:
    """Return the reference of all commands as Markdown."""
    codes = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join([HEAD.rstrip(), *codes, "", *describe("llmtune", typer.main.get_command(app))]).rstrip() + "\n"


def describe(name: str, command: Any) -> Iterator[str]:
    """Yield the lines of one command and those below it."""
    below = getattr(command, "commands", None)
    options = [option for option in command.params if option.name != "help" and not getattr(option, "hidden", False)]
    if not below:
        words = [name, *(option.metavar for option in options if option.param_type_name == "argument"), "[OPTIONS]"]
        yield f"## {name}\n"
        yield f"{paragraph(command.help)}\n"
        yield f"    {' '.join(words)}\n"
        yield from table(options)
        return
    if name != "llmtune":
        yield f"## {name}\n"
        yield f"{paragraph(command.help)}\n"
    yield from table(options)
    for word, child in below.items():
        if child.hidden:  # words of other tools, pointed to ours
            continue
        yield from describe(f"{name} {word}", child)


def table(options: list[Any]) -> Iterator[str]:
    """Yield a table of options and arguments."""
    if options:
        yield "| option | meaning |"
        yield "|---|---|"
        for option in options:
            yield f"| {spell(option)} | {paragraph(option.help)} |"
        yield ""


def spell(option: Any) -> str:
    """Write an option as one types it."""
    if option.param_type_name == "argument":
        return f"`{option.metavar}`"
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return ", ".join(f"`{word}{value}`" for word in option.opts)


def paragraph(text: str | None) -> str:
    """Put a help text on one line, fit for a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
