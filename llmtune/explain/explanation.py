"""What a command of `llmtune explain` gives: values as JSON, a page for browser and terminal, and files."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from llmtune.report.blocks import Html, Page

FIGURE_STYLE = """
.figure { background: #fff; border-radius: 8px; overflow-x: auto; } .figure img { display: block; max-width: 100%; }
"""
"""CSS for figures, which have the colours of paper also in the dark."""


@dataclass(frozen=True)
class Explanation:
    """The result of a command."""

    values: dict[str, object]
    """As JSON."""
    page: Page
    """Its brief sections are what the terminal shows."""
    files: list[Path]
    """What was written."""


def asset(name: str) -> str:
    """Read a style sheet, a script or a part of a page that lies in this package."""
    return files("llmtune.explain").joinpath(name).read_text(encoding="utf-8")


def figure_block(svg: Path, description: str) -> Html:
    """Return an SVG file as a figure of a page, which holds all of it."""
    data = base64.b64encode(svg.read_bytes()).decode("ascii")
    image = Markup('<div class="figure"><img alt="{}" src="data:image/svg+xml;base64,{}"></div>')
    return Html(image.format(description, data))
