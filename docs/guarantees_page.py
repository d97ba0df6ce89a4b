"""The page of guarantees, out of the tests that provoke each failure: `tests/impossible`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
GROUPS = {0: "Data", 10: "Recipe", 13: "Training", 19: "Deployment", 21: "Everywhere", 24: "Pictures"}
"""The first number of each group -> its heading."""


@dataclass(frozen=True)
class Guarantee:
    """One failure that cannot happen, by the mark of the test that provokes it."""

    number: int
    cannot: str
    kept: str
    shows: str
    """What a user reads; `...` stands for what differs from case to case."""
    test: str
    """`file::name`, below tests/."""
    also: tuple[str, ...]
    """Further tests that hold it: files, or `file::name`."""
    cases: tuple[str, ...]
    """Cases of the conformance suite that run this failure through other tools."""
    provokes: bool
    """Whether the test holds the message of the page against what it has seen."""


def list_guarantees() -> list[Guarantee]:
    """Return all guarantees by number, from the marks of tests; nothing is imported."""
    files = sorted((TESTS / "impossible").glob("test_*.py"))
    return sorted((found for file in files for found in _read_marks(file)), key=lambda found: found.number)


def guarantee_blocks() -> str:
    """Return the generated part of the page, in Markdown."""
    return "\n".join(line for guarantee in list_guarantees() for line in _block(guarantee))


def _read_marks(file: Path) -> Iterator[Guarantee]:
    name = file.relative_to(TESTS).as_posix()
    for function in ast.parse(file.read_text(encoding="utf-8")).body:
        for mark in function.decorator_list if isinstance(function, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.guarantee":
                number, words = (
                    ast.literal_eval(mark.args[0]),
                    {k.arg: ast.literal_eval(k.value) for k in mark.keywords},
                )
                also = tuple(test if ".py" in test else f"{name}::{test}" for test in words.pop("also", ()))
                cases = tuple(words.pop("cases", ()))
                provokes = "shows" in [argument.arg for argument in function.args.args]
                yield Guarantee(
                    number, **words, test=f"{name}::{function.name}", also=also, cases=cases, provokes=provokes
                )


def _block(guarantee: Guarantee) -> Iterator[str]:
    if guarantee.number in GROUPS:
        yield f"## {GROUPS[guarantee.number]}\n"
    yield f"### {guarantee.number}. {guarantee.cannot[0].upper()}{guarantee.cannot[1:]}\n"
    yield f"{guarantee.kept} You see:\n"
    yield f"    {guarantee.shows}\n"
    also = f"; further: {', '.join(f'`{test}`' for test in guarantee.also)}" if guarantee.also else ""
    yield f"Held by `{guarantee.test}`{also}.\n"
    if guarantee.cases:
        names = ", ".join(f"`{case}`" for case in guarantee.cases)
        yield f"[Other tools](../benchmarks/CONFORMANCE.md): {names}.\n"
