"""A report as a finished run makes it."""

from __future__ import annotations

import math
from typing import Any

import pytest


def change(value: float, low: float, high: float, n: int = 148, p: float = 0.001) -> dict[str, Any]:
    return {"value": value, "interval": [low, high], "p": p, "n": n}


@pytest.fixture
def report() -> dict[str, Any]:
    curve: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": math.exp(-step / 30),
            "learning_rate": 2e-4,
            "grad_norm": 0.4,
            "tokens_per_second": 900.0,
        }
        for step in range(5, 105, 5)
    ]
    curve[9]["validation_loss"], curve[19]["validation_loss"] = 0.7, 0.61
    return {
        "llmtune": "0.1.0",
        "name": "support-tickets",
        "task": "chat",
        "recipe": {"name": "support-tickets", "train": {"learning_rate": 0.0002}},
        "recipe_yaml": "name: support-tickets  # recipe.yaml:1\n",
        "fingerprint": "ab" * 32,
        "hardware": {"processor": "x86", "cores": 2, "packages": {"torch": "2.13.0"}},
        "steps": [
            {"name": "prepare", "seconds": 1.2, "peak_bytes": 4e8, "skipped": True},
            {"name": "train", "seconds": 143.0, "peak_bytes": 1.9e9, "skipped": False},
            {"name": "evaluate", "seconds": 71.5, "peak_bytes": 1.4e9, "skipped": False},
        ],
        "data": {
            "rows_in": 1600,
            "kept": {"train": 1290, "validation": 72, "test": 148},
            "dropped": {"near duplicate": 61, "bad: no assistant turn": 2},
            "tokens": {"train": 118230, "validation": 6712, "test": 13544},
            "supervised": {"train": 4211, "validation": 233, "test": 471},
            "histogram": {"edges": [40, 60, 80, 100], "counts": [30, 400, 12]},
            "example": [
                ["<|im_start|>user\nLate parcel<|im_end|>\n", False],
                ["delivery<|im_end|>", True],
                ["\n", False],
            ],
        },
        "model": {
            "name": "builtin:smollm2",
            "revision": None,
            "sha256": "3f" * 32,
            "ranking": None,
            "plan": {
                "parts": {"weights": 538e6, "adapter": 19.6e6, "activations": 710e6},
                "lower_bound": 617e6,
                "limit": 8.3e9,
                "device": "cpu",
            },
        },
        "adapter": {
            "method": "lora",
            "trainable": 4884480,
            "total": 139399488,
            "matched_modules": 210,
            "targets": {"q_proj": 30},
            "adapter_bytes": 19537920,
            "r": 16,
        },
        "train": {
            "first_loss": 1.44,
            "train_loss": 0.362,
            "validation_loss": 0.61,
            "steps": 100,
            "tokens_per_second": 1533.0,
            "wall_seconds": 139.5,
            "peak_bytes": 1.93e9,
            "stopped_early": None,
            "curve": curve,
        },
        "evaluation": {
            "base": {"loss": 1.48, "exact_match": 0.0, "choice_accuracy": 0.52},
            "tuned": {"loss": 0.44, "exact_match": 0.8, "choice_accuracy": 0.8},
            "difference": {
                "loss": change(-1.04, -1.13, -0.95),
                "exact_match": change(0.8, 0.72, 0.85),
                "choice_accuracy": change(0.28, 0.19, 0.36),
            },
            "samples": [
                {
                    "origin": "/home/ada/data/tickets.jsonl:118",
                    "prompt": "I was charged twice.",
                    "reference": "billing",
                    "base": "The ticket is about",
                    "tuned": "billing",
                    "base_choice": "delivery",
                    "tuned_choice": "billing",
                }
            ],
            "signatures": {"loss": "nats a token"},
            "rows": 148,
        },
        "gates": [
            {"name": "choice_accuracy.low > base", "wanted": "low end > 0", "got": "0.19", "passed": True},
            {"name": "exact_match >= 0.9", "wanted": "exact_match >= 0.9", "got": "0.8", "passed": False},
        ],
        "deploy": None,
    }


@pytest.fixture
def headed(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a classifier whose base model has no trained head."""
    labels = ["billing", "delivery", "praise"]
    counts = [[40, 3, 0], [11, 30, 2], [1, 0, 13]]
    table = [
        {"label": label, "precision": 0.8, "recall": 0.9, "f1": 0.85, "support": sum(row)}
        for label, row in zip(labels, counts, strict=True)
    ]
    guess = [{**row, "f1": 0.6 if row["label"] == "billing" else 0.0} for row in table]
    report["task"] = "classify"
    report["data"] |= {
        "classes": {
            "billing": {"train": 900, "validation": 50, "test": 43},
            "delivery": {"train": 300, "validation": 20, "test": 43},
            "praise": {"train": 0, "validation": 2, "test": 14},
        },
        "supervised_share": None,
    }
    report["evaluation"] |= {
        "base": {"accuracy": 0.43},
        "tuned": {"loss": 0.52, "accuracy": 0.83},
        "difference": {"accuracy": change(0.4, 0.3, 0.5, n=100)},
        "baseline": "the most frequent class",
        "details": {
            "base": {"classes": guess},
            "tuned": {"classes": table, "confusion": {"labels": labels, "counts": counts}},
        },
        "samples": [
            {
                "origin": "rows.jsonl:4",
                "prompt": "Charged twice",
                "reference": "billing",
                "base": "delivery",
                "tuned": "billing",
            }
        ],
    }
    return report
