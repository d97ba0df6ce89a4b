"""The section `distil`: a student learns the predictions of a teacher, next to the labels."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmtune.recipe.control_run import ControlRun
from llmtune.recipe.section import NonEmpty, Positive, RecipeSection, absolute_model
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.task_variant import TaskVariant


class DistilSection(RecipeSection):
    """Learn from a teacher: a larger or better model with the same tokenizer, or with the same classes."""

    teacher: NonEmpty
    """A trained run, a model folder, a name on the hub (`owner/model`), or `builtin:NAME`. Required: the teacher
    decides what the student learns. Its predictions are stored before training, and its memory is then freed."""
    top_k: Positive = 64
    """Tokens whose probabilities are stored for each learned token; the rest share one probability. Default 64: 386
    bytes for each learned token. Classes are always stored completely."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the teacher in the loss, against 1 - weight for the labels. With 1 the labels have no effect on
    training; 0 learns only the answers of `answers: true`. Default 0.5: both count the same."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Divides the logits of teacher and student; the loss is multiplied by its square, as in Hinton et al. (2015).
    Default 1: the student learns the teacher's probabilities as they are."""

    answers: bool = False
    """Let the teacher answer the prompts of train and validation, and learn its answers in the place of those in the
    files. They are sampled, up to `generation.max_new_tokens`. Default false: the rows have answers."""
    control: bool = True
    """Also train on the same rows without the teacher's probabilities, to see whether they made the difference. Default
    true: it takes as long as the run, and without it the verdict cannot tell."""

    paths: ClassVar = {"teacher": absolute_model}

    def as_control(self) -> ControlRun:
        """Return the control run: the recipe without a teacher, or with its answers alone."""
        alone = self.model_copy(update={"weight": 0.0, "control": False}) if self.answers else None
        on = self.control and self.weight > 0
        return ControlRun("sft", "distilling beat SFT", "distil.control", {"distil": alone}, on)

    def check(self, diagnostics: Diagnostics, variant: TaskVariant, loss_type: str) -> None:
        """Report tasks and losses that have no predictions to learn; `loss_type` is `train.loss_type`."""
        if not variant.facts.distils:
            names = (name for name, facts in TASK_FACTS.items() if facts.distils)
            fix = f"Remove it; it belongs to: {', '.join(names)}."
            diagnostics.no_effect("distil", f"with task: {variant.task}", fix, "task")
        if variant.is_masked:
            what = "'distil' does not work with completion.objective: masked: each step masks other tokens"
            fix = "Remove it, or set completion.objective: causal."
            diagnostics.add("distil", what, fix, "completion.objective")
        if loss_type != "nll":
            what = f"'train.loss_type' is {loss_type}, which has no meaning for a teacher's probabilities"
            diagnostics.add("train.loss_type", what, "Remove it, or remove distil.", "distil")
        if variant.facts.answer_kind in ("labels", "tags"):
            why, fix = f"with task: {variant.task}: all classes are stored", "Remove it."
            diagnostics.no_effect("distil.top_k", why, fix, "task")
            if self.answers:
                what = f"'distil.answers' does not work with task: {variant.task}: its answers are not texts"
                fix = "Remove it, and set distil.weight: 1 if labels are to have no effect."
                diagnostics.add("distil.answers", what, fix, "task")
        if not self.weight and not self.answers:
            what = "'distil.weight' is 0, so nothing is learned from the teacher"
            diagnostics.add("distil.weight", what, "Raise it, set distil.answers: true, or remove distil.")
