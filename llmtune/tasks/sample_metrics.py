"""Metrics of sampled answers and their rewards, and signs that the rewards were exploited.

Shapes: N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np
from typing_extensions import TypedDict

from llmtune.display.number_format import score
from llmtune.evaluate.metric import Measure, PairedMeasures, columns, own_interval, ratio
from llmtune.evaluate.paired_statistics import share_bounds
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.recipe.reinforce_section import lowest_accepted
from llmtune.records import Difference
from llmtune.store.score_records import Study, StudyTable

GROWTH = 1.5
"""Factor from which longer answers are a sign of reward hacking."""
REPEATED = 0.1
"""Share of answers that repeat their prompt from which a rise is a sign of reward hacking."""
FEWEST_CHARACTERS = 20
"""A shorter prompt may occur in a good answer."""
REPEATS = "repeats_prompt"
SHOWN = 2
"""Samples of each model per shown prompt."""


class RatedAnswer(TypedDict):
    """One answer and its rewards."""

    text: str
    """As it was sampled."""
    rewards: dict[str, float | None]
    """By name, the audit included; None if a reward does not apply."""
    reward: float | None
    """Their weighted sum, without the audit; None if none applies."""


class RatedSample(RatedAnswer):
    """A sampled answer."""

    tokens: int
    cut: bool
    """Whether it was truncated."""
    repeats: bool
    """Whether it contains its prompt."""


class RatedPrompt(TypedDict):
    """One model's answers to a prompt."""

    greedy: RatedAnswer
    samples: list[RatedSample]
    kl: float | None
    """Divergence from the base model on the first sample, nats per token; None if no adapter can be switched off."""


@dataclass(frozen=True)
class RewardFacts:
    """What the metrics need to know about the rewards."""

    accept: float
    """Reward from which an answer passes."""
    weights: Mapping[str, float]
    """By name, the audit excluded."""
    audit: str | None
    shares: frozenset[str]
    """Rewards that are numbers from 0 to 1."""
    signatures: Mapping[str, str]
    """How each reward is computed."""
    sampling: str
    """How answers are sampled, in words."""

    @property
    def is_share(self) -> bool:
        """Whether the weighted sum is from 0 to 1."""
        return self.weights.keys() <= self.shares and math.isclose(sum(self.weights.values()), 1)


