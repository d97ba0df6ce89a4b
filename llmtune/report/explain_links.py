"""Pages that look inside the model of a run, and the report's links to them; they come after the run, if they come."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

FOLDER = "explain"
"""In the run folder."""
MEANINGS = {
    "attention": ("Attention", "which words look at which, by layer and head"),
    "generation": ("Generation", "how an answer comes about, word by word"),
    "positions": ("Positions", "how the model knows the order of words"),
    "model": ("Architecture", "the parts of the model, their shapes and their cost"),
    "adapter": ("Adapter", "how far each layer moved: where the tuning went"),
}
"""By the first word of a page's name: its title, and what it shows."""
COMMAND = "llmtune explain generation RUN --prompt TEXT"


def find_explanations(run: Path) -> list[str]:
    """Return the names of the pages in a run folder, without `.html`, in the order of MEANINGS."""
    order = list(MEANINGS)
    names = [path.stem for path in (run / FOLDER).glob("*.html") if not path.name.startswith(".")]
    return sorted(names, key=lambda name: (order.index(kind_of(name)) if kind_of(name) in order else len(order), name))


def inside(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page shows of them: links, or where there are none the command to type; None before training."""
    names: Sequence[str] = report.get("explanations") or []
    if not names and not report.get("train"):
        return None
    return {"links": [link(name) for name in names], "command": COMMAND}


def link(name: str) -> dict[str, str]:
    """Return address, title and meaning of a page."""
    kind = kind_of(name)
    title, meaning = MEANINGS.get(kind, (name, ""))
    rest = name.removeprefix(kind).strip("-").replace("-", " ")
    return {"href": f"{FOLDER}/{quote(name)}.html", "title": f"{title}: {rest}" if rest else title, "meaning": meaning}


def kind_of(name: str) -> str:
    """Return the first word of a page's name."""
    return re.split(r"[^a-z]", name, maxsplit=1)[0]
