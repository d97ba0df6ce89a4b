"""How a recipe is run, as opposed to what it says: the options of `llmtune run` and `llmtune.run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.records import Layout

if TYPE_CHECKING:
    from llmtune.store.run_lock import Pins


@dataclass(frozen=True)
class RunRequest:
    """The options of one run; never part of a recipe."""

    out: Path | None = None
    until: str = "run"
    """The last step to run: prepare, select, adapt, train, evaluate, or run for all and deploy."""
    resume: bool = False
    fresh: bool = False
    lock: Path | None = None
    threads: int | None = None
    offline: bool = False
    dry_run: bool = False
    device: str | None = None
    """What a dry run plans for: a known card, or cpu. Default: what computes here."""
    layout: Layout | None = None
    """The processes that a dry run plans for. Default: those that are here."""
    pins: Pins | None = None
    """What must be as in another run, in place of `lock`."""
    findings: Mapping[str, object] = field(default_factory=dict)
    """Findings of another run of the same recipe that this one reuses, such as its micro-batch budget."""
    base: Path | None = None
    """The evaluation of another run: its base answers are reused where the questions are the same."""

    def words(self) -> list[str]:
        """Return the options as words of `llmtune run`."""
        named = {"--out": self.out, "--lock": self.lock, "--threads": self.threads}
        flags = {"--resume": self.resume, "--fresh": self.fresh, "--offline": self.offline}
        words = [word for name, value in named.items() if value is not None for word in (name, str(value))]
        return [*words, *(name for name, given in flags.items() if given)]
