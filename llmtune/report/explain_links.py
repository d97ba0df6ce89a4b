"""Pages that look inside the model of a run, and the report's links to them; they come after the run, if they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from llmtune.report.blocks import Links, Section, Text

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


def find_explanations(run: Path) -> list[str]:
    """Return the names of the pages in a run folder, without `.html`, in the order of MEANINGS."""
    order = list(MEANINGS)
    names = [path.stem for path in (run / FOLDER).glob("*.html") if not path.name.startswith(".")]
    return sorted(names, key=lambda name: (order.index(kind_of(name)) if kind_of(name) in order else len(order), name))


def explain_section(names: Sequence[str], *, trained: bool) -> Section:
    """Links to the pages, or where there are none the command to type; nothing before training."""
    text = "Where do base and tuned model part, and what changed inside? `llmtune explain generation RUN --prompt "
    text += "TEXT` makes a page of it, with RUN this folder; `llmtune explain --help` lists what else there is to see."
    shown = [Links([link(name) for name in names])] if names else [Text(text)] if trained else []
    return Section("Look inside", shown, anchor="inside", brief=False)


def link(name: str) -> tuple[str, str, str]:
    """Return address, title and meaning of a page."""
    kind = kind_of(name)
    title, meaning = MEANINGS.get(kind, (name, ""))
    rest = name.removeprefix(kind).strip("-").replace("-", " ")
    return f"{FOLDER}/{quote(name)}.html", f"{title}: {rest}" if rest else title, meaning


def kind_of(name: str) -> str:
    """Return the first word of a page's name."""
    return re.split(r"[^a-z]", name, maxsplit=1)[0]
