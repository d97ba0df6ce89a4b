"""Scores of the models that a tuned model is compared with to explain its gain: a control run, and a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmtune.records import Difference


@dataclass(frozen=True)
class ControlScores:
    """The control run, and the tuned model on the same test rows."""

    name: str
    """As gates name it: `sft` or `filter`."""
    claim: str
    """The statement that the verdict tests."""
    note: str
    """What was trained."""
    why_none: str = ""
    """Why there are no scores; empty if there are some."""
    scores: dict[str, float] = field(default_factory=dict)
    difference: dict[str, Difference] = field(default_factory=dict)
    """Tuned model minus control run."""
    tuned: dict[str, float] = field(default_factory=dict)
    """Scores of the tuned model on the same rows."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Metrics that could not be compared, each with the reason."""


@dataclass(frozen=True)
class ModelCosts:
    """What a model costs on the test rows."""

    parameters: int
    bytes: int
    """Size of its weights in memory."""
    rows_per_second: float


@dataclass(frozen=True)
class TeacherScores:
    """The teacher on the test rows, and how far the tuned model came from the base towards it."""

    scores: dict[str, float]
    difference: dict[str, Difference]
    """Tuned model minus teacher."""
    shares: dict[str, Difference]
    """Share of the gap from base to teacher that the tuned model closed; only where the teacher is clearly better."""
    costs: dict[str, ModelCosts] = field(default_factory=dict)
    """Of `tuned` and `teacher`."""