def estimate_pass(samples: int, passing: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k samples passes, if `passing` of `samples` do.

    Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1.
    """
    return 1 - math.comb(samples - passing, k) / math.comb(samples, k)


def rewards_of(one: RatedPrompt) -> list[float]:
    """Return the rewards of the samples that have one."""
    return [sample["reward"] for sample in one["samples"] if sample["reward"] is not None]


def pass_rate(one: RatedPrompt, k: int, accept: float) -> float | None:
    """Return the estimated pass@k of a prompt; None with fewer than k rewarded samples."""
    values = rewards_of(one)
    passing = sum(value >= lowest_accepted(accept) for value in values)
    return estimate_pass(len(values), passing, k) if k <= len(values) else None


def mean_reward(one: RatedPrompt, name: str) -> float | None:
    """Return the mean of one reward over the samples that it applies to; None without any."""
    values = [value for sample in one["samples"] if (value := sample["rewards"][name]) is not None]
    return fmean(values) if values else None


def measure_samples(metric: str, rated: Sequence[RatedPrompt], facts: RewardFacts) -> Measure | None:
    """Return a metric of the samples; None for one of another kind, and without rows if no prompt has it."""
    passing = metric.partition("pass@")[2]
    values: dict[str, Callable[[RatedPrompt], float | None]] = {
        "reward": lambda one: fmean(rewards_of(one) or [math.nan]),
        "greedy_reward": lambda one: one["greedy"]["reward"],
        "answer_tokens": lambda one: fmean(sample["tokens"] for sample in one["samples"]),
        "samples_cut": lambda one: fmean(sample["cut"] for sample in one["samples"]),
        "kl": lambda one: one["kl"],
    }
    value = partial(pass_rate, k=int(passing), accept=facts.accept) if passing else values.get(metric)
    if value is None:
        return None
    weighted = " + ".join(f"{weight:.15g} {facts.signatures[name]}" for name, weight in facts.weights.items())
    signature = facts.sampling
    if passing:
        threshold = f"an answer passes from {facts.accept:.15g}"
        signature = f"unbiased estimate of Chen et al.; {threshold}; {weighted}; {signature}"
    elif metric.endswith("reward"):
        signature = f"{weighted}; {'the greedy answer' if metric == 'greedy_reward' else signature}"
    elif metric == "kl":
        signature = f"divergence from the base over the vocabulary, mean of the tokens; the first of {signature}"
    bounded = bool(passing) or metric == "samples_cut" or (metric.endswith("reward") and facts.is_share)
    return measure_prompts(metric, [value(one) for one in rated], signature, bounded=bounded)


def measure_prompts(metric: str, values: Sequence[float | None], signature: str, *, bounded: bool) -> Measure:
    """Return the mean over the prompts with a value; base and tuned model may have values for different prompts."""
    values_N = np.array(values, dtype=np.float64)
    given_N = np.isfinite(values_N)
    bounds = share_bounds if bounded else None
    if not given_N.any():
        return Measure(metric, np.zeros((0, 2)), ratio)
    return Measure(metric, columns(np.nan_to_num(values_N), given_N), ratio, signature=signature, bounds=bounds)


def study_rewards(
    models: Mapping[str, Sequence[RatedPrompt]],
    prompts: Sequence[str],
    clusters: Sequence[int],
    facts: RewardFacts,
    seed: int,
    shown: int,
) -> Study:
    """Return each reward of the samples of base and tuned model, signs of reward hacking, and samples of `shown` rows.

    `models` has "base" and "tuned" with their answers to the same `prompts`; `clusters` are those of `Measure`.
    """
    names = [*facts.weights, *([facts.audit] if facts.audit else [])]

    def measure(rated: Sequence[RatedPrompt]) -> dict[str, Measure]:
        parts = [
            measure_prompts(
                name, [mean_reward(one, name) for one in rated], facts.signatures[name], bounded=name in facts.shares
            )
            for name in names
        ]
        repeats = [fmean(sample["repeats"] for sample in one["samples"]) for one in rated]
        parts.append(measure_prompts(REPEATS, repeats, "share of samples that contain their prompt", bounded=True))
        parts += [one for name in ("reward", "answer_tokens") if (one := measure_samples(name, rated, facts))]
        return {one.metric: replace(one, clusters=tuple(clusters)) for one in parts if len(one.sums_NK)}

    measures = PairedMeasures(measure(models["base"]), measure(models["tuned"]))
    signs = list_signs(measures, measures.differences(seed), facts.audit)
    measures = PairedMeasures(
        *({name: of[name] for name in (*names, REPEATS) if name in of} for of in (measures.base, measures.tuned))
    )
    base, tuned = measures.scores()
    meanings = {name: f"reward of weight {weight:g}" for name, weight in facts.weights.items()}
    meanings |= {facts.audit: "reward that is not trained on"} if facts.audit else {}
    return Study(
        "Rewards",
        base,
        tuned,
        measures.differences(seed),
        {**meanings, REPEATS: "share of samples that contain their prompt"},
        {**dict.fromkeys(names, 1), REPEATS: -1},
        {name: one.signature for name, one in measures.tuned.items()},
        "" if facts.audit else "Without reinforce.audit, a reward that is not trained on, hacking may remain unseen.",
        (sample_table(models, prompts, shown),),
        " ".join(signs),
        {name: own_interval(one, seed) for name, one in measures.tuned.items()},
        doubtful=bool(signs),
    )


def list_signs(measures: PairedMeasures, changes: Mapping[str, Difference], audit: str | None) -> list[str]:
    """Return a sentence for each sign of reward hacking; each needs a clear difference between the models."""
    base, tuned = measures.scores()
    signs = []
    if audit and audit in changes and changes["reward"].sign > 0 and changes[audit].sign < 0:
        values = f"{score(base[audit])} to {score(tuned[audit])}"
        signs.append(f"The reward rises and the audit {audit} falls ({values}): the reward may be exploited.")
    length, repeats = "answer_tokens", REPEATS
    if changes[length].sign > 0 and tuned[length] >= GROWTH * base[length]:
        signs.append(f"Answers grew from {score(base[length])} to {score(tuned[length])} tokens.")
    if changes[repeats].sign > 0 and tuned[repeats] >= REPEATED:
        signs.append(f"{tuned[repeats]:.0%} of the answers repeat their prompt ({base[repeats]:.0%} of the base's).")
    return signs


def sample_table(models: Mapping[str, Sequence[RatedPrompt]], prompts: Sequence[str], shown: int) -> StudyTable:
    """Return the first samples of both models for some prompts, spread evenly over all."""
    rows = [
        (prompts[at], model, score(sample["reward"]), sample["text"])
        for at in cut_evenly(len(prompts), shown)
        for model, rated in models.items()
        for sample in rated[at]["samples"][:SHOWN]
    ]
    return StudyTable("Samples of base and tuned model", ("prompt", "model", "reward", "answer"), tuple(rows))


def repeats_prompt(answer: str, prompt: str) -> bool:
    """Whether an answer contains its prompt, which must be long enough not to occur in a good one."""
    text = " ".join(prompt.split())
    return len(text) >= FEWEST_CHARACTERS and text in " ".join(answer.split())
