"""How far training has come: all that a checkpoint keeps besides weights and optimiser."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Counters and findings of a training so far; changed by the loop, saved with each checkpoint."""

    budget: int
    """Tokens in a micro-batch."""
    step: int = 0
    """Optimiser steps done."""
    closed: int = 0
    """The last step that was logged, validated and saved as the recipe wants; behind `step` after a stop in between."""
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    """Time spent in steps, without validation and saving."""
    first_loss: float | None = None
    learning_rate: float = 0.0
    """Of the last step, like the gradient's length."""
    grad_norm: float = 0.0
    log_sum: float = 0.0
    log_count: int = 0
    log_tokens: int = 0
    log_seconds: float = 0.0
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    """Validations in a row that were not better by `early_stopping_threshold`."""
    stopped_early: str | None = None
    loss_scale: float = 1.0
    """Factor of the loss in float16; 1 in every other format."""
    divergence: dict[str, Any] = field(default_factory=dict)

    def save(self) -> dict[str, Any]:
        """Return everything as JSON values; floats survive JSON to the last bit."""
        return asdict(self)
