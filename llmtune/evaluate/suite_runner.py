"""What else base and tuned model are asked while they are loaded: forgetting, fairness, benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmtune.evaluate.eval_inputs import Plan
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.metric import Measure
from llmtune.records import Study

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """What a study has to know before it asks."""

    recipe: Recipe
    task: EvaluatedTask
    processor: PreTrainedTokenizerBase
    plan: Plan | None
    """The test rows; None where there are none."""
    device: str
    console: Console
    folder: Path | None
    """Where a study may leave files of its own; None where nothing is kept."""


@dataclass(frozen=True)
class Scored:
    """The measures of the test rows by metric, of base and tuned model; empty where there are no test rows."""

    base: Mapping[str, Measure] = field(default_factory=dict)
    tuned: Mapping[str, Measure] = field(default_factory=dict)


@dataclass(frozen=True)
class Inquiry:
    """A study under way: asked of one model after the other, then compared."""

    name: str
    """As gates and the recipe call it."""
    ask: Callable[[str, torch.nn.Module], Any]
    """ask("base" or "tuned", model) -> answers, whatever they are; the model is loaded and on its device."""
    compare: Callable[[Any, Any, Scored], Study]
    """compare(answers of the base or None, answers of the tuned model, scores of the test rows) -> what was found. The
    base has none where it has no trained head and a trivial baseline stands in its place."""
