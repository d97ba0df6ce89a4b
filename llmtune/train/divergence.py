"""When training has gone wrong: a loss that is no number, or one that has left the ground it started from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from typing_extensions import TypedDict

WINDOW = 10
"""Steps whose median is looked at: one bad batch, or four, do not count."""
LEAST_RISE = 4.0
"""Nats above the best so far that a loss must stay; e^4: each token is held 50 times less likely."""
FAR = 10
"""How many times the loss of the start counts as far above it, where losses have no scale of their own."""


class LossHistory(TypedDict, total=False):
    """What a checkpoint keeps of a `Divergence`; nothing before the first step."""

    first: float | None
    best: float | None
    recent: list[float]


@dataclass
class Divergence:
    """Watches the loss of each step.

    Training on tokens (nats per supervised token) counts as diverged when the median of the last ten steps
    - is more than one nat worse than guessing every token at random, and than the first step; or
    - is above twice the best so far and at least four nats above it. The best so far is the loss of the first step,
      which the untouched model made, or the lowest median of ten steps.

    A pretrained model that goes astray ends near the loss of guessing (about 10 nats), from a start near 2; rows that
    differ in difficulty do not move a median of ten by four nats. The losses of other tasks have no such scale, a
    squared error least of all: there the median must be far above both the first step and guessing.
    """

    guessing: float
    """Loss of guessing: the logarithm of the vocabulary's size, or the variance of the numbers to predict."""
    on_tokens: bool = True
    first: float | None = None
    best: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def observe(self, loss: float) -> str | None:
        """Take in the loss of the next step; return what is wrong, or None."""
        if self.first is None or self.best is None:
            self.first = self.best = loss
        self.recent.append(loss)
        if len(self.recent) < WINDOW:
            return None
        now = median(self.recent)
        if not self.on_tokens:
            start = max(self.first, self.guessing)
            if now <= FAR * start:
                return None
            times = f"{now / start:.0f} times that of the start" if start else "after 0"
            return f"the loss diverged: its median over the last {WINDOW} steps is {now:.4g}, {times}"
        if now > max(self.guessing, self.first) + 1:
            return (
                f"the loss diverged: its median over the last {WINDOW} steps is {now:.2f}, worse than guessing every "
                f"token at random ({self.guessing:.2f})"
            )
        if now > self.best + max(LEAST_RISE, self.best):
            return f"the loss diverged: its median over the last {WINDOW} steps is {now:.2f}, after {self.best:.2f}"
        self.best = min(self.best, now)
        return None

    def save(self) -> LossHistory:
        """Return what a checkpoint must keep."""
        return {"first": self.first, "best": self.best, "recent": list(self.recent)}

    def restore(self, history: LossHistory) -> None:
        """Go on from what `save` returned."""
        self.first, self.best = history["first"], history["best"]
        self.recent = deque(history["recent"], maxlen=WINDOW)
