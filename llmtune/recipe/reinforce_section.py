"""The section `reinforce`: how answers are sampled, rewarded and learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmtune.recipe.control_run import ControlRun
from llmtune.recipe.evaluate_section import absolute_metric
from llmtune.recipe.section import NonEmpty, Positive
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_sections import TaskSection

GRPO_KEYS = ("loss", "scale_rewards", "epsilon", "beta", "mask_truncated", "control")
"""Keys of `reinforce` that only `method: grpo` reads."""
SLACK = 1e-9
"""Rounding error of a weighted sum of rewards."""


def lowest_accepted(accept: float) -> float:
    """Return the lowest reward that passes: 0.7 + 0.2 + 0.1 is 0.9999999999999999 and passes 1."""
    return accept - SLACK


def rewards_differ(rewards: Sequence[float | None]) -> bool:
    """Whether two answers to a prompt have different rewards."""
    values = [reward for reward in rewards if reward is not None]
    return bool(values) and max(values) - min(values) > SLACK


class ReinforceSection(TaskSection):
    """Settings of the task `reinforce`."""

    paths: ClassVar[Mapping[str, Callable[[str, Path], str]]] = {"rewards": absolute_metric, "audit": absolute_metric}

    training_keys: ClassVar[frozenset[str]] = frozenset({"method", "rounds", *GRPO_KEYS})

    method: Literal["filter", "grpo"] = "grpo"
    """`filter` samples answers and trains on those that the rewards accept. `grpo` raises the probability of answers
    with a higher reward than the other answers to their prompt. Default `grpo`."""
    rewards: dict[NonEmpty, Annotated[float, Field(gt=0, le=1000)]] = Field(default={})
    """Rewards and their weights, as `{exact_match: 1.0}`: a metric of the answer, or your own as `FILE.py:FUNCTION`,
    relative to the recipe. An answer's reward is the weighted sum. No default: only you know what a good answer is."""
    samples: int = Field(default=8, ge=2, le=1024)
    """Answers sampled for each prompt. Default 8: fewer leave many prompts without two different rewards."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature of the samples. Default 1: the model's own distribution, which the policy gradient assumes."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that reach this total probability. Default 1: from all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the likeliest tokens. Default 0: from all."""
    max_new_tokens: Positive = 256
    """Longest sample in tokens; longer ones are truncated. Default 256: a few paragraphs."""
    rounds: Positive | None = None
    """How often answers are sampled in the training, spread evenly over its steps. Default none: before each step for
    `grpo`, once per epoch for `filter`."""
    accept: float = 1.0
    """Reward from which an answer is good: `filter` trains on it, and pass@k counts it. Default 1."""
    loss: Literal["dr_grpo", "grpo", "dapo", "bnpo"] = "dr_grpo"
    """What the summed loss is divided by, by the names of TRL: `dr_grpo` by the longest possible samples of the step,
    `grpo` each sample by its own length, `dapo` and `bnpo` by the trained tokens of the step. Default `dr_grpo`: it
    favours neither short nor long answers."""
    scale_rewards: Literal["none", "group"] | None = None
    """Divide advantages by the standard deviation of their prompt's rewards (`group`), or not (`none`). Default none:
    `none` for `dr_grpo`, `group` for the other losses."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """How far the probability of a token may move before its gradient is clipped, as a ratio. Default 0.2, as in PPO;
    without effect on samples of the current weights."""
    beta: float = Field(default=0.0, ge=0, le=100)
    """Strength of the tie to the starting model (KL divergence). Default 0: verifiable rewards need none."""
    mask_truncated: bool = True
    """Leave truncated samples out of the loss. Default true: their reward says little about their beginning."""
    audit: NonEmpty | None = None
    """A second reward, never trained on, that evaluation watches for reward hacking. Default none."""
    control: Literal[False, "filter"] = "filter"
    """With `grpo`, also train `method: filter` with as many samples, and compare the two. Default `filter`: grpo costs
    more, so it should beat it. `false` saves the time."""

    @property
    def scales_rewards(self) -> bool:
        """Whether advantages are divided by the standard deviation of their prompt's rewards."""
        return (self.scale_rewards or ("none" if self.loss == "dr_grpo" else "group")) == "group"

    @property
    def all_rewards(self) -> tuple[str, ...]:
        """Return the rewards and the audit, as stated."""
        return *self.rewards, *([self.audit] if self.audit else ())

    @property
    def ties(self) -> bool:
        """Whether the loss ties the model to the starting model."""
        return self.method == "grpo" and self.beta > 0

    def as_control(self) -> ControlRun | None:
        """Return the control run of `method: grpo`: the recipe with `method: filter`."""
        if self.method == "filter":
            return None
        defaults = {name: type(self).model_fields[name].default for name in GRPO_KEYS}
        section = self.model_copy(update={**defaults, "method": "filter"})
        on = self.control is not False
        return ControlRun("filter", "GRPO beat filter", "reinforce.control", {"reinforce": section}, on)

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report missing rewards, and keys that the method ignores."""
        if not self.rewards:
            fix = "Name a reward and its weight, such as `rewards: {exact_match: 1.0}`."
            diagnostics.add("reinforce.rewards", "'reinforce.rewards' is missing", fix)
        if self.audit in self.rewards:
            what = "'reinforce.audit' is one of the trained rewards, so it cannot detect reward hacking"
            diagnostics.add("reinforce.audit", what, "Name another reward, or remove it.", "reinforce.rewards")
        for name in GRPO_KEYS if self.method == "filter" else ():
            why, fix = "with reinforce.method: filter", "Remove it; it belongs to method: grpo."
            diagnostics.no_effect(f"reinforce.{name}", why, fix, "reinforce.method")
