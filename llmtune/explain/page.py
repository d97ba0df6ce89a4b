"""The page that pictures stand on: one HTML file that asks nothing of the network, in light and in dark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llmtune.report.writing import finite, replace_file

DATA = "data"
"""Id of the element that holds the page's numbers: `JSON.parse(document.getElementById("data").textContent)`."""


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
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("llmtune.explain", ""), jinja2.PackageLoader("llmtune.report", "")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {
        "title": title,
        "lead": lead,
        "body": body,
        "data": None if data is None else embedded(data),
        "script": Markup(script),  # noqa: S704 - ours
        "style": Markup(style),  # noqa: S704 - ours
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, environment.get_template("page.html.jinja").render(shown))
    return path


def embedded(data: Any) -> Markup:
    """Return JSON that can stand inside a script element: no end tag or comment can begin in it."""
    text = json.dumps(finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup(safe)  # noqa: S704 - nothing in it can end the element
