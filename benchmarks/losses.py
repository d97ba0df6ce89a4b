"""Draw the loss curves of all tools in one SVG picture for light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmtune.display.charts import LEFT, TOP, WIDTH, Curve, draw_curves

COLOURS = ("#0b7285", "#c2410c", "#7c3aed", "#15803d", "#b45309", "#be185d")
STYLE = """
svg { font: 11px system-ui, sans-serif; background: #fff }
text { fill: #444 }
.grid { stroke: #ddd }
.line { fill: none; stroke-width: 1.6 }
@media (prefers-color-scheme: dark) { svg { background: #16181d } text { fill: #bbb } .grid { stroke: #333 } }
"""


def draw_losses(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw one line a tool; steps count from 1. Returns the text of an SVG file."""
    lines = [Curve(name, list(enumerate(losses, 1)), f"tool{k}") for k, (name, losses) in enumerate(curves.items())]
    drawn = str(draw_curves(lines, label="Loss of every step, a line a tool", height=300))
    chart = drawn[drawn.index("<svg ") :].strip()  # without the key, which is HTML
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(curves))]
    rules = [f".tool{k} {{ stroke: {colour} }} circle.tool{k} {{ fill: {colour} }}" for k, colour in enumerate(colours)]
    names = [
        f'<text x="{WIDTH - 24}" y="{TOP + 14 + 15 * k}" text-anchor="end" style="fill: {colour}">{tool}</text>'
        for k, (tool, colour) in enumerate(zip(curves, colours, strict=True))
    ]
    axis = f'<text x="{LEFT}" y="{TOP - 2}">loss, nats a learned token</text>'
    inside = f"<style>{STYLE}{chr(10).join(rules)}</style>"
    opened = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = opened.index(">") + 1
    return f"{opened[:start]}{inside}{opened[start:].removesuffix('</svg>')}{axis}{''.join(names)}</svg>\n"
