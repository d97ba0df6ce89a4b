"""One evaluation suite in progress: the part that forgetting, fairness and benchmarks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.metric import PairedMeasures
from llmtune.records import Study


class EvalSuite(ABC):
    """A suite in progress: it runs on one model after the other, then compares them.

    Making one reads and checks its own inputs, before a model is loaded. It does not run on the base model where that
    has no trained head and a trivial baseline stands in its place.
    """

    name: str
    """As gates and the recipe call it."""

    def __init__(self, context: EvalContext) -> None:
        self.context = context

    @abstractmethod
    def run(self, name: str, model: torch.nn.Module) -> None:
        """Run on the "base" or "tuned" model, which is loaded and on its device, and keep what comes out."""

    @abstractmethod
    def compare(self, measures: PairedMeasures) -> Study:
        """Compare both models; `measures` are those of the test rows."""
