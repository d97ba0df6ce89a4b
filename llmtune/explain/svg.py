"""SVG files that stand alone: the colours of the page go along, for light and for dark."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from llmtune.report.text_files import replace_file

FONT = 'font-family:system-ui,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif'


def write_svg(path: Path, picture: Markup, style: str, *, scale: float = 1.0) -> Path:
    """Write a picture that was drawn for a page into a file of its own, in one step; returns its path."""
    sheet = files("llmtune.report").joinpath("page.css").read_text(encoding="utf-8")
    colours = "".join(
        re.findall(r"^:root \{.*?^\}|^@media \(prefers-color-scheme: dark\) \{\n.*?^\}", sheet, re.M | re.S)
    )
    _, top, wide, tall = map(float, re.findall(r'viewBox="([^"]+)"', picture)[0].split())
    left = float(re.findall(r'viewBox="([^ ]+)', picture)[0])
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide * scale + 24:.0f}" height="{tall * scale + 24:.0f}" '
        f"style='{FONT}' "
    )
    padded = f'viewBox="{left - 12:g} {top - 12:g} {wide + 24:g} {tall + 24:g}"'
    ground = (
        f'<style>{colours}{style}</style><rect style="fill:var(--card);stroke:none" x="{left - 12:g}" y="{top - 12:g}" '
        f'width="{wide + 24:g}" height="{tall + 24:g}"/>'
    )
    text = re.sub(r'viewBox="[^"]+"', padded, str(picture), count=1).replace("<svg ", opening, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, re.sub(r">", lambda _: f">{ground}", text, count=1) + "\n")
    return path
