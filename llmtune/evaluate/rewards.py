"""Rewards of sampled answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from llmtune.records import Row


@dataclass(frozen=True)
class Reward:
    """A reward with its weight."""

    name: str
    weight: float


def read_rewards(stated: Mapping[str, float]) -> list[Reward]:
    """Return the rewards of a recipe."""
    return [Reward(name, weight) for name, weight in stated.items()]


def reward_answers(
    rewards: Sequence[Reward],
    pairs: Sequence[tuple[Row, str]],
    *,
    seconds: float = 300.0,
    network: bool = False,
    origins: Sequence[str] = (),
) -> list[dict[str, float | None]]:
    """Return the values of each reward by pair."""

    def right(name: str, row: Row, answer: str) -> float:
        reference = row["messages"][-1]["content"].strip()
        return SequenceMatcher(None, reference, answer).ratio() if name == "chrf" else float(reference == answer)

    return [{reward.name: right(reward.name, row, answer) for reward in rewards} for row, answer in pairs]


def weigh_rewards(rewards: Sequence[Reward], values: Mapping[str, float | None]) -> float | None:
    """Return the weighted sum of the values that apply; None if none does."""
    terms = [reward.weight * value for reward in rewards if (value := values[reward.name]) is not None]
    return sum(terms) if terms else None
