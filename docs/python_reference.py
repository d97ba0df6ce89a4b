"""The Python reference: Markdown made from signatures and docstrings, the same with and without the site."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from textwrap import dedent
from typing import Any

import llmtune
from llmtune.serve.finished_run import FinishedRun

ATTRIBUTES = ("scores", "gates", "evaluation", "report", "recipe", "tokenizer")
METHODS = ("generate", "model")
SECTIONS = re.compile(r"^(Args|Raises|Example):\n", re.MULTILINE)
ENTRIES = re.compile(r"^(\w+): (.*(?:\n +.*)*)", re.MULTILINE)
WIDTH = 100
"""Columns of a signature on one line; a longer one gets a line per parameter."""


def python_reference() -> str:
    """Return the reference of `llmtune.run`, `llmtune.load_run` and `FinishedRun` as Markdown."""
    lines = [*function_lines("##", "llmtune.run", llmtune.run)]
    lines += function_lines("##", "llmtune.load_run", llmtune.load_run)
    lines += ["## FinishedRun", "", *docstring_lines(FinishedRun.__doc__)]
    lines += ["| attribute | type | meaning |", "|---|---|---|", *map(attribute_line, ATTRIBUTES), ""]
    for method in METHODS:
        lines += function_lines("###", f"run.{method}", getattr(FinishedRun, method))
    return "\n".join(lines).rstrip()


def attribute_line(name: str) -> str:
    """Return the line of an attribute in a table: name, type, meaning."""
    member = inspect.getattr_static(FinishedRun, name)
    get = member.func if isinstance(member, cached_property) else member.fget
    return f"| `{name}` | `{cell(get.__annotations__['return'])}` | {cell(get.__doc__)} |"


def function_lines(level: str, name: str, function: Callable[..., Any]) -> Iterator[str]:
    """Yield a heading, the signature and the docstring of a function."""
    yield f"{level} {name}\n"
    yield f"```python\n{signature(name, function)}\n```\n"
    yield from docstring_lines(function.__doc__)


def signature(name: str, function: Callable[..., Any]) -> str:
    """Write a signature as in the code."""
    words: list[str] = []
    about = inspect.signature(function)
    for parameter in about.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}".replace("'", '"')
        words.append(f"{parameter.name}: {parameter.annotation}{default}")
    line = f"{name}({', '.join(words)}) -> {about.return_annotation}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f") -> {about.return_annotation}"])


def docstring_lines(docstring: str | None) -> Iterator[str]:
    """Yield a Google-style docstring as Markdown: text, a table of parameters, the errors, an example."""
    text, *sections = SECTIONS.split(inspect.cleandoc(docstring or ""))
    yield text.strip()
    yield ""
    for title, indented in zip(sections[::2], sections[1::2], strict=True):
        body = dedent(indented).strip()
        if title == "Args":
            yield "| parameter | meaning |"
            yield "|---|---|"
            yield from (f"| `{name}` | {cell(meaning)} |" for name, meaning in ENTRIES.findall(body))
        elif title == "Raises":
            yield "\n\n".join(f"Raises `{name}`: {cell(meaning)}" for name, meaning in ENTRIES.findall(body))
        else:
            yield f"```python\n{body}\n```"
        yield ""


def cell(text: str | None) -> str:
    """Put a text on one line, fit for a table."""
    return " ".join((text or "").split()).replace("|", "\\|")
