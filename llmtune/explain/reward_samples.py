"""Samples a model's answers to prompts, and describes their rewards: what reinforcement would begin with.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console

from llmtune.data.conversation_texts import split_reference
from llmtune.display.console import spinner
from llmtune.evaluate.generation import answer_ends, answer_reader
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import measure_right, measure_shares, own_interval
from llmtune.evaluate.reward_check import LIMIT_FLAGS, RewardLimits, rescale_interval
from llmtune.evaluate.rewards import Reward, reward_answers, weigh_rewards
from llmtune.evaluate.sampled_decoding import sample_answers
from llmtune.model.device import pick_device
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.plan import find_variant
from llmtune.recipe.reinforce_section import ReinforceSection, lowest_accepted, rewards_differ
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import DEFAULT_TASK
from llmtune.records import Json, Row

MOST_PROMPTS = 32
SAMPLES = (2, 4, 8, 16, 32, 64)
LEAST_SPREAD = 0.5
"""Share of prompts that should have a good and a bad sample: `samples` is the smallest number that gives it."""


@dataclass(frozen=True)
class SampleRequest:
    """How a model is sampled."""

    model: str
    samples: int
    max_new_tokens: int
    accept: float
    seed: int
    offline: bool


def describe_samples(
    request: SampleRequest,
    rewards: Sequence[Reward],
    rows: Sequence[tuple[str, Row]],
    limits: RewardLimits,
    console: Console,
) -> Json:
    """Return pass@1, pass@k and the share of prompts with different rewards, each with an interval.

    Raises RewardError if a reward fails on a sample; EnvironmentProblem if the model cannot be loaded.
    """
    rows, section = rows[:MOST_PROMPTS], ReinforceSection(max_new_tokens=request.max_new_tokens)
    stated: Mapping[str, object] = {"task": DEFAULT_TASK, "data": {"train": "none"}, "model": {"name": request.model}}
    recipe, device = Recipe.model_validate(stated), pick_device()
    model_ref = resolve_model(request.model, recipe.model, console, request.offline)
    task, processor = find_variant(recipe, model_ref), load_processor(model_ref, recipe.model)
    prompts = [task.prompt_ids(split_reference(row)[0], processor, recipe) for _, row in rows]
    places = [(row, sample) for row in range(len(rows)) for sample in range(request.samples)]
    with spinner(console, f"{len(places):,} answers of {request.model}"), torch.no_grad():
        model = load_model(model_ref, recipe, task, processor, device=device, training=False).model
        keys = [(request.seed, 0, *place) for place in places]
        stops = set(answer_ends(model, processor, recipe))
        sampled = sample_answers(model, [prompts[row] for row, _ in places], keys, section, stops, device)
    read = answer_reader(processor, recipe)
    pairs = [
        (rows[number][1], read(one.ids, rows[number][1].get("tools"), prompts[number], one.truncated))
        for (number, _), one in zip(places, sampled, strict=True)
    ]
    origins = [rows[number][0] for number, _ in places]
    seconds, network = limits.seconds, limits.network
    values = reward_answers(rewards, pairs, seconds=seconds, network=network, origins=origins, limits=LIMIT_FLAGS)
    sums = [weigh_rewards(rewards, one) for one in values]
    rewards_NK = np.array([np.nan if one is None else one for one in sums]).reshape(len(rows), -1)
    truncated = sum(one.truncated for one in sampled) / len(sampled)
    clusters = [prompts.index(prompt) for prompt in prompts]
    measured = measure_groups(rewards_NK, request.accept, request.seed, clusters)
    return {"name": request.model, **measured, "truncated": truncated}


def measure_groups(rewards_NK: Floats, accept: float, seed: int, clusters: Sequence[int] = ()) -> Json:
    """Return what the rewards [N, samples] of each prompt show; NaN where no reward applies.

    Rows with equal numbers in `clusters` [N] have the same prompt.
    """
    passing_NK = rewards_NK >= lowest_accepted(accept)
    share_N, samples = passing_NK.mean(1), rewards_NK.shape[1]
    has_spread = [rewards_differ(one[np.isfinite(one)].tolist()) for one in rewards_NK]
    measures = {
        "pass@1": measure_shares("pass@1", share_N.tolist(), ""),
        f"pass@{samples}": measure_right([bool(one.any()) for one in passing_NK], "pass", ""),
        "spread": measure_right(has_spread, "spread", ""),
    }
    measures = {name: replace(measure, clusters=tuple(clusters)) for name, measure in measures.items()}
    found = {name: rescale_interval(own_interval(measure, seed), 1.0, 0.0) for name, measure in measures.items()}
    expected = {k: float((1 - share_N**k - (1 - share_N) ** k).mean()) for k in SAMPLES}
    enough = next((k for k, share in expected.items() if share >= LEAST_SPREAD), None)
    return {"prompts": len(rewards_NK), "samples": samples, **found, "samples_needed": enough}
