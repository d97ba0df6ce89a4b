"""What a recipe makes of its task: the task's facts, narrowed by the sections that choose an objective."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.recipe.task_facts import TASK_FACTS, TaskFacts

MASKED_METRICS = ("loss", "perplexity", "accuracy")
"""Metrics of masked tokens; bits per byte are of a whole text, and nothing is generated."""
LOSS_METRICS = {
    "dpo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "ipo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "kto": ("accuracy", "margin", "kl"),
    "orpo": ("accuracy", "margin", "likelihood_accuracy", "kl"),
    "reward": ("loss", "accuracy", "margin"),
}
"""Metrics of task preference that each loss has: those of KTO and ORPO depend on the rows that stand in one step."""


@dataclass(frozen=True)
class TaskVariant:
    """One task as a recipe trains it."""

    task: str
    objective: str | None = None
    """`completion.objective`; None for another task, as below."""
    style: str | None = None
    """`qa.style`; with `auto` the model decides."""
    loss: str | None = None
    """`preference.loss`."""
    kl_hindrance: str | None = None
    """Why the adapter cannot be switched off to compare with the base; None where it can."""

    @property
    def facts(self) -> TaskFacts:
        """What holds for the task whatever the recipe."""
        return TASK_FACTS[self.task]

    @property
    def is_masked(self) -> bool:
        """Whether masked tokens are predicted."""
        return self.objective == "masked"

    @property
    def is_extractive(self) -> bool:
        """Whether answers are pointed at for certain."""
        return self.style == "extractive"

    @property
    def is_reward(self) -> bool:
        """Whether a model is trained that scores answers and writes none."""
        return self.loss == "reward"

    @property
    def generates(self) -> bool:
        """Whether answers are generated, if by `llmtune generate` alone."""
        if self.loss is not None:
            return not self.is_reward
        return self.facts.generates and not self.is_masked and not self.is_extractive

    @property
    def on_overlong(self) -> tuple[str, ...]:
        """What may become of a row that is too long."""
        return ("error", "drop") if self.is_extractive else self.facts.overlong

    @property
    def unmeasured(self) -> dict[str, str]:
        """The metrics of task preference that its loss or its adapter does not have, each with the reason."""
        if self.loss is None:
            return {}
        known = LOSS_METRICS[self.loss]
        reason = f"preference.loss: {self.loss} has no such thing"
        missing = {name: reason for name in self.facts.metrics if name not in known}
        if self.kl_hindrance:
            missing.setdefault("kl", self.kl_hindrance)
        return missing

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's metrics that can be measured."""
        if self.is_masked:
            return MASKED_METRICS
        return tuple(name for name in self.facts.metrics if name not in self.unmeasured)

    @property
    def eval_metrics(self) -> tuple[str, ...]:
        """Those that a model has by itself, without its base: what is measured while training, beside the loss."""
        of_two = {"accuracy", "margin"} if self.loss in ("dpo", "ipo", "kto") else set[str]()
        return tuple(name for name in self.metrics if name not in {"loss", *of_two})

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """The task's own choice of metrics, as far as they can be measured."""
        return tuple(name for name in self.facts.default_metrics if name in self.metrics)

    @property
    def without_decoder(self) -> tuple[str, str] | None:
        """Why no model of this recipe goes on with a text, and by which key; None where one may, or does."""
        if not self.facts.decodes:
            return f"models of task: {self.task} give text none", "task"
        if self.is_masked:
            return "with completion.objective: masked a model only fills in words", "completion.objective"
        if self.is_extractive:
            return "with qa.style: extractive a model only points at answers", "qa.style"
        if self.is_reward:
            return "with preference.loss: reward a model only gives scores", "preference.loss"
        return None
