"""What is known of runs side by side: what each cost and scored, each pair, and what differs between their recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtune import __version__
from llmtune.compare.run_pairs import Pair, compare_pairs, differing
from llmtune.compare.run_scores import OpenedRun
from llmtune.records import Difference, GateResult
from llmtune.report.report_record import Verdict
from llmtune.report.verdict import verdict


@dataclass(frozen=True)
class RunSummary:
    """What one run cost and what it scored, against its own base; None where that is not known."""

    name: str
    folder: str
    method: str
    model: str | None
    seed: int
    learning_rate: float
    batch: int | None
    steps: int | None
    tokens: int | None
    train_seconds: float | None
    run_seconds: float | None
    peak_bytes: int | None
    trainable: int | None
    parameters: int | None
    share: float | None
    disk_bytes: int | None
    baseline: str | None
    base: Mapping[str, float]
    tuned: Mapping[str, float]
    difference: Mapping[str, Difference]
    verdict: Verdict
    rate: str | None = None
    """Where its learning rate comes from, if methods are compared."""
    gates: Sequence[GateResult] | None = None


@dataclass(frozen=True)
class Setting:
    """A key whose value differs, and its value in each run."""

    key: str
    values: Sequence[object]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    llmtune: str
    task: str
    rows: int
    """Test rows."""
    runs: Sequence[RunSummary]
    pairs: Sequence[Pair]
    settings: Sequence[Setting]
    notes: Sequence[str]
    kind: str
    """runs, or methods of one recipe."""
    name: str
    folder: str = ""


def describe(runs: Sequence[OpenedRun], kind: str, name: str) -> Comparison:
    """Return what is known of each run, of each pair, and of what differs between the recipes."""
    first, *others = runs
    keys = dict.fromkeys(key for one in others for key in differing(first, one))
    return Comparison(
        llmtune=__version__,
        task=first.recipe.task,
        rows=len(first.measures.rows),
        runs=[describe_run(run) for run in runs],
        pairs=compare_pairs(runs),
        settings=[Setting(key, [run.settings.get(key) for run in runs]) for key in keys],
        notes=notes(runs),
        kind=kind,
        name=name,
    )


def describe_run(run: OpenedRun) -> RunSummary:
    """Return what one run cost and what it scored."""
    train, adapt, evaluation = run.facts("train"), run.facts("adapt"), run.evaluation
    steps = run.folder.manifest["steps"]
    return RunSummary(
        name=run.name,
        folder=str(run.path),
        method=run.recipe.adapter.method,
        model=run.facts("select").get("name"),
        seed=run.recipe.seed,
        learning_rate=run.recipe.train.learning_rate,
        batch=run.recipe.train.batch_tokens or run.recipe.train.batch_size,
        steps=train.get("steps"),
        tokens=train.get("tokens"),
        train_seconds=train.get("wall_seconds"),
        run_seconds=sum(step.get("seconds") or 0 for step in steps.values()),
        peak_bytes=steps["train"].get("peak_bytes"),
        trainable=adapt.get("trainable"),
        parameters=adapt.get("total"),
        share=adapt["trainable"] / adapt["total"] if adapt.get("total") else None,
        disk_bytes=run.disk_bytes,
        baseline=evaluation.baseline,
        base=evaluation.base,
        tuned=evaluation.tuned,
        difference=evaluation.difference,
        verdict=verdict(evaluation),
    )


def notes(runs: Sequence[OpenedRun]) -> list[str]:
    """Return what a reader has to know to read the numbers rightly."""
    lines = []
    for run in runs:
        train = run.facts("train")
        if train.get("resumed_from"):
            lines.append(f"{run.name} was resumed at step {train['resumed_from']}: its seconds are those since then.")
        if train.get("stopped_early"):
            lines.append(f"{run.name} stopped early: {train['stopped_early']}.")
    if len({run.facts("train").get("steps") for run in runs}) > 1:
        lines.append("The runs were not trained for the same number of steps.")
    if len({str(sorted(run.evaluation.base.items())) for run in runs}) > 1:
        lines.append(
            "The base scores differ: each run is held against the base that it was trained on, with qlora that is the "
            "model in 4 bits. The pairs compare the tuned models themselves."
        )
    return lines
