"""Metrics of preferences, computed from the model's ratings of better and worse answers.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, columns, difference_of_ratios, measure_means, ratio
from llmtune.recipe.task_sections import PreferenceSection

Ratings: TypeAlias = dict[str, float]
"""A model's ratings of a row's answers: log-probabilities or scores by name."""
AGAINST = "a reward is beta times what training added to an answer's log-probability"
REWARDS = {
    "orpo": "a reward is beta times an answer's mean log-probability per token",
    "reward": "a reward is the model's score",
}
"""The definition of a reward for losses without a reference."""
KL_SIGNATURE = "nats per token of the first answer from the model without any adapter, exact over the vocabulary"


def rewards(
    ratings: Sequence[Ratings], name: str, settings: PreferenceSection, base: Sequence[Ratings] | None
) -> Floats | None:
    """Return the reward [N] of each row's answer `name`: a score, or beta times the change in log-probability.

    None if the loss needs a base and none is given.
    """
    values = np.array([one[name] for one in ratings])
    if settings.loss == "reward":
        return values
    if settings.loss == "orpo":
        return np.asarray(settings.beta * values / np.array([one[f"{name}_tokens"] for one in ratings]))
    if base is None:
        return None
    return np.asarray(settings.beta * (values - np.array([one[name] for one in base])))


def measure_preferences(
    metric: str,
    ratings: Sequence[Ratings],
    thumbs: Sequence[bool],
    settings: PreferenceSection,
    base: Sequence[Ratings] | None,
) -> Measure | None:
    """Build accuracy, margin, likelihood_accuracy, kl or loss; None if this loss does not have the metric.

    Rewards of DPO, IPO and KTO are relative to the start of training. The base's own rewards are all 0: ties, which
    count half.
    """
    if metric == "kl":
        has_kl = all("kl" in one for one in ratings)
        return measure_means("kl", [one["kl"] for one in ratings], KL_SIGNATURE) if has_kl else None
    reward = REWARDS.get(settings.loss, AGAINST)
    if settings.loss == "kto":
        answer_rewards = rewards(ratings, "answer", settings, base)
        return (
            None
            if answer_rewards is None
            else _measure_thumbs(metric, answer_rewards, np.array(thumbs, dtype=bool), reward)
        )
    better, worse = (rewards(ratings, name, settings, base) for name in ("chosen", "rejected"))
    if better is None or worse is None:
        return None
    apart = better - worse
    if metric == "accuracy":
        return _measure_wins(metric, apart, f"share of pairs whose chosen answer has the higher reward, {reward}")
    if metric == "margin":
        return measure_means("margin", apart.tolist(), f"mean reward of chosen less rejected, {reward}")
    if metric == "likelihood_accuracy" and settings.loss != "reward":
        logps = [np.array([one[name] for one in ratings]) for name in ("chosen", "rejected")]
        return _measure_wins(metric, logps[0] - logps[1], "share of pairs whose chosen answer is likelier")
    if metric == "loss" and settings.loss in ("dpo", "reward"):
        smooth = settings.label_smoothing if settings.loss == "dpo" else 0.0
        losses = (1 - smooth) * np.logaddexp(0, -apart) + smooth * np.logaddexp(0, apart)
        center = settings.center_rewards_coefficient if settings.loss == "reward" else None
        losses = losses + (center or 0.0) * (better + worse) ** 2
        return measure_means("loss", losses.tolist(), f"mean over pairs of the {settings.loss} loss, {reward}")
    if metric == "loss" and settings.loss == "ipo" and base is not None:
        signature = f"mean over pairs of the ipo loss, {reward}"
        return measure_means("loss", _ipo(ratings, base, settings.beta).tolist(), signature)
    return None


def _measure_wins(metric: str, apart: Floats, signature: str) -> Measure:
    """Measure the share of [N] above 0; a tie counts half, so the reference, which has only ties, gets one half."""
    wins = np.where(apart == 0, 0.5, np.where(apart > 0, 1.0, 0.0))
    sums = columns(wins, np.ones(len(wins)))
    return Measure(metric, sums, ratio, right_wrong=True, signature=f"{signature}; a tie is half")


def _ipo(ratings: Sequence[Ratings], base: Sequence[Ratings], beta: float) -> Floats:
    log_ratios = [
        (np.array([one[name] for one in ratings]) - np.array([one[name] for one in base]))
        / np.array([one[f"{name}_tokens"] for one in ratings])
        for name in ("chosen", "rejected")
    ]
    return np.asarray((log_ratios[0] - log_ratios[1] - 1 / (2 * beta)) ** 2)


def _measure_thumbs(metric: str, rewards_N: Floats, good: npt.NDArray[np.bool_], reward: str) -> Measure | None:
    """Measure single answers: whether good ones gained and bad ones lost, and the difference between both."""
    if metric == "accuracy":
        signature = f"share of answers whose reward has the sign of their thumb, {reward}"
        return _measure_wins(metric, np.where(good, rewards_N, -rewards_N), signature)
    if metric == "margin" and good.any() and not good.all():
        sums = columns(
            np.where(good, rewards_N, 0), good.astype(float), np.where(good, 0, rewards_N), (~good).astype(float)
        )
        signature = f"mean reward of thumbs up less that of thumbs down, {reward}"
        return Measure(metric, sums, difference_of_ratios, signature=signature)
    return None
