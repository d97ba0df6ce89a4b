"""Rated samples of a model, and facts of their rewards."""

from typing import Any

from llmtune.recipe.task_facts import SAMPLED
from llmtune.tasks.sample_metrics import RatedPrompt, RewardFacts

SAMPLED_METRICS = (*SAMPLED, "pass@10")
SIGNATURES = {"right": "answer is right", "honest": "a judge's"}
RATED_FACTS = RewardFacts(1.0, {"right": 1.0}, None, frozenset(SIGNATURES), SIGNATURES, "samples")


def rate_sample(reward: float | None, tokens: int = 4, text: str = "48", **options: Any) -> dict[str, Any]:
    """Return an answer with the reward `right`; other rewards are options, and so are `cut` and `repeats`."""
    facts = {"cut": options.pop("cut", False), "repeats": options.pop("repeats", False)}
    return {"text": text, "rewards": {"right": reward} | options, "reward": reward, "tokens": tokens, **facts}


def rate_prompt(
    *rewards: float | dict[str, Any] | None, greedy: float = 1.0, kl: float | None = 0.5, **options: Any
) -> RatedPrompt:
    """Return a prompt with a sample for each reward, all with the same options; or with the given samples."""
    samples: Any = [one if isinstance(one, dict) else rate_sample(one, **options) for one in rewards]
    return {"greedy": rate_sample(greedy), "samples": samples, "kl": kl}  # type: ignore[typeddict-item]
