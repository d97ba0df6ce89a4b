"""How to run a recipe, as opposed to what: never a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.records import Layout
from llmtune.store.run_lock import Pins


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: never part of a recipe."""

    out: Path | None = None
    resume: bool = False
    fresh: bool = False
    lock: Path | None = None
    offline: bool = False
    dry_run: bool = False
    device: str | None = None
    """What a dry run plans for, in place of what computes here: a card that is known, or cpu."""
    until: str = "run"
    """The last step to run: prepare, select, adapt, train, evaluate, or run for all and deploy."""
    pins: Pins | None = None
    """What to hold still instead of what `lock` says."""
    findings: Mapping[str, object] = field(default_factory=dict)
    """What another run of the same recipe found out and this one is to keep, such as its micro-batch budget."""
    base: Path | None = None
    """The evaluation of another run: what the base model said there counts here where it was asked the same."""
    layout: Layout | None = None
    """The processes that a dry run plans for, in place of those that are here."""
