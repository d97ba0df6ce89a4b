"""Renders pages as self-contained HTML files that load nothing from the network, with light and dark mode."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from llmtune.display.blocks import Page, Section
from llmtune.display.number_format import score, signed
from llmtune.errors import STEERING, visible
from llmtune.store.atomic_files import plain, write_text


def write_page(path: Path, page: Page) -> Path:
    """Write a page atomically and return its path."""
    write_text(path, to_html(page))
    return path


def to_html(page: Page) -> str:
    """Render the page's template, which escapes all text; control characters become visible."""
    shown = [section for section in page.sections if section.blocks]
    data = None if page.data is None else embed_json(page.data)
    style, script = (Markup(text) for text in (page.style, page.script))  # noqa: S704 - the program's own
    template = open_templates().get_template("page.html.jinja")
    return visible(template.render(page=page, sections=shown, data=data, style=style, script=script))


def render_html_section(section: Section) -> str:
    """Render one section of a page."""
    macros = open_templates().get_template("blocks.html.jinja").make_module()
    return str(macros.card(section)).strip()  # type: ignore[attr-defined]


@cache
def open_templates() -> jinja2.Environment:
    """Return the template environment: values are escaped, and missing values are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmtune.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": prose, "score": score, "signed": signed}
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment


def prose(text: str) -> Markup:
    """Escape text; text between backticks becomes code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


def embed_json(data: object) -> Markup:
    """Return JSON that is safe in a script element: it cannot start an end tag or comment."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    safe = STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", safe)
    return Markup(safe)  # noqa: S704 - nothing in it can end the element
