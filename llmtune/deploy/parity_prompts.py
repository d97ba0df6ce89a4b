"""What a product is asked: the tuned model's answers are kept, and the product is held against them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from llmtune.deploy.head_parity import Asker
from llmtune.deploy.parity import (
    Distance,
    Parity,
    measure_distance,
    measure_effect,
    measure_parity,
    render_prompts,
    serve_prompts,
    trace_answers,
)
from llmtune.model import compute_context, resolve_dtype
from llmtune.records import AdaptedModel, Row
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


class Exam(Protocol):
    """Questions, and what the tuned model said to them."""

    def compare(self, model: PreTrainedModel) -> Distance:
        """Hold the numbers that `model` gives against those of the tuned one."""

    def examine(self, model: PreTrainedModel, saved: PreTrainedTokenizerBase, folder: Path) -> Parity:
        """Hold a product against the tuned model: numbers, answers, and what `saved`, its processor, makes of rows."""


def set_exam(adapted: AdaptedModel, recipe: Recipe, task: AnyTask, rows: Sequence[Row]) -> Exam:
    """Ask the tuned model the fixed prompts and `rows`, or, where its answers are no continuation, `rows` alone."""
    if task.continues_text:
        return TextExam(adapted, recipe, task, rows)
    return OutputExam(adapted, recipe, task, rows)


class TextExam:
    """Of a model that goes on from a prompt: logits over prompts and greedy answers."""

    def __init__(self, adapted: AdaptedModel, recipe: Recipe, task: AnyTask, rows: Sequence[Row]) -> None:
        self.recipe, self.task, self.rows = recipe, task, rows
        self.processor = cast("PreTrainedTokenizerBase", adapted.selected.processor)
        tuned = cast("PreTrainedModel", adapted.model)
        self.traces = trace_answers(tuned, self.processor, render_prompts(task, self.processor, recipe, rows))
        self.effect = measure_effect(tuned, self.traces)

    def compare(self, model: PreTrainedModel) -> Distance:
        """As in `Exam`."""
        return measure_distance(self.traces, model)

    def examine(self, model: PreTrainedModel, saved: PreTrainedTokenizerBase, folder: Path) -> Parity:
        """As in `Exam`; prompts are also rendered as a server does that knows the folder alone."""
        ours = render_prompts(self.task, saved, self.recipe, self.rows)
        served = serve_prompts(self.task, folder, self.recipe, self.rows)
        return measure_parity(self.traces, model, self.processor, [ours, served], self.effect)


class OutputExam:
    """Of a model with a head, an encoder-decoder, or one that hears: outputs and predictions on rows of the run."""

    def __init__(self, adapted: AdaptedModel, recipe: Recipe, task: AnyTask, rows: Sequence[Row]) -> None:
        self.asker = Asker(task, recipe, rows)
        self.processor = cast("PreTrainedTokenizerBase", adapted.selected.processor)
        tuned = cast("PreTrainedModel", adapted.model)
        with _as_evaluated(recipe, str(tuned.device)):
            self.said = self.asker.predict(tuned, self.processor)
            self.heard = self.asker.listen(tuned, self.processor, self.said)
            self.effect = self.asker.measure_effect(self.heard, tuned)

    def compare(self, model: PreTrainedModel) -> Distance:
        """As in `Exam`."""
        return self.asker.compare(self.heard, model)

    def examine(self, model: PreTrainedModel, saved: PreTrainedTokenizerBase, folder: Path) -> Parity:
        """As in `Exam`."""
        return self.compare(model).as_parity(
            prompts=len(self.heard.said),
            answer_agreement=self.asker.same_answers(self.heard, model, saved),
            same_ids=self.asker.same_inputs(self.heard, saved, self.said),
            effect=self.effect,
        )


def _as_evaluated(recipe: Recipe, device: str) -> AbstractContextManager[object]:
    """Compute as evaluation does: a head is in float32 on top of a body in 16 bits."""
    return compute_context(resolve_dtype(recipe.model.dtype, device.split(":")[0]), device)
