"""What a case is: rows, jobs for a tool, and how to judge their results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from conformance.reference import TOLERANCE, Gradient, Reference, distance

Group = Literal["what is learned", "what is computed", "what is measured", "what ships"]
Verdict = Literal[
    "right",
    "refused",
    "wrong, with a warning",
    "silently wrong",
    "unexplained",
    "documented otherwise",
    "stopped",
    "not offered",
    "not run",
]
Row = Mapping[str, Any]
Job = dict[str, Any]
"""What an adapter reads; README.md lists the keys."""
DEFAULTS: Job = {
    "model": "qwen2.5",
    "rows": [],
    "test_rows": [],
    "file": "jsonl",
    "kind": "messages",
    "method": "full",
    "learning_rate": 1.0,
    "schedule": "constant",
    "optim": "sgd",
    "steps": 1,
    "batch_size": 1,
    "micro_batch_size": None,
    "max_length": 512,
    "packing": False,
    "train_on": "assistant",
    "seed": 7,
    "processes": 1,
    "resume_from": None,
    "save_steps": None,
    "ask": {},
    "extra": {},
}


@dataclass(frozen=True)
class Result:
    """What an adapter made of one job."""

    status: Literal["done", "not offered", "error"]
    message: str
    log: str
    model: Path | None
    """The folder of the trained weights."""
    configuration: Mapping[str, Any]
    documented: Mapping[str, str]
    """Names of outcomes, or their beginnings, that the tool documents as its own choice -> where it does."""
    job: Job
    found: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that the case asked for: answers, scores."""


@dataclass(frozen=True)
class Finding:
    """A verdict on one tool and one case."""

    verdict: Verdict
    learned: str
    """What the tool did, in words."""
    distance: float | None = None


@dataclass(frozen=True)
class Case:
    """One failure that users met, with the rows that show it."""

    title: str
    group: Group
    question: str
    threads: Sequence[str]
    """Addresses of issues where users met it."""
    rows: Sequence[Row] = ()
    settings: Job = field(default_factory=dict)
    jobs: Mapping[str, Job] = field(default_factory=lambda: {"run": {}})
    """Name of a job -> what differs from `settings`. Jobs run in this order; `resume_from` may name an earlier one."""
    right: Mapping[str, Gradient] = field(default_factory=dict)
    """What may be learned -> its gradient."""
    wrong: Mapping[str, Gradient] = field(default_factory=dict)
    """What is learned by mistake -> its gradient."""
    reason: str = r"(?!)"
    """Regular expression that finds the reason in an error or a warning."""
    judge: Callable[[Case, Reference, Mapping[str, Result]], Finding] | None = None
    """Replaces the comparison of gradients, if the case is about something else."""

    def make_jobs(self) -> dict[str, Job]:
        """Return the complete jobs, without the folders that the runner adds."""
        jobs = {name: {**DEFAULTS, "rows": list(self.rows), **self.settings, **job} for name, job in self.jobs.items()}
        unknown = {key for job in jobs.values() for key in job} - DEFAULTS.keys()
        assert not unknown, f"unknown keys: {sorted(unknown)}"
        return json.loads(json.dumps(jobs))

    def decide(self, reference: Reference, results: Mapping[str, Result]) -> Finding:
        """Judge the results of all jobs of this case by one tool."""
        for result in results.values():
            if result.status == "not offered":
                return Finding("not offered", result.message)
            if result.status == "error":
                named = re.search(self.reason, f"{result.message}\n{result.log}", re.IGNORECASE)
                return Finding("refused" if named else "stopped", result.message)
        finding = (self.judge or compare_gradients)(self, reference, results)
        if finding.verdict != "silently wrong":
            return finding
        [*logs] = (result.log for result in results.values())
        documented = next(iter(results.values())).documented
        link = next((link for name, link in documented.items() if finding.learned.startswith(name)), None)
        if link:
            return Finding("documented otherwise", f"{finding.learned} ({link})", finding.distance)
        if warning := re.search(f".*(?:{self.reason}).*", "\n".join(logs), re.IGNORECASE):
            return Finding("wrong, with a warning", f"{finding.learned}; {warning[0].strip()}", finding.distance)
        return finding


def compare_gradients(case: Case, reference: Reference, results: Mapping[str, Result]) -> Finding:
    """Compare the step that each job took with the gradients that are right, and name the nearest that is wrong."""
    worst = Finding("right", "", 0.0)
    for name, result in results.items():
        with reference.allowing(result.found):
            finding = compare_gradient(case, reference, result)
        if finding.verdict != "right":
            return replace(finding, learned=f"{name}: {finding.learned}") if len(results) > 1 else finding
        if (finding.distance or 0.0) >= (worst.distance or 0.0):
            worst = finding
    return worst


def compare_gradient(case: Case, reference: Reference, result: Result) -> Finding:
    assert result.model is not None, "a job that is done has a model"
    step, project = reference.step_taken(result.model, result.job["learning_rate"])
    step = {name: change for name, change in step.items() if not name.startswith(reference.frozen)}
    right = {learned: distance(step, project(reference.of(gradient))) for learned, gradient in case.right.items()}
    nearest = min(right, key=right.__getitem__)
    if right[nearest] < TOLERANCE:
        return Finding("right", nearest, right[nearest])
    wrong = ((known, distance(step, project(reference.of(gradient)))) for known, gradient in case.wrong.items())
    learned = next((known for known, far in wrong if far < TOLERANCE), None)
    if learned is None:
        return Finding("unexplained", "none of the known results", right[nearest])
    return Finding("silently wrong", learned, right[nearest])
