"""Write a run's report: HTML to read, Markdown for CI, JSON for programs, JUnit XML for test dashboards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmtune.recipe.secrets import redact_all
from llmtune.records import Json
from llmtune.report.junit import to_junit
from llmtune.report.render_html import render_section, to_html
from llmtune.report.render_markdown import to_markdown
from llmtune.report.report_page import explain_section, find_explanations, make_page
from llmtune.report.report_record import Report
from llmtune.store.atomic_files import plain, write_json, write_text

INSIDE = re.compile(r'<section class="card" id="inside">.*?</section>', re.DOTALL)


def write_report(report: Report, folder: Path) -> None:
    """Write report.html, report.md, report.json and junit.xml into `folder`, each in one step.

    Secrets are taken out of all of it first, and numbers that JSON cannot hold become null.
    """
    safe = redact_all(report)
    page = make_page(safe)
    write_text(folder / "report.html", to_html(page))
    write_text(folder / "report.md", to_markdown(page))
    write_json(folder / "report.json", report_json(safe))
    write_text(folder / "junit.xml", to_junit(safe))


def report_json(report: Report) -> Json:
    """Return what report.json holds: the fields of the report, the seeds among the scores."""
    values: Json = plain(report)
    seeds, verdict = values.pop("seeds"), values.pop("verdict")
    if values["evaluation"]:
        values["evaluation"]["seeds"] = seeds
    return values | {"verdict": verdict}


def link_explanations(run: Path) -> bool:
    """Link the report of a run to the pages that are there now; nothing else in it changes.

    Returns:
        False where the run has no report yet, or none that can be read: then nothing is written.
    """
    try:
        report: Any = json.loads((run / "report.json").read_text("utf-8"))
        page = (run / "report.html").read_text("utf-8")
    except (OSError, ValueError):
        return False
    if not isinstance(report, dict):
        return False
    report["explanations"] = find_explanations(run)
    section = render_section(explain_section(report["explanations"], trained=bool(report.get("train"))))
    write_text(run / "report.html", INSIDE.sub(lambda found: section, page, count=1))
    write_json(run / "report.json", report)
    return True
