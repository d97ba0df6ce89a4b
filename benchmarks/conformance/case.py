"""What a case is: rows, jobs for a tool, and how to judge their results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from conformance.reference import TOLERANCE, Gradient, Reference, distance
from conformance.statements import Statements

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
    "epochs": None,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "warmup_steps": 0,
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

    status: Literal["done", "not offered", "not run", "error"]
    message: str
    log: str
    model: Path | None
    """The folder of the trained weights."""
    configuration: Mapping[str, Any]
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
    searched: str = ""
    """Where and when the documentation was searched for it in vain."""


@dataclass(frozen=True)
class Case:
    """One failure that users met, with the rows that show it."""

    title: str
    group: Group
    question: str
    threads: Sequence[str]
    """Addresses of issues where users met it."""
    added: str = ""
    """The day on which a case was added that llmtune failed at that time."""
    failed: str = ""
    """What llmtune did on that day."""
    passed: str = ""
    """The day and the commit since which llmtune passes it."""
    rows: Sequence[Row] = ()
    settings: Job = field(default_factory=dict)
    jobs: Mapping[str, Job] = field(default_factory=lambda: {"run": {}})
    """Name of a job -> what differs from `settings`. Jobs run in this order; `resume_from` may name an earlier one."""
    right: Mapping[str, Gradient] = field(default_factory=dict)
    """What may be learned -> its gradient."""
    wrong: Mapping[str, Gradient] = field(default_factory=dict)
    """What is learned by mistake -> its gradient."""
    left_out: Mapping[str, Gradient] = field(default_factory=dict)
    """What is learned if a row is left out -> its gradient. It counts as refused if the output names the reason."""
    reason: str = r"(?!)"
    """Regular expression that finds the reason in an error or a line of the output."""
    judge: Callable[[Case, Reference, Mapping[str, Result]], Finding] | None = None
    """Replaces the comparison of gradients, if the case is about something else."""

    def make_jobs(self) -> dict[str, Job]:
        """Return the complete jobs, without the folders that the runner adds."""
        jobs = {name: {**DEFAULTS, "rows": list(self.rows), **self.settings, **job} for name, job in self.jobs.items()}
        unknown = {key for job in jobs.values() for key in job} - DEFAULTS.keys()
        assert not unknown, f"unknown keys: {sorted(unknown)}"
        return json.loads(json.dumps(jobs))

    def hash_jobs(self) -> str:
        """Return a hash of the jobs. It stays the same if a key is added that this case leaves at its default."""
        jobs = {
            name: {key: value for key, value in job.items() if value != DEFAULTS[key]}
            for name, job in self.make_jobs().items()
        }
        return hashlib.sha256(json.dumps(jobs, sort_keys=True).encode()).hexdigest()[:12]

    def decide(self, reference: Reference, results: Mapping[str, Result], statements: Statements) -> Finding:
        """Judge the results of all jobs of this case by one tool, with the statements on this case."""
        reason = self.find_reason("\n".join(f"{result.message}\n{result.log}" for result in results.values()))
        for result in results.values():
            if result.status in ("not offered", "not run"):
                return Finding(result.status, result.message)
            if result.status == "error":
                named = reason and not self.find_reason(result.message)
                return Finding("refused" if reason else "stopped", result.message + f"; {reason}" * bool(named))
        finding = (self.judge or compare_gradients)(self, reference, results)
        if finding.verdict != "silently wrong":
            return finding
        learned, result = finding.learned, next(iter(results.values()))
        if reason and learned in self.left_out:
            return replace(finding, verdict="refused", learned=f"{learned}; {reason}")
        if address := statements.find_choice(learned, result.job["column"], result.configuration):
            return replace(finding, verdict="documented otherwise", learned=f"{learned} ({address})")
        if reason:
            return replace(finding, verdict="wrong, with a warning", learned=f"{learned}; {reason}")
        if where := statements.find_search(learned):
            return replace(finding, searched=where)
        return replace(finding, verdict="unexplained", learned=f"{learned}; the documentation was not searched")

    def find_reason(self, output: str) -> str:
        """Return the words around the first mention of the reason in an output, or nothing."""
        for line in read_sentences(output):
            if named := re.search(self.reason, line, re.IGNORECASE):
                return line[max(0, named.start() - 80) : named.end() + 120].strip()
        return ""


def read_sentences(output: str) -> list[str]:
    """Return the lines of an output without frames of tracebacks and progress bars, which name no reason."""
    lines, in_traceback = [], False
    for raw in re.split(r"[\r\n]+", output):
        line = re.sub(r"^\[rank\d+\]: ?", "", raw)
        starts = "Traceback (most recent call last)" in line
        in_traceback = starts or (in_traceback and line.startswith((" ", "\t")))
        if line.strip() and not in_traceback and not re.search(r"\d%\||^[│╭╰]", line):
            lines.append(line.strip())
    return lines


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
    far = {
        name: distance(step, project(reference.of(gradient)))
        for outcomes in (case.right, case.left_out, case.wrong)
        for name, gradient in outcomes.items()
    }
    nearest = min((far[name] for name in case.right), default=None)
    learned = next((name for name, apart in far.items() if apart < TOLERANCE), None)
    if learned is None:
        return Finding("unexplained", "none of the known results", nearest)
    return Finding("right" if learned in case.right else "silently wrong", learned, nearest)
