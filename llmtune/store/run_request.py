"""The options of `llmtune run` and `llmtune.run`, which are not part of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.records import Layout, Until

if TYPE_CHECKING:
    from llmtune.store.run_lock import Pins


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The options of one run."""

    out: Path | None = None
    """The run folder; None for the default one."""
    until: Until = "run"
    """The last step to run: prepare, select, adapt, train, evaluate, or `run` for all steps and deployment."""
    resume: bool = False
    fresh: bool = False
    lock: Path | None = None
    threads: int | None = None
    offline: bool = False
    dry_run: bool = False
    device: str | None = None
    """Device that a dry run plans for: a known card, or cpu. Default: the current device."""
    layout: Layout | None = None
    """Processes that a dry run plans for. Default: the current processes."""
    pins: Pins | None = None
    """Pinned values of another run, instead of `lock`."""
    findings: Mapping[str, object] = field(default_factory=dict)
    """Findings to reuse from another run of the same recipe, such as its micro-batch budget."""
    reason: str = ""
    """Why the default run folder is a new one."""
    engine: str = "own"
    """What generates the answers of a finished run: own, or vllm."""
    base: Path | None = None
    """The evaluation of another run, to reuse its base answers to the same questions."""

    @property
    def folder(self) -> Path:
        """The run folder, once `locate_run` or the caller named it."""
        assert self.out is not None, "a run starts with its folder"
        return self.out

    @property
    def place(self) -> str:
        """The run folder, and why it is a new one."""
        return f"{self.folder}: {self.reason}" if self.reason else str(self.folder)

    def words(self) -> list[str]:
        """Return the options as arguments of `llmtune run`."""
        named = {"--out": self.out, "--lock": self.lock, "--threads": self.threads}
        flags = {"--resume": self.resume, "--fresh": self.fresh, "--offline": self.offline}
        words = [word for name, value in named.items() if value is not None for word in (name, str(value))]
        return [*words, *(name for name, given in flags.items() if given)]
