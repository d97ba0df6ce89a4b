"""The page that pictures stand on: one HTML file that asks nothing of the network, in light and in dark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmtune.report.render_html import open_templates
from llmtune.report.text_files import as_json, replace_file


def write_page(
    path: Path, *, title: str, lead: str, body: Markup, data: Any = None, script: str = "", style: str = ""
) -> Path:
    """Write a page in one step and return its path.

    Args:
        path: the file.
        title: what it shows, as a heading.
        lead: a sentence or two for who has not seen one before.
        body: the content, escaped already; sections of class `card` as on the report.
        data: JSON values for `script`, which finds them under the id `data`.
        script: JavaScript that runs when the page is there; it may not ask for anything: the page forbids it.
        style: CSS beside the report's, whose variables (`--ink`, `--page`, `--tuned`...) change with light and dark.
    """
    shown = {
        "title": title,
        "lead": lead,
        "body": body,
        "data": None if data is None else embedded(data),
        "script": Markup(script),  # noqa: S704 - ours
        "style": Markup(style),  # noqa: S704 - ours
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, fill("page.html.jinja", shown))
    return path


def fill(template: str, shown: Mapping[str, Any]) -> Markup:
    """Fill a template of this package; all that stands in it is escaped."""
    text = open_templates("llmtune.explain", "llmtune.report").get_template(template).render(shown)
    return Markup(text)  # noqa: S704 - the templates escape


def asset(name: str) -> str:
    """Read a style sheet or script of this package."""
    return files("llmtune.explain").joinpath(name).read_text(encoding="utf-8")


def embedded(data: Any) -> Markup:
    """Return JSON that can stand inside a script element: no end tag or comment can begin in it."""
    text = json.dumps(as_json(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(safe)  # noqa: S704 - nothing in it can end the element
