"""The OpenAPI description as a page for a person: every endpoint, what it takes, what it answers; without scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; border-top: 1px solid var(--line);
padding-top: 1.2rem; } code, pre { font: .9em ui-monospace, monospace; background: var(--soft); border-radius: 4px; }
code { padding: .1em .3em; } pre { padding: .8rem; overflow-x: auto; } .way { color: #06c; font-weight: 600; }
@media (prefers-color-scheme: dark) { .way { color: #7bf; } }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .93em; }
td, th { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; }
@media (max-width: 40rem) { td { display: block; border: 0; padding: .1rem 0; } tr { display: block; padding: .5rem 0;
border-bottom: 1px solid var(--line); } }
"""


def describe_api(api: dict[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    parts = [
        f"<h1>{escape(api['info']['title'])} {escape(api['info']['version'])}</h1>",
        *(f"<p>{_marked(text)}</p>" for text in api["info"].get("description", "").split("\n\n")),
        '<p>The same for programs: <a href="/openapi.json">openapi.json</a></p>',
    ]
    for path, ways in api["paths"].items():
        for way, operation in ways.items():
            parts += _operation(path, way, operation, api)
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>llmtune: endpoints</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"


def _operation(path: str, way: str, operation: dict[str, Any], api: dict[str, Any]) -> Iterator[str]:
    yield f'<h2><span class="way">{way.upper()}</span> <code>{escape(path)}</code></h2>'
    yield f"<p>{_marked(operation.get('summary', ''))}. {_marked(operation.get('description', ''))}</p>"
    contents = operation.get("requestBody", {}).get("content", {})
    for kind, content in contents.items():
        shape = _follow(content["schema"], api)
        yield f"<p>Takes <code>{escape(kind)}</code>:</p>"
        yield _table(_rows(shape, api))
    answers = [
        (f"<code>{escape(str(code))}</code>", _marked(one.get("description", "")))
        for code, one in operation.get("responses", {}).items()
    ]
    yield _table(answers)


def _rows(shape: dict[str, Any], api: dict[str, Any]) -> list[tuple[str, ...]]:
    needed = shape.get("required", ())
    return [
        (
            f"<code>{escape(name)}</code>{' (needed)' if name in needed else ''}",
            escape(_kind(part, api)),
            _marked(part.get("description", "")),
        )
        for name, part in shape.get("properties", {}).items()
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{body}</table></div>'


def _kind(part: dict[str, Any], api: dict[str, Any]) -> str:
    """Say in short what a value may be."""
    part = _follow(part, api)
    if "anyOf" in part:
        kinds = [_kind(one, api) for one in part["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in part:
        return ", ".join(json.dumps(value) for value in part["enum"])
    if "const" in part:
        return json.dumps(part["const"])
    if part.get("type") == "array":
        return f"list of {_kind(part.get('items', {}), api)}"
    if part.get("type") == "object" and "properties" in part:
        return "{" + ", ".join(part["properties"]) + "}"
    bounds = [f"{sign} {part[key]:g}" for key, sign in _SIGNS.items() if key in part]
    return " ".join([str(part.get("type", "any")), *bounds])


_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _follow(part: dict[str, Any], api: dict[str, Any]) -> dict[str, Any]:
    """Return what a reference leads to."""
    name = part.get("$ref", "").rpartition("/")[2]
    return api["components"]["schemas"][name] if name else part


def _marked(text: str) -> str:
    """Return text as HTML, with what stands between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))
