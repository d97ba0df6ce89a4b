"""A task with the settings of its section: its metrics and abilities, such as generating answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmtune.recipe.task_facts import TASK_FACTS, TaskFacts

MASKED_METRICS = ("loss", "perplexity", "accuracy")
"""Metrics of masked tokens. Bits per byte needs the likelihood of a complete text; nothing is generated."""
LOSS_METRICS = {
    "dpo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "ipo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "kto": ("accuracy", "margin", "kl"),
    "orpo": ("accuracy", "margin", "likelihood_accuracy", "kl"),
    "reward": ("loss", "accuracy", "margin"),
}
"""Metrics of each preference loss. KTO and ORPO have no `loss`: theirs depends on the rows that share a step."""


@dataclass(frozen=True)
class TaskVariant:
    """One task as a recipe trains it."""

    task: str
    objective: str | None = None
    """`completion.objective`; None for other tasks. The same holds for `style` and `loss`."""
    style: str | None = None
    """`qa.style`; with `auto` it depends on the model."""
    loss: str | None = None
    """`preference.loss`."""
    images: bool | None = None
    """`chat.images`; None if the rows decide it."""
    rewards: tuple[str, ...] = ()
    """Those of `reinforce.rewards`, and the audit."""
    samples: int = 0
    """`reinforce.samples`."""
    kl_hindrance: str | None = None
    """Why the adapter cannot be switched off to compare with the base; None if it can."""

    @property
    def facts(self) -> TaskFacts:
        """Return the facts of the task."""
        return TASK_FACTS[self.task]

    @property
    def is_masked(self) -> bool:
        """Return whether the model predicts masked tokens."""
        return self.objective == "masked"

    @property
    def is_extractive(self) -> bool:
        """Return whether the recipe sets `qa.style: extractive`."""
        return self.style == "extractive"

    @property
    def is_reward(self) -> bool:
        """Return whether the model scores answers and writes none."""
        return self.loss == "reward"

    @property
    def generates(self) -> bool:
        """Return whether the model can generate answers, in evaluation or only in `llmtune generate`."""
        if self.loss is not None:
            return not self.is_reward
        return self.facts.generates and not self.is_masked and not self.is_extractive

    @property
    def may_have_images(self) -> bool:
        """Return whether questions have pictures, or may have some as long as the rows are unknown."""
        return self.facts.takes_images and self.images is not False

    @property
    def on_overlong(self) -> tuple[str, ...]:
        """Return the allowed values of `data.on_overlong`."""
        return ("error", "drop") if self.is_extractive else self.facts.overlong

    @property
    def unmeasured(self) -> dict[str, str]:
        """Return the metrics that the loss, the samples or the adapter do not have, each with the reason."""
        if self.rewards:
            more = [name for name in self.facts.metrics if samples_needed(name) > self.samples]
            missing = dict.fromkeys(more, f"reinforce.samples is {self.samples}")
            return missing | ({"kl": self.kl_hindrance} if self.kl_hindrance else {})
        if self.loss is None:
            return {}
        loss_metrics = LOSS_METRICS[self.loss]
        reason = f"preference.loss: {self.loss} does not have it"
        missing = {name: reason for name in self.facts.metrics if name not in loss_metrics}
        if self.kl_hindrance:
            missing.setdefault("kl", self.kl_hindrance)
        return missing

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the task's metrics that can be measured."""
        if self.is_masked:
            return MASKED_METRICS
        return tuple(name for name in self.facts.metrics if name not in self.unmeasured)

    @property
    def study_metrics(self) -> tuple[str, ...]:
        """Return the metrics of the study `rewards`, as gates name them."""
        names = [*(one.rpartition(":")[2] for one in self.rewards), "repeats_prompt"]
        return tuple(f"rewards.{name}" for name in names) if self.rewards else ()

    @property
    def eval_metrics(self) -> tuple[str, ...]:
        """Return the metrics that validation can measure as well as the loss; they need no base model."""
        of_two = {"accuracy", "margin"} if self.loss in ("dpo", "ipo", "kto") else set[str]()
        return tuple(name for name in self.metrics if name not in {"loss", *of_two})

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """Return the task's default metrics that can be measured."""
        return tuple(name for name in self.facts.default_metrics if name in self.metrics)

    @property
    def without_decoder(self) -> tuple[str, str] | None:
        """Return why the recipe's model cannot continue a text, and the key that decides it, or None."""
        if not self.facts.decodes:
            return f"models of task: {self.task} give no likelihood of text", "task"
        if self.is_masked:
            return "with completion.objective: masked a model only fills in words", "completion.objective"
        if self.is_extractive:
            return "with qa.style: extractive a model only marks answers", "qa.style"
        if self.is_reward:
            return "with preference.loss: reward a model only gives scores", "preference.loss"
        return None


def at_ten(metric: str) -> str:
    """Return a metric of the first k at 10, as `TaskFacts.metrics` lists it for all k; others unchanged."""
    return re.sub(r"^(ndcg|mrr|recall|pass)@[1-9][0-9]{0,3}$", r"\1@10", metric)


def samples_needed(metric: str) -> int:
    """Return the k of `pass@k`; 0 for other metrics."""
    match = re.fullmatch(r"pass@([0-9]+)", metric)
    return int(match[1]) if match else 0
