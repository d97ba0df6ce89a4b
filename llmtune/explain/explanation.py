"""What a command of `llmtune explain` gives: values as JSON, a page for browser and terminal, and files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from llmtune.report.blocks import Html, Page
from llmtune.report.render_html import write_page
from llmtune.store.run_folder import MANIFEST

PAGE_STYLE = """
p { overflow-wrap: anywhere; } th.number { white-space: normal; }
.heatmap td, .heatmap th { white-space: nowrap; overflow-wrap: normal; vertical-align: middle; }
.figure { background: #fff; border-radius: 8px; overflow-x: auto; }
.figure img { display: block; max-width: max(100%, 620px); }
.many table:not(.stacked) { min-width: 620px; }
"""
"""CSS for pages: figures have the colours of paper also in the dark; on a phone they and wide tables scroll."""


@dataclass(frozen=True)
class Explanation:
    """The result of a command."""

    values: dict[str, object]
    """What `--json` prints."""
    page: Page
    """Its brief sections are what the terminal shows."""
    files: list[Path]
    """What was written."""


def asset(name: str) -> str:
    """Read a style sheet, a script or a part of a page that lies in this package."""
    return files("llmtune.explain").joinpath(name).read_text(encoding="utf-8")


def write_explanation(stem: Path, values: dict[str, object], page: Page, figures: Sequence[Path] = ()) -> Explanation:
    """Write the page into `stem` with .html; the figures are there already."""
    path = stem.with_name(f"{stem.name}.html")
    if (stem.parent.parent / MANIFEST).is_file():  # the folder is `explain` of a run
        back = Html(Markup('<p><a href="../report.html">Report of the run</a></p>'))
        first = replace(page.sections[0], blocks=[back, *page.sections[0].blocks])
        page = replace(page, sections=[first, *page.sections[1:]])
    write_page(path, page)
    return Explanation(values, page, [path, *figures])


def figure_block(svg: Path, description: str) -> Html:
    """Return an SVG file as a figure of a page, which holds all of it."""
    data = base64.b64encode(svg.read_bytes()).decode("ascii")
    image = Markup('<div class="figure"><img alt="{}" src="data:image/svg+xml;base64,{}"></div>')
    return Html(image.format(description, data))


def briefly(number: float) -> str:
    """Write a number in three digits: 134,515,008 is 135 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number:g}"


def operations(number: float) -> str:
    """Write a number of floating-point operations."""
    text = briefly(number)
    return f"{text}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"


def brief_size(number: float) -> str:
    """Write a number of parameters in three digits, none as nothing; a thousand million is B, as usual for models."""
    return briefly(number).replace("G", "B") if number else ""


def in_percent(value: float | None) -> str:
    """Write a share in percent, in three digits."""
    return "–" if value is None else f"{100 * value:.3g} %"


def probability(value: float, *, exact: bool = False) -> str:
    """Write a probability in five letters; a small one as such, or with its power of ten."""
    if value >= 0.995:
        return "1.00" if value >= 0.9995 else f"{value:.3f}"
    if value >= 0.005:
        return f"{value:.2f}"
    if exact:
        return f"{value:.0e}" if value else "0"
    return f"{value:.3f}" if value >= 0.0005 else "<.001"


def times(base: float, tuned: float) -> str:
    """Write by which factor a probability grew or shrank."""
    if not base:
        return "∞" if tuned else "1"
    factor = tuned / base
    return f"× {factor:,.0f}" if factor >= 9.5 else f"× {factor:.1f}" if factor >= 0.1 else f"× {factor:.0e}"
