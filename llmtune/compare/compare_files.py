"""The files of a comparison: JSON for programs, Markdown, a page, and a picture; each put in its place in one step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.compare.compare_markdown import to_markdown
from llmtune.compare.compare_plot import draw_comparison
from llmtune.compare.compare_view import make_view
from llmtune.report.redaction import redact_all
from llmtune.report.write import finite, open_templates, replace_file, to_json


def write_comparison(made: Mapping[str, Any], folder: Path) -> None:
    """Write compare.json, .md, .html, .svg and .png into `folder`; secrets are taken out of all of them."""
    safe = redact_all(finite(made))
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "compare.json", to_json(safe))
    replace_file(folder / "compare.md", to_markdown(safe))
    replace_file(folder / "compare.html", to_html(safe))
    draw_comparison(folder / "compare", safe)


def to_html(made: Mapping[str, Any]) -> str:
    """Fill the page: one file that asks nothing of the network."""
    templates = open_templates("llmtune.compare", "llmtune.report")
    return templates.get_template("compare.html.jinja").render(make_view(made))
