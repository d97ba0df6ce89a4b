"""A report as a finished run makes it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmtune.records import Difference, Evaluation, GateResult, StepTiming
from llmtune.report.report_record import Report
from llmtune.report.verdict import verdict

EVALUATION = Evaluation(
    base={"loss": 1.48, "exact_match": 0.0, "choice_accuracy": 0.52},
    tuned={"loss": 0.44, "exact_match": 0.8, "choice_accuracy": 0.8},
    difference={
        "loss": Difference(-1.04, -1.13, -0.95, 0.001, 148),
        "exact_match": Difference(0.8, 0.72, 0.85, 0.001, 148),
        "choice_accuracy": Difference(0.28, 0.19, 0.36, 0.001, 148),
    },
    gates=(),
    samples=(
        {
            "origin": "/home/ada/data/tickets.jsonl:118",
            "prompt": "I was charged twice.",
            "reference": "billing",
            "base": "The ticket is about",
            "tuned": "billing",
            "base_choice": "delivery",
            "tuned_choice": "billing",
        },
    ),
    rows=148,
    signatures={"loss": "nats per token"},
)


def curve() -> list[dict[str, float]]:
    lines = [
        {"step": step, "loss": math.exp(-step / 30), "learning_rate": 2e-4, "grad_norm": 0.4}
        for step in range(5, 105, 5)
    ]
    lines[9]["validation_loss"], lines[19]["validation_loss"] = 0.7, 0.61
    return lines


@pytest.fixture
def evaluation() -> Evaluation:
    return EVALUATION


@pytest.fixture
def report() -> Report:
    return Report(
        llmtune="0.1.0",
        name="support-tickets",
        task="chat",
        verdict=verdict(EVALUATION),
        recipe={"name": "support-tickets", "train": {"learning_rate": 0.0002}},
        recipe_yaml="name: support-tickets  # recipe.yaml:1\n",
        fingerprint="ab" * 32,
        hardware={"processor": "x86", "cores": 2, "packages": {"torch": "2.13.0"}},
        steps=(
            StepTiming("prepare", 1.2, 400_000_000, skipped=True),
            StepTiming("train", 143.0, 1_900_000_000, skipped=False),
            StepTiming("evaluate", 71.5, 1_400_000_000, skipped=False),
        ),
        data={
            "rows_in": 1600,
            "kept": {"train": 1290, "validation": 72, "test": 148},
            "dropped": {"near duplicate": 61, "bad: no assistant turn": 2},
            "tokens": {"train": 118230, "validation": 6712, "test": 13544},
            "supervised_tokens": {"train": 4211, "validation": 233, "test": 471},
            "lengths": {"edges": [40, 60, 80, 100], "counts": [30, 400, 12]},
            "example": [("<|im_start|>user\nLate parcel<|im_end|>\n", False), ("delivery<|im_end|>", True)],
        },
        model={
            "name": "builtin:smollm2",
            "revision": None,
            "sha256": "3f" * 32,
            "ranking": None,
            "plan": {
                "parts": {"weights": 538_000_000, "adapter": 19_600_000, "activations": 710_000_000},
                "lower_bound": 617_000_000,
                "limit": 8_300_000_000,
                "device": "cpu",
            },
        },
        adapter={"method": "lora", "trainable": 4884480, "all": 139399488, "matched_modules": 210, "r": 16},
        train={
            "first_loss": 1.44,
            "train_loss": 0.362,
            "validation_loss": 0.61,
            "steps": 100,
            "tokens_per_second": 1533.0,
            "wall_seconds": 139.5,
            "stopped_early": None,
            "curve": curve(),
        },
        evaluation=EVALUATION,
        gates=(
            GateResult("choice_accuracy.low > base", "low end > 0", "0.19", passed=True),
            GateResult("exact_match >= 0.9", "exact_match >= 0.9", "0.8", passed=False),
        ),
    )


@pytest.fixture
def headed(report: Report) -> Report:
    """The report of a classifier whose base model has no trained head."""
    labels = ["billing", "delivery", "praise"]
    counts = [[40, 3, 0], [11, 30, 2], [1, 0, 13]]
    table = [
        {"label": label, "precision": 0.8, "recall": 0.9, "f1": 0.85, "support": sum(row)}
        for label, row in zip(labels, counts, strict=True)
    ]
    guess = [{**row, "f1": 0.6 if row["label"] == "billing" else 0.0} for row in table]
    evaluation = Evaluation(
        base={"accuracy": 0.43},
        tuned={"loss": 0.52, "accuracy": 0.83},
        difference={"accuracy": Difference(0.4, 0.3, 0.5, 0.001, 100)},
        gates=(),
        samples=(),
        rows=100,
        baseline="the most frequent class",
        details={
            "base": {"classes": guess},
            "tuned": {"classes": table, "confusion": {"labels": labels, "counts": counts}},
        },
    )
    classes = {
        "billing": {"train": 900, "validation": 50, "test": 43},
        "delivery": {"train": 300, "validation": 20, "test": 43},
        "praise": {"train": 0, "validation": 2, "test": 14},
    }
    data = {**report.data, "classes": classes, "supervised_share": None}
    return replace(report, task="classify", data=data, evaluation=evaluation, verdict=verdict(evaluation))
