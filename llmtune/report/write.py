"""The report's four files: HTML to read, Markdown for CI, JSON for programs, JUnit XML for test dashboards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from llmtune.report.explain_links import find_explanations
from llmtune.report.junit import to_junit
from llmtune.report.redaction import redact_all
from llmtune.report.report_markdown import to_markdown
from llmtune.report.report_view import make_view
from llmtune.report.verdict import verdict

FILES = ("report.html", "report.md", "report.json", "junit.xml")


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.html, report.md, report.json and junit.xml into `folder`, each in one step.

    `report` has the shape of `llmtune.report.assembly`; parts may be None. Secrets are taken out of all of it first,
    numbers that JSON cannot hold become null, and a verdict is added if there is none.
    """
    safe = redact_all(finite(report))
    safe["verdict"] = safe.get("verdict") or verdict(safe)
    texts = (to_html(safe), to_markdown(safe), to_json(safe), to_junit(safe))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, texts, strict=True):
        replace_file(folder / name, text)


def link_explanations(run: Path) -> bool:
    """Write the report of a run anew with links to the pages that are there now; nothing else in it changes.

    Returns:
        False where the run has no report yet, or none that can be read: then nothing is written.
    """
    try:
        report = json.loads((run / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(report, dict):
        return False
    write_report({**report, "explanations": find_explanations(run)}, run)
    return True


def to_html(report: Mapping[str, Any]) -> str:
    """Fill the page: one file that asks nothing of the network."""
    return open_templates("llmtune.report").get_template("report.html.jinja").render(make_view(report))


def open_templates(*packages: str) -> jinja2.Environment:
    """Return the templates that lie in `packages`: what they are given is escaped, and what they lack is an error."""
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, "") for package in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def to_json(report: Mapping[str, Any]) -> str:
    """Write JSON that any parser takes."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Turn NaN and infinities into None and paths into text, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def replace_file(path: Path, text: str) -> None:
    """Put `text` in the place of `path` in one step; text that UTF-8 cannot hold is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
