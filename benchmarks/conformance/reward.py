"""The reward of the cases about reinforcement: read by the adapters and by the reference. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score(row: Mapping[str, Any], answer: str) -> float:
    """Return the row's constant plus its price of a letter times the length of the answer."""
    return float(row["constant"] + row["per_letter"] * len(answer.strip()))
