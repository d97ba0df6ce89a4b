"""What trains and evaluates a run: this process, or several that `llmtune.launch` starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.adapter.injection import adapter_settings
from llmtune.evaluate.cache_keys import base_inputs
from llmtune.evaluate.champion import make_challenge
from llmtune.evaluate.evaluation_file import save_evaluation
from llmtune.evaluate.evaluator import evaluate
from llmtune.evaluate.results import load_base
from llmtune.model.config import head_is_new
from llmtune.records import Examples, ModelRef, Rows
from llmtune.session import Models, RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score(
    context: RunContext,
    model_ref: ModelRef,
    processor: PreTrainedTokenizerBase,
    rows: Rows,
    examples: Examples,
    *,
    folder: Path,
    keeps: bool = True,
) -> None:
    """Evaluate both models and leave the evaluation in `folder`; of several processes one `keeps` it."""
    recipe = context.recipe
    models = Models(context, model_ref, processor)
    base = base_inputs(recipe, adapter_settings(recipe), model_ref, rows, examples, context.device)
    evaluation = evaluate(
        {"base": models.before, "tuned": models.tuned},
        processor,
        rows,
        examples,
        context.task,
        recipe,
        context.console,
        device=context.device,
        folder=folder if keeps else None,
        headless=head_is_new(model_ref, recipe, context.task),
        packs=lambda: models.packs,
        known=load_base(context.base or folder, base),
        challenge=make_challenge(context.folder),
    )
    if keeps:
        save_evaluation(evaluation, folder)


Trainer = Callable[[RunContext, ModelRef, Examples, str, str], None]
"""Runs adapt and train and leaves both steps done in the manifest; it gets the hashes of their inputs last."""
Scorer = Callable[..., None]
"""Evaluates as `score` does, with its arguments."""


@dataclass(frozen=True)
class Executor:
    """What trains and evaluates: this process, or several."""

    train: Trainer
    score: Scorer


HERE = Executor(RunContext.train_here, score)
